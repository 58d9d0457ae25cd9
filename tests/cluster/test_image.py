"""The CPU image without a Docker engine: the steps of its Dockerfile that are ours, in their order,
in a folder.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from pathspec import GitIgnoreSpec

from launch.cluster.ray_job import shipped_files
from tests.launch.test_docker import ROOT, instructions

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

HOME = "/home/quatuor"  # of the image's user


def copy(argument: str, folder: Path) -> None:
    """COPY of files that match patterns into a folder, or of the whole checkout but for what
    .dockerignore names.
    """
    *patterns, target = [word for word in argument.split() if not word.startswith("--")]
    if patterns == ["."]:
        ignored = GitIgnoreSpec.from_lines(
            (ROOT / "docker/Dockerfile.cpu.dockerignore").read_text().splitlines()
        )
        found = [ROOT / name for name in shipped_files(ROOT) if not ignored.match_file(name)]
        places = {path: folder / path.relative_to(ROOT) for path in found}
    else:
        places = {
            path: folder / target / path.name for pattern in patterns for path in ROOT.glob(pattern)
        }
    for path, place in places.items():
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, place)


def test_the_steps_of_the_cpu_image_install_what_its_health_check_finds_sound(
    tmp_path: Path,
) -> None:
    steps = instructions("cpu")
    # before: the system's packages, as root
    (at,) = [i for i, (word, _) in enumerate(steps) if word == "WORKDIR"]
    folder = tmp_path / "quatuor"
    folder.mkdir()
    environment = {
        k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "PYTHONPATH", "PYTHONHOME")
    }
    done = []
    for word, argument in steps[at + 1 :]:
        here = argument.replace(f"{HOME}/quatuor", str(folder)).replace(HOME, str(tmp_path))
        match word:
            case "COPY":
                copy(argument, folder)
                continue
            case "ENV":
                name, _, value = here.partition("=")
                environment[name] = value.replace("$PATH", environment["PATH"])
                continue
            case "RUN":
                command = ["sh", "-c", here]
            case _:  # HEALTHCHECK and CMD
                command = json.loads(here.rpartition("CMD ")[2])
        ran = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600
        )
        assert ran.returncode == 0, f"{word} {argument}: {ran.stdout[-2000:]}{ran.stderr[-2000:]}"
        done.append(word)
    assert done == ["RUN", "RUN", "HEALTHCHECK", "CMD"]
    shutil.rmtree(folder)  # four gigabytes
