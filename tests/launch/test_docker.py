"""The images, as far as they can be checked without a Docker engine: CI runs the same
docker/install.sh by itself.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pathspec import GitIgnoreSpec
from typer.testing import CliRunner

from launch.cli import app

ROOT = Path(__file__).parents[2]
IMAGES = ("cpu", "gpu")


def instructions(variant: str) -> list[tuple[str, str]]:
    """(instruction, argument) of a Dockerfile, in order; comments left out, continued lines
    joined.
    """
    text = (ROOT / f"docker/Dockerfile.{variant}").read_text()
    lines = (
        "\n".join(line for line in text.splitlines() if not line.startswith("#"))
        .replace("\\\n", "")
        .splitlines()
    )
    return [
        (word, " ".join(rest.split()))
        for word, _, rest in (line.partition(" ") for line in lines if line.strip())
    ]


def arguments(variant: str, instruction: str) -> list[str]:
    return [argument for word, argument in instructions(variant) if word == instruction]


@pytest.mark.parametrize("variant", IMAGES)
def test_everything_is_installed_by_the_one_script_at_locked_versions(variant: str) -> None:
    system, *ours = arguments(variant, "RUN")
    assert system.startswith("apt-get update ") and "pip" not in system
    assert [run.partition(" && ")[0] for run in ours] == [
        f"docker/install.sh .venv {variant} packages",
        f"docker/install.sh .venv {variant}",
    ]
    (base,) = arguments(variant, "FROM")
    assert re.fullmatch(r"[\w/-]+:\d[\w.-]+", base), "a base image has a version"


@pytest.mark.parametrize("variant", IMAGES)
def test_what_is_copied_exists_and_the_packages_do_not_depend_on_our_code(variant: str) -> None:
    copies = [copy.split() for copy in arguments(variant, "COPY")]
    first, second = ([word for word in copy if not word.startswith("--")] for copy in copies)
    assert second == [".", "."]
    for pattern in first[:-1]:
        assert list(ROOT.glob(pattern)), f"{pattern} is not in the checkout"
    assert all(name.startswith("docker/") for name in first)
    words = [word for word, _ in instructions(variant)]
    assert words.index("COPY") < words.index("RUN", words.index("COPY")), (
        "the packages come before our code"
    )


@pytest.mark.parametrize("variant", IMAGES)
def test_nothing_of_ours_runs_as_root(variant: str) -> None:
    steps = instructions(variant)
    (user,) = [i for i, (word, _) in enumerate(steps) if word == "USER"]
    assert steps[user][1] == "10001"
    assert all("install.sh" not in argument for word, argument in steps[:user])
    assert all("--chown=10001" in copy for copy in arguments(variant, "COPY"))


@pytest.mark.parametrize("variant", IMAGES)
def test_the_health_check_is_a_command_that_exists(variant: str) -> None:
    (check,) = arguments(variant, "HEALTHCHECK")
    program, *words = json.loads(check.partition(" CMD ")[2])
    assert (program, words[0]) == ("quatuor", "doctor") and "--no-start" in words
    assert ("cuda" in words) == (variant == "gpu")
    assert CliRunner().invoke(app, [*words, "--help"]).exit_code == 0


def test_images_leave_out_what_git_leaves_out() -> None:
    ignored = [
        (ROOT / f"docker/Dockerfile.{variant}.dockerignore").read_text() for variant in IMAGES
    ]
    assert ignored[0] == ignored[1]
    rules = GitIgnoreSpec.from_lines(ignored[0].splitlines())
    for line in (ROOT / ".gitignore").read_text().split():
        sample = line.replace("*", "x")
        assert rules.match_file(f"{sample}file" if line.endswith("/") else sample), (
            f"{line} would be copied"
        )
    assert rules.match_file(".git/HEAD") and not rules.match_file("launch/cli.py")


def test_hadolint_finds_nothing() -> None:
    program = Path(sys.executable).with_name("hadolint")
    files = [ROOT / "docker" / f"Dockerfile.{variant}" for variant in IMAGES]
    done = subprocess.run([program, *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
