"""Write the lock file of the Python that runs this: `python3.12 docker/lock.py cpu` (or gpu).
Installs nothing.

setup.cfg says what we need and pip resolves it. The versions of requirements-cpu-py311.txt, the set
our tests run on, are kept in every lock file; `--upgrade` lets go of them.
"""

import argparse
import configparser
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
TESTED = HERE / "requirements-cpu-py311.txt"

# The CUDA builds of torch and vLLM fix the versions of these.
OWN_ON_GPU = {"apache-tvm-ffi", "torch", "triton"}
# vLLM asks for these and runs without them; on a CPU their builds do not match torch and break
# every import.
LEFT_OUT_ON_CPU = {"torchaudio", "torchcodec", "torchvision"}
# What the CPU build of torch requires, for machines that cannot reach PyTorch's own index.
TORCH_REQUIRES = [
    "filelock",
    "fsspec>=0.8.5",
    "jinja2",
    "networkx>=2.5.1",
    "setuptools>=77.0.3",
    "sympy>=1.13.3",
    "typing-extensions>=4.10.0",
]


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements(variant: str) -> tuple[list[str], str]:
    """Return the requirements of setup.cfg for one variant, and the torch version among them."""
    config = configparser.ConfigParser()
    config.read(HERE.parent / "setup.cfg")
    extras = config["options.extras_require"]
    lines = [config["options"]["install_requires"], extras[variant], extras["dev"], "pip"]
    wanted = [line.strip() for block in lines for line in block.splitlines() if line.strip()]
    (torch,) = [line.split("==")[1].strip() for line in wanted if re.match(r"torch\s*==", line)]
    return wanted, torch


def stand_in(folder: Path, name: str, version: str, requires: list[str]) -> None:
    """Write a wheel with metadata and nothing else, for the resolver."""
    info = f"{name}-{version}.dist-info"
    metadata = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    metadata += [f"Requires-Dist: {requirement}" for requirement in requires]
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{info}/METADATA", "\n".join(metadata) + "\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")


def resolve(variant: str, upgrade: bool) -> dict[str, str]:
    wanted, torch = requirements(variant)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # "===" is the one comparison by which 2.13.0 is not also 2.13.0+cpu.
        wanted.append(f"torch==={torch}" if variant == "gpu" else f"torch=={torch}+cpu")
        if variant == "cpu":
            stand_in(folder, "torch", f"{torch}+cpu", TORCH_REQUIRES)
            for package in LEFT_OUT_ON_CPU:
                stand_in(folder, package, "999", [])
        kept = folder / "kept.txt"
        pins = TESTED.read_text().splitlines() if TESTED.exists() and not upgrade else []
        free = OWN_ON_GPU if variant == "gpu" else set()
        kept.write_text("\n".join(pin for pin in pins if pin.split("==")[0] not in free))
        report = folder / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "-qq"]
        command += [
            "--find-links",
            name,
            "--constraint",
            str(kept),
            "--report",
            str(report),
            *wanted,
        ]
        subprocess.run(
            command, check=True, env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        )
        items = [item["metadata"] for item in json.loads(report.read_text())["install"]]
    left_out = LEFT_OUT_ON_CPU if variant == "cpu" else set()
    found = {canonical(item["name"]): item["version"] for item in items}
    return {name: found[name] for name in sorted(found) if name not in left_out}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("variant", choices=["cpu", "gpu"])
    parser.add_argument("--upgrade", action="store_true", help="take the newest versions that fit")
    options = parser.parse_args()
    pins = resolve(options.variant, options.upgrade)
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    path = HERE / f"requirements-{options.variant}-py{python.replace('.', '')}.txt"
    header = [
        f"# The complete {options.variant.upper()} set for Linux on x86_64 and Python {python}.",
        f"# Installed by install.sh, with --no-deps; written by python{python} docker/lock.py "
        f"{options.variant}",
    ]
    if path != TESTED:
        header.append(
            "# Resolved only: the set that is installed and tested is requirements-cpu-py311.txt."
        )
    lines = [
        f"{name}{'===' if name == 'torch' else '=='}{version}" for name, version in pins.items()
    ]
    path.write_text("\n".join(header + lines) + "\n")
    print(f"{path.name}: {len(pins)} packages")


if __name__ == "__main__":
    main()
