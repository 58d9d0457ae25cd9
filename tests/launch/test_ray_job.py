"""`quatuor submit` before anything is sent: what is shipped, and what could not work as a job."""

from __future__ import annotations

import asyncio
import shlex
import subprocess
import sys
import zipfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from actors.run.resume import Resume
from launch import cli
from launch.cluster import ray_job
from launch.recipe.read import load_recipe

ADDRESS = ["--address", "http://127.0.0.1:1"]  # nobody is there, and nobody is asked


def files_in(root: Path, **contents: str) -> list[str]:
    for name, text in contents.items():
        path = root / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return list(ray_job.shipped_files(root))


def test_this_checkout_can_be_shipped() -> None:
    files = list(ray_job.shipped_files(ray_job.ROOT))
    assert {"launch/cli.py", "launch/recipes/demo_ppo.yaml", "setup.cfg"} <= set(files)
    assert not [
        f
        for f in files
        if f.startswith((".git/", ".venv", "runs/")) or "__pycache__" in f or "_cache/" in f
    ]
    assert not list(ray_job.size_problems(ray_job.sizes(ray_job.ROOT, files)))
    assert not list(ray_job.shadowing_problems(files, ray_job.installed_modules()))


def test_what_git_or_ray_ignore_stays_here(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "big.bin").write_text("")
    (tmp_path / "checkout").mkdir()
    (tmp_path / "checkout" / "link").symlink_to(tmp_path / "elsewhere")
    files = files_in(
        tmp_path / "checkout",
        _dot_gitignore="*.pt\n/data/\n!keep.pt\n",
        _dot_rayignore="notes.txt\n",
        launch___dot_gitignore="secret.py\n",
        launch__cli_dot_py="",
        launch__secret_dot_py="",
        weights_dot_pt="",
        keep_dot_pt="",
        notes_dot_txt="",
        data__x_dot_jsonl="",
        docs__data__y_dot_md="",
        _dot_venv__bin__python="",
        _dot_git__HEAD="",
        runs__a="",
    )
    assert files == [
        ".gitignore",
        ".rayignore",
        "docs/data/y.md",
        "keep.pt",
        "launch/.gitignore",
        "launch/cli.py",
    ]


def test_a_checkout_that_is_too_large_names_the_largest_files() -> None:
    sizes = {"README.md": 1000, "data/a.parquet": 90 * 2**20, "model.bin": 30 * 2**20, "b": 2**20}
    (problem,) = ray_job.size_problems(sizes)
    assert "121 MiB to ship" in problem and "takes 100" in problem and ".gitignore" in problem
    assert "data/a.parquet (90 MiB), model.bin (30 MiB), b (1 MiB)" in problem
    assert not list(ray_job.size_problems(sizes, most_mib=122))


def test_names_that_would_hide_a_module() -> None:
    installed = {
        "queue": "Python's own module",
        "ray": "the installed package ray",
        "tests": "some package",
    }
    files = [
        "queue.py",
        "ray/__init__.py",
        "launch/queue.py",
        "tests/test_x.py",
        "launch/__init__.py",
        "queue.txt",
    ]
    first, second = ray_job.shadowing_problems(files, installed)
    assert "queue.py would hide Python's own module" in first and "rename" in first
    assert "ray/__init__.py would hide the installed package ray" in second


def test_installed_modules_are_those_of_others() -> None:
    installed = ray_job.installed_modules()
    assert (
        installed["json"] == "Python's own module"
        and installed["ray"] == "the installed package ray"
    )
    assert not {"launch", "actors", "learners"} & set(installed)


def test_paths_that_mean_nothing_in_a_job(place: Path) -> None:
    recipe = load_recipe("ppo.yaml")
    problems = {p.keys[0]: p.message for p in ray_job.path_problems(recipe, ["setup.cfg"])}
    models = {"actor.model.path", "critic.model.path", "rewards.0.model.path"}
    assert set(problems) == {"run.folder", "prompts.path", *models}
    assert (
        "runs/new is relative" in problems["run.folder"]
        and "absolute path" in problems["run.folder"]
    )
    shipped = ["decoder/config.json", "reward_model/config.json", "prompts.jsonl"]
    assert {p.keys[0] for p in ray_job.path_problems(recipe, shipped)} == {"run.folder"}
    absolute = load_recipe("ppo.yaml", [f"run.folder={place / 'new'}"])
    assert not list(ray_job.path_problems(absolute, shipped))


def test_a_hub_name_is_no_path(place: Path) -> None:
    recipe = load_recipe("sft.yaml", ["learner.model.path=Qwen/Qwen3-8B", "run.folder=/shared/new"])
    assert [p.keys for p in ray_job.path_problems(recipe, ["pairs.jsonl"])] == []


def test_a_function_that_would_not_be_shipped(place: Path) -> None:
    recipe = load_recipe(
        "grpo.yaml", ["run.folder=/shared/new", f"actor.model.path={place / 'decoder'}"]
    )
    (problem,) = ray_job.path_problems(recipe, ["prompts.jsonl"])
    assert (
        problem.keys == ("rewards.0.function",)
        and "rewards_of_test is here, but not among" in problem.message
    )
    assert not list(ray_job.path_problems(recipe, ["prompts.jsonl", "rewards_of_test.py"]))


def test_an_algorithm_that_would_not_be_shipped(place: Path) -> None:
    (place / "own_algorithm_of_test.py").write_text(
        "from learners.algorithms.ppo import PPO\n\n\nclass Own(PPO):\n    pass\n"
    )
    absolute = [f"{key}.model.path={place / 'decoder'}" for key in ("actor", "critic")]
    overrides = ["run.folder=/shared/new", "algorithm={kind: own_algorithm_of_test:Own}", *absolute]
    recipe = load_recipe("rl.yaml", overrides)
    shipped = ["prompts.jsonl", "rewards_of_test.py"]
    (problem,) = ray_job.path_problems(recipe, shipped)
    assert (
        problem.keys == ("algorithm.kind",) and "own_algorithm_of_test is here" in problem.message
    )
    assert not list(ray_job.path_problems(recipe, [*shipped, "own_algorithm_of_test.py"]))


def test_the_command_refuses_in_one_line_each_with_its_place(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    absolute = [
        f"{key}.model.path={place / 'reward_model'}" for key in ("actor", "critic", "rewards.0")
    ]
    assert (
        cli.main(
            ["submit", "ppo.yaml", *ADDRESS, *absolute, f"prompts.path={place / 'prompts.jsonl'}"]
        )
        == 2
    )
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ppo.yaml:") and "run.folder: runs/new is relative" in line
    assert cli.main(["submit", "ppo.yaml", "--address", "head:8265"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--address: head:8265 is not the URL of a job server, such as http://head:8265" in line


def test_a_refusal_loads_nothing_heavy(place: Path) -> None:
    code = (
        "import sys\nfrom launch.cli import main\ncode = main()\nsys.exit(9 if 'ray' in "
        "sys.modules else code)"
    )
    command = [sys.executable, "-c", code, "submit", "ppo.yaml", *ADDRESS]
    assert (
        subprocess.run(
            command, env={"PYTHONPATH": str(ray_job.ROOT)}, capture_output=True
        ).returncode
        == 2
    )


def test_the_package_holds_the_checkout_and_a_recipe_from_anywhere(tmp_path: Path) -> None:
    root = tmp_path / "checkout"
    files = files_in(root, launch__cli_dot_py="code", submitted__old_dot_yaml="of another job")
    (tmp_path / "my ppo.yaml").write_text("kind: ppo\n")
    ray_job.pack(root, files, tmp_path / "my ppo.yaml", tmp_path / "checkout.zip")
    with zipfile.ZipFile(tmp_path / "checkout.zip") as archive:
        assert sorted(archive.namelist()) == ["launch/cli.py", "submitted/my ppo.yaml"]
        assert archive.read("submitted/my ppo.yaml") == b"kind: ppo\n"


def test_the_entrypoint_survives_the_shell() -> None:
    overrides = ["run.folder=/a b/$HOME", "evaluation.prompts=null", "rewards.0.name='x'"]
    words = shlex.split(ray_job.entrypoint("ppo", "my ppo.yaml", overrides, Resume()))
    command = ["python", "-m", "launch", "ppo", "--resume", "submitted/my ppo.yaml"]
    assert words == [*command, *overrides, "cluster.address=auto"]
    assert "--resume" not in ray_job.entrypoint("ppo", "x.yaml", [], None)


@pytest.mark.parametrize(
    ("status", "driver", "code"),
    [
        ("SUCCEEDED", 0, 0),
        ("FAILED", 2, 2),
        ("FAILED", -9, 137),
        ("FAILED", None, 1),
        ("STOPPED", None, 130),
    ],
)
def test_exit_codes(status: str, driver: int | None, code: int) -> None:
    assert ray_job.exit_code(status, driver) == code


class BrokenLog:
    """A job's log whose connection breaks after `pieces[i]`; each connection begins with the first
    piece again.
    """

    def __init__(self, *pieces: str) -> None:
        self.pieces = pieces
        self.connections = 0

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        self.connections += 1
        for piece in self.pieces[: self.connections]:
            yield piece
        raise RuntimeError("connection lost")

    def get_job_logs(self, job: str) -> str:
        return "".join(self.pieces)


def test_a_log_is_printed_once_however_often_the_connection_breaks(
    capsys: pytest.CaptureFixture[str],
) -> None:
    log = ray_job.Log(BrokenLog("one\n", "two\n", "three\n"), "job")
    for _ in range(4):
        asyncio.run(log.print())
    assert capsys.readouterr().out == "one\ntwo\nthree\n"


def test_last_lines_that_the_connection_did_not_bring_are_fetched(
    capsys: pytest.CaptureFixture[str],
) -> None:
    log = ray_job.Log(BrokenLog("one\n", "two\n", "three\n"), "job")
    asyncio.run(log.print())
    log.print_rest()
    assert capsys.readouterr().out == "one\ntwo\nthree\n"
