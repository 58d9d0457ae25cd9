"""All that is to be measured on a GPU, in parts, the most valuable first.

    .venv/bin/python benchmarks/gpu.py --json FILE [--parts grpo,demo] [--device cpu] [--small]

FILE has what each part found (`parts.NAME`, with `ok` and `seconds`) as soon as it is there.
Models, data, runs and what each part printed lie beside it in a folder of the same name, with which
a second call goes on. A part's name stands also for those that begin with it: demo for demo/sft and
its kin. Every part has four minutes. docs/gpu.md says what was seen.

`--small` runs all of it with tiny models and few steps, two parts at a time, to try the
measurements themselves: with `--device cpu` before there is a GPU. Recipes that differ from others
here by sizes alone are then only checked.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run as a script, Python looks beside it alone

from benchmarks.gpu_parts import PARTS  # noqa: E402

LIMIT_S = 240.0  # for one part
GRACE_S = 15.0  # to end after being asked to
TAIL = 2000  # characters of what a failed part printed


class Report:
    """What was found so far, in a file that is whole at any time."""

    def __init__(self, file: Path, device: str, small: bool) -> None:
        self.file = file
        self.lock = threading.Lock()
        self.found: dict[str, Any] = {"device": device, "small": small, "parts": {}}

    def add(self, name: str, found: dict[str, Any]) -> None:
        with self.lock:
            self.found["parts"][name] = found
            half = self.file.with_suffix(".half")
            half.write_text(json.dumps(self.found, indent=1) + "\n", encoding="utf-8")
            half.replace(self.file)
        why = "" if found["ok"] else f": {found['why']}"
        print(f"{name}: {found['seconds']:.0f} s, ok {found['ok']}{why}", flush=True)


def measure(names: list[str], folder: Path, options: argparse.Namespace, report: Report) -> None:
    """Run parts one after the other in a process of their own, which ends when their time is up."""
    for name in names:
        (folder / "found" / f"{name}.json").unlink(missing_ok=True)
    log = folder / f"{names[0].replace('/', '-')}.log"
    command = [sys.executable, str(Path(__file__).with_name("gpu_parts.py")), str(folder), *names]
    command += [f"--device={options.device}", *(["--small"] if options.small else [])]
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    environment["HF_HUB_OFFLINE"] = "1"  # models and data are made here
    began = time.monotonic()
    with log.open("w") as said:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=said, stderr=subprocess.STDOUT, env=environment
        )
        late = not ended(process, LIMIT_S)
    why = f"took longer than {LIMIT_S:.0f} s" if late else f"ended with {process.returncode}"
    for name in names:
        file = folder / "found" / f"{name}.json"
        lost = {"ok": False, "why": why, "seconds": time.monotonic() - began}
        found = json.loads(file.read_text()) if file.exists() else lost
        report.add(name, found if found["ok"] else {**found, "tail": tail(log, name)})


def ended(process: subprocess.Popen[bytes], limit_s: float) -> bool:
    """Wait for a process; one that takes too long is ended, with all that it started. Return
    whether it ended in time.
    """
    try:
        process.wait(limit_s)
        return True
    except subprocess.TimeoutExpired:
        started = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)  # a run then stops its processes itself
    psutil.wait_procs([psutil.Process(process.pid)], GRACE_S)
    for left in [process, *started]:
        try:
            left.kill()
        except psutil.NoSuchProcess:
            continue
    process.wait()
    return False


def tail(log: Path, name: str) -> str:
    """Return the end of what a part printed."""
    text = log.read_text(errors="replace").partition(f"== {name}\n")[2]
    return text.partition("\n== ")[0][-TAIL:]


def chosen(wanted: str) -> list[str]:
    """Return the parts that are asked for, in their order; all for no names."""
    asked = [name.strip() for name in wanted.split(",") if name.strip()]
    for name in asked:
        if not any(f"{part}/".startswith(f"{name}/") for part in PARTS):
            raise SystemExit(f"--parts: there is no {name}, but {', '.join(PARTS)}")
    return [
        part
        for part in PARTS
        if not asked or any(f"{part}/".startswith(f"{name}/") for name in asked)
    ]


def lanes(names: list[str]) -> list[list[str]]:
    """Return parts as two rows that run at the same time: the demo's, which need each other, with
    some that take about as long as the others do, and the others.
    """
    demo = ("demo/", "sync/")
    first = [name for name in names if not name.startswith(demo)]
    second = [name for name in names if name.startswith(demo)]
    return [lane for lane in (first, second) if lane]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, required=True, help="file for what is found")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--parts", default="", help=f"some of {', '.join(PARTS)}; default: all")
    parser.add_argument("--small", action="store_true", help="tiny models and few steps")
    options = parser.parse_args()
    names = chosen(options.parts)
    folder = options.json.resolve().with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    report = Report(options.json.resolve(), options.device, options.small)
    rows = lanes(names) if options.small else [[name] for name in names]
    with ThreadPoolExecutor(2 if options.small else 1) as pool:
        list(pool.map(lambda row: measure(row, folder, options, report), rows))
    failed = [name for name, found in report.found["parts"].items() if not found["ok"]]
    print(f"{len(names) - len(failed)} of {len(names)} parts ok: {options.json}")


if __name__ == "__main__":
    main()
