"""Ray's folder and token where the usual ones cannot be had."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from actors.cluster import surroundings
from actors.cluster.surroundings import LONGEST_FOLDER, provide_token, ray_folder, token_file
from learners.errors import UserError

LONG = "x" * 120
TOKEN = "RAY_AUTH_TOKEN"


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_TMPDIR", "TMPDIR", "RAY_AUTH_MODE", TOKEN, "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.setenv(name, "")  # so that what a test sets is taken back
        monkeypatch.delenv(name)


@pytest.mark.parametrize("name", ["TMPDIR", "RAY_TMPDIR"])
def test_ray_keeps_its_own_folder_where_that_will_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    assert ray_folder() in ("/tmp/ray", f"/tmp/ray-{os.getuid()}")
    monkeypatch.setenv(name, "/tmp/short-for-ray")
    assert ray_folder() == "/tmp/short-for-ray/ray"
    Path("/tmp/short-for-ray/ray").rmdir()
    Path("/tmp/short-for-ray").rmdir()
    monkeypatch.setenv(name, str(tmp_path / LONG))
    assert len(ray_folder()) <= LONGEST_FOLDER and not (tmp_path / LONG).exists()
    monkeypatch.setenv(name, "/proc/nowhere")
    assert ray_folder().startswith("/tmp/ray")


def test_without_any_folder_a_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(surroundings, "writable", lambda folder: False)
    with pytest.raises(UserError, match=r"at most 36 bytes.* none of /tmp/ray, .*: set RAY_TMPDIR"):
        ray_folder()


@pytest.mark.parametrize("home", ["/proc/nowhere", "/etc/passwd", "~"])
def test_a_home_that_cannot_be_written_leaves_the_token_in_the_environment(
    monkeypatch: pytest.MonkeyPatch, home: str
) -> None:
    """`~`: neither HOME is set nor does anybody know the user."""
    monkeypatch.setattr(os.path, "expanduser", lambda path: home)
    assert not token_file().is_file()
    provide_token()
    assert len(os.environ[TOKEN]) == 64


@pytest.mark.parametrize(
    "given", [{"RAY_AUTH_TOKEN_PATH": "/mine"}, {"RAY_AUTH_MODE": "disabled"}, {TOKEN: "mine"}]
)
def test_what_was_given_stays(monkeypatch: pytest.MonkeyPatch, given: dict[str, str]) -> None:
    monkeypatch.setenv("HOME", "/proc/nowhere")
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    provide_token()
    assert os.environ.get(TOKEN) == given.get(TOKEN)


def test_a_home_that_can_be_written_keeps_the_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    provide_token()
    (tmp_path / ".ray" / "auth_token").write_text("0" * 64)
    provide_token()
    assert TOKEN not in os.environ


STARTED = """
import os
from actors.cluster.connection import connect
import ray
connect(None, cpus=1)
home = ray.get(ray.remote(lambda: os.environ["HOME"]).remote())
sockets = ray._private.worker._global_node.get_sockets_dir_path()
ray.shutdown()
print(home, sockets)
"""


@pytest.mark.engines
def test_ray_starts_under_a_long_tmpdir_and_without_a_home(tmp_path: Path) -> None:
    """Ray alone fails in both: its sockets have too long a path, its token file no folder."""
    environment = {**os.environ, "TMPDIR": str(tmp_path / LONG), "HOME": "/proc/nowhere"}
    ran = subprocess.run(
        [sys.executable, "-c", STARTED], env=environment, capture_output=True, text=True, timeout=90
    )
    assert ran.returncode == 0, ran.stderr
    home, sockets = ran.stdout.split()
    assert home == "/proc/nowhere" and sockets.startswith("/tmp/ray")
    # the rest of the path is what room is kept for
    kept = len(surroundings.SOCKET.rpartition("/")[0])
    assert len(sockets) - len(ray_folder()) - 1 <= kept
