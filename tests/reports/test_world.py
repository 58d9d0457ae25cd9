"""Reports of what surrounds a run: modules, launchers, paths, disks, signals, engines. Each test
names the report that it comes from.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from actors.engine.arguments import in_our_words
from actors.run.folder import RunFolder
from actors.run.stop import Left, catch_stop_signals, hold_signals, stepping, stop_requested
from actors.run.trial import no_new_folder, wandb_problem
from actors.settings import RunSettings
from launch import cli
from launch.demo.demo import RECIPES
from learners.errors import UserError
from learners.launchers import clear_foreign_launchers
from learners.naming import load_named
from learners.settings import on_disk

ROOT = Path(__file__).parents[2]
HIDDEN = ("actors", "random", "typing", "ray", "torch", "queue", "datasets/__init__")


@pytest.fixture
def traps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder, the current one, whose modules have the names of ours, Python's and installed
    ones.
    """
    for name in HIDDEN:
        file = tmp_path / f"{name}.py"
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"raise RuntimeError('the user\\'s {name} was imported')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


# --- modules --------------------------------------------------------------------------------------


def test_modules_beside_the_recipe_hide_nobody_from_the_command_line(traps: Path) -> None:
    """ray-project/ray #2515, komikndr/raylight #43: which module a process gets depends on its
    sys.path.
    """
    done = subprocess.run(
        [sys.executable, "-m", "launch", "ppo", "none.yaml"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert (done.returncode, done.stderr) == (2, "error: none.yaml: no such recipe file\n")


def test_a_process_that_has_another_module_says_which(traps: Path) -> None:
    """No public report known to us of one that was named."""
    (traps / "actors.py").write_text("")
    code = (
        "import actors\nfrom learners.imports import settle_imports\n"
        f"settle_imports({str(ROOT)!r}, '')"
    )
    path = os.pathsep.join((str(traps), str(ROOT)))
    (traps / "typing.py").unlink()
    (traps / "random.py").unlink()
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": path}
    )
    assert f"actors was loaded from {traps / 'actors.py'}, which hides Quatuor's own" in done.stderr


def test_a_function_in_a_file_named_like_a_module_is_refused_by_name(
    traps: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ray-project/ray #40046, #5235: the module that is found is not the user's."""
    with pytest.raises(UserError, match=r"the module random is .*random.py, which goes before"):
        load_named("random:score", "reward function")
    with pytest.raises(UserError, match=r"has no attribute 'score' \(it is .*colorsys.py\)"):
        load_named("colorsys:score", "reward function")


def test_a_users_own_function_and_a_copy_of_ours_are_found(
    traps: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No public report known to us."""
    (traps / "only_mine.py").write_text("def score(prompts, responses):\n    return []\n")
    assert load_named("only_mine:score", "reward function")([], []) == []
    task = traps / "launch" / "tasks" / "unique_digits.py"
    task.parent.mkdir(parents=True)
    task.write_text((ROOT / "launch" / "tasks" / "unique_digits.py").read_text())
    assert load_named("launch.tasks.unique_digits:exact_match", "reward function")


def package(folder: Path, name: str, text: str = "def score(*_):\n    return []\n") -> Path:
    """An installed package that a user's file has the name of."""
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(text)
    return folder


@pytest.mark.parametrize(
    "reward",
    [
        {"my_reward.py": "from {0} import score"},
        {"my_reward.py": "from my_reward_helper import score", "my_reward_helper.py": "import {0}"},
        {"my_reward.py": "def score(*_):\n    from {0} import score"},
        {"my_reward/__init__.py": "from .within import score", "my_reward/within.py": "import {0}"},
    ],
    ids=["itself", "through another", "when called", "in a package"],
)
def test_a_helper_beside_the_recipe_that_is_another_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reward: dict[str, str]
) -> None:
    """ray-project/ray #40046: the module that is found is not the user's; here one of those that
    the function imports.
    """
    name = f"examples_{time.time_ns()}"
    here = tmp_path / "here"
    for file, text in {**reward, f"{name}.py": "def score(*_):\n    return [1.0]\n"}.items():
        (here / file).parent.mkdir(parents=True, exist_ok=True)
        (here / file).write_text(text.format(name))
    monkeypatch.chdir(here)
    installed = package(tmp_path / "site-packages", name)
    monkeypatch.setattr(sys, "path", [*sys.path, str(installed)])
    known = set(sys.modules)
    try:
        with pytest.raises(
            UserError,
            match=rf"the module {name} is {installed}/{name}/__init__.py, which goes before "
            rf"{here}/{name}.py: rename that \(my_reward.* imports it\)",
        ):
            load_named("my_reward:score", "reward function")
    finally:
        for module in sys.modules.keys() - known:
            del sys.modules[module]


def test_a_module_that_others_import_is_theirs(
    traps: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The user's `random` and `queue` are not what an installed package means. No public report
    known to us.
    """
    name = f"installed_{time.time_ns()}"
    text = "import random, queue\ndef score(*_):\n    return []\n"
    folder = package(tmp_path_factory.mktemp("lib") / "site-packages", name, text)
    monkeypatch.setattr(sys, "path", [*sys.path, str(folder)])
    (traps / f"uses_{name}.py").write_text(f"from {name} import score")
    assert load_named(f"uses_{name}:score", "reward function")() == []
    assert load_named(f"{name}:score", "reward function")() == []


def test_the_folder_of_the_start_is_a_workers_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ray-project/ray #2515: the current folder of a Ray process is another one."""
    name = f"mine_{time.time_ns()}"
    (tmp_path / f"{name}.py").write_text("def score(*_):\n    return []\n")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr("learners.naming.started_in", str(tmp_path))
    assert load_named(f"{name}:score", "reward function")() == []


# --- signals --------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def not_under_nohup() -> Iterator[None]:
    """The tests themselves may be run with SIGHUP ignored, which children inherit."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def test_a_signal_before_the_first_step_ends_the_run_at_once() -> None:
    """NVIDIA-NeMo/Automodel #405, Lightning-AI/pytorch-lightning #1455: SIGTERM unanswered."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        with pytest.raises(Left, match=f"stopped by {number.name}") as left, catch_stop_signals():
            os.kill(os.getpid(), number)
        assert left.value.code == 128 + number


def test_a_signal_waits_for_its_step_and_its_echo_changes_nothing() -> None:
    """goodfire-ai/spd #741: the signal was only answered in one of several loops. `timeout` sends
    every signal twice.
    """
    with catch_stop_signals():
        stepping()
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop_requested() == signal.SIGTERM


def test_a_repeated_signal_starts_no_second_watcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """The script of a batch job repeats SIGUSR1, and then asks to leave. No public report known to
    us.
    """
    monkeypatch.setattr("actors.run.stop.ECHO_S", 0.1)
    before = set(threading.enumerate())
    with pytest.raises(Left, match="SIGTERM"), catch_stop_signals():
        stepping()
        os.kill(os.getpid(), signal.SIGUSR1)
        for _ in range(4):
            time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGUSR1)
        assert len(set(threading.enumerate()) - before) == 1
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_second_signal_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    """PrimeIntellect-ai/prime-rl #2664: there is time for a checkpoint, or there is none."""
    monkeypatch.setattr("actors.run.stop.ECHO_S", 0.0)
    with pytest.raises(Left, match="SIGHUP"), catch_stop_signals():
        stepping()
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGHUP)


def test_what_was_ignored_stays_so_and_handlers_come_back() -> None:
    """nohup. No public report known to us."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with catch_stop_signals():
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_while_ray_starts_is_answered_afterwards(
    capfd: pytest.CaptureFixture[str],
) -> None:
    """ray-project/ray #1005: how a driver is ended decides what is left. Ray's own handler prints a
    trace, which is dropped.
    """
    with pytest.raises(Left), catch_stop_signals(), hold_signals():
        signal.signal(signal.SIGTERM, lambda *_: None)
        os.kill(os.getpid(), signal.SIGHUP)
        os.write(2, b"*** SIGTERM received ***")
    assert capfd.readouterr().err == ""


def test_a_run_outlives_its_terminal() -> None:
    """SIGHUP: the terminal is gone, and so is what reads a pipe. No public report known to us."""
    code = (
        "import os, sys\nfrom launch.cli import outlive_terminal\noutlive_terminal()\n"
        "sys.stdin.readline()\nprint('x' * 100000, flush=True)\n"
        "print('y', file=sys.stderr)\nos._exit(7)"
    )
    run = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert run.stdin and run.stdout and run.stderr
    run.stdout.close()
    run.stderr.close()
    run.stdin.write(b"\n")
    run.stdin.close()
    assert run.wait() == 7


# --- start and removal ----------------------------------------------------------------------------


def settings(folder: Path, **changes: Any) -> RunSettings:
    return RunSettings(folder=str(folder), tensorboard=False, progress=False, **changes)


@pytest.mark.parametrize("below", ["", "run/deep"])
def test_a_run_folder_at_a_dangling_link_is_refused(tmp_path: Path, below: str) -> None:
    """No public report known to us."""
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match="link is a link to .*gone, which does not exist"):
        RunFolder.open(settings(tmp_path / "link" / below), "")
    assert "which does not exist" in no_new_folder(tmp_path / "link" / below)


def test_a_run_folder_on_a_read_only_place_is_refused() -> None:
    """h2oai/h2o-llmstudio #214: the place of the output was not the one that was looked at."""
    assert "cannot be made" in no_new_folder(Path("/proc/here/run"))


def test_what_a_failed_start_made_is_removed(tmp_path: Path) -> None:
    """No public report known to us."""
    (tmp_path / "mine").mkdir()
    with pytest.raises(RuntimeError), RunFolder.open(settings(tmp_path / "a/b/run"), ""):
        raise RuntimeError("an engine did not start")
    with pytest.raises(RuntimeError), RunFolder.open(settings(tmp_path / "mine/run"), "") as run:
        run.log(0, {"seconds/start": 1.0}, phase="start")
        raise RuntimeError("nor did this one")
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]
    with pytest.raises(RuntimeError), RunFolder.open(settings(tmp_path / "run"), "") as run:
        run.log(1, {"loss": 1.0})
        raise RuntimeError("after a step")
    assert (tmp_path / "run" / "metrics.jsonl").exists()


def test_wandb_without_a_key_is_found_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No public report known to us. wandb cannot be installed here: a module stands for it."""
    (tmp_path / "wandb.py").write_text(
        "def init(**_):\n    raise RuntimeError('no such project')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("NETRC", "WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    assert "wandb login" in wandb_problem()
    with pytest.raises(UserError, match=r"run.wandb_project: no key"):
        RunFolder.check(settings(tmp_path / "run", wandb_project="p"), resume=False)
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password x\n")
    assert wandb_problem() == ""
    with pytest.raises(UserError, match="does not take the run: no such project"):
        RunFolder.open(settings(tmp_path / "run", wandb_project="p"), "")
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv("WANDB_MODE", "offline")
    (tmp_path / ".netrc").unlink()
    assert wandb_problem() == ""


def test_wandb_on_a_server_of_ones_own_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No public report known to us. `wandb login --host` keeps the address in its settings."""
    (tmp_path / "wandb.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name in ("NETRC", "WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_CONFIG_DIR"):
        monkeypatch.delenv(name, raising=False)
    settings = tmp_path / ".config" / "wandb" / "settings"
    settings.parent.mkdir(parents=True)
    settings.write_text("[default]\nbase_url = https://Wandb.us.example:8080/\n")
    assert "Weights & Biases at wandb.us.example is here" in wandb_problem()
    (tmp_path / ".netrc").write_text("machine api.wandb.ai\n  login user\n  password x\n")
    assert "wandb.us.example" in wandb_problem()
    (tmp_path / ".netrc").write_text("machine Wandb.us.example\n  login user\n  password x\n")
    assert wandb_problem() == ""
    monkeypatch.setenv("WANDB_BASE_URL", "http://other.example")
    assert "other.example" in wandb_problem()
    monkeypatch.setenv("WANDB_ANONYMOUS", "must")
    assert wandb_problem() == ""


# --- disk -----------------------------------------------------------------------------------------


@contextmanager
def small_files() -> Iterator[None]:
    """No file of this process may grow beyond 4 KiB: what a full disk says, without one. Only
    around a write: the tests' own report is a file too.
    """
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)


def storage_error(folder: Path, write: Callable[[], None]) -> str:
    from actors.run.outcome import StorageError, accounted_for

    with pytest.raises(StorageError) as told, accounted_for(str(folder)), small_files():
        write()
    assert "\n" not in str(told.value)
    return str(told.value)


def test_a_log_that_cannot_grow_names_path_and_remedy(tmp_path: Path) -> None:
    """pytorch/pytorch #10577: a saturated disk said Input/output error, without a path."""
    run = tmp_path / "run"
    (run / "checkpoints" / "step-000004").mkdir(parents=True)

    def write() -> None:
        with (run / "metrics.jsonl").open("a") as file:
            file.write("x" * 8192)

    told = storage_error(run, write)
    assert f"{run}: File too large: free some space there" in told
    assert told.endswith("--resume goes on from step 4")


def test_torch_and_safetensors_in_other_words(tmp_path: Path) -> None:
    """innnky/so-vits-svc #46 and returnn #1829: `unexpected pos`, `PytorchStreamWriter failed`."""
    import torch
    from safetensors.torch import save_file

    weights = {"w": torch.zeros(4096)}
    for write in (
        lambda: torch.save(weights, tmp_path / "w.pt"),
        lambda: save_file(weights, tmp_path / "w.safetensors"),
    ):
        told = storage_error(tmp_path, write)
        assert str(tmp_path) in told and "free some space" in told
        assert told.endswith("no checkpoint was saved")


def test_a_signal_while_the_folder_is_made_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No public report known to us: a run ended while TensorBoard is imported blocks the next."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(RunFolder, "_open_tensorboard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        RunFolder.open(RunSettings(folder=str(tmp_path / "deep" / "run")), "")
    assert not list(tmp_path.iterdir())


def test_an_error_of_another_file_is_not_taken_for_ours(tmp_path: Path) -> None:
    """No public report known to us."""
    from actors.cluster.groups import WorkerError
    from actors.run.outcome import disk_trouble

    assert disk_trouble(FileNotFoundError(errno.ENOENT, "No such file", "/data/x"), tmp_path) == ""
    assert disk_trouble(ValueError("unexpected position of a token"), tmp_path) == ""
    # in a worker, of a file that is not the run's: that file is named, and nothing of the run's
    shared = OSError(errno.ENOSPC, "No space left on device", "/dev/shm/nccl-abc")
    told = WorkerError(f"learn: actor[0] on node gpu failed: {shared!r}\nTraceback: {shared}")
    told.__cause__ = shared
    line = disk_trouble(told, tmp_path)
    assert line.startswith("learn: actor[0] on node gpu: /dev/shm/nccl-abc: No space left")
    assert str(tmp_path) not in line
    # what only stands in a worker's traceback is nothing that is known
    told = WorkerError("learn: x failed: OSError('Read-only file system')")
    assert disk_trouble(told, tmp_path) == ""


def test_a_traceback_that_cannot_be_written_is_no_second_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No public report known to us: the handler of the first failure failed itself."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "error.log").symlink_to("/dev/full")
    module = type(sys)("runner_of_world")
    module.run = lambda: 1 / 0  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "runner_of_world", module)
    for folder, where in (
        (tmp_path / "run", "cannot be written: No space"),
        (tmp_path / "no", "no.error.log"),
    ):
        with pytest.raises(cli.typer.Exit):
            cli.guarded(folder, False, "runner_of_world", "run")
        told = capsys.readouterr().err
        assert told.startswith("error: division by zero") and where in told
        assert len(told.splitlines()) == 1
    assert "ZeroDivisionError" in (tmp_path / "no.error.log").read_text()


# --- engines --------------------------------------------------------------------------------------


@pytest.mark.engines  # vLLM is imported
def test_vllms_words_become_the_recipes() -> None:
    """OpenRLHF/OpenRLHF #336, vllm-project/vllm #2418, hiyouga/LlamaFactory #6472."""
    from vllm.v1.core.kv_cache_utils import _check_enough_kv_cache_memory as check

    with pytest.raises(ValueError) as refused:
        check(2**29, lambda: 2**30, 8192, lambda _: 4096)
    told = str(in_our_words(refused.value, "cpu"))
    assert told == (
        "generation.kv_cache_gib: the KV cache has 0.5 GiB, and one sequence of 8192 tokens needs "
        "1.0 GiB: raise it to 1.01, or lower generation.max_model_tokens to 4096"
    )
    assert "generation.gpu_memory_fraction: the KV" in str(in_our_words(refused.value, "cuda"))
    with pytest.raises(ValueError) as none:
        check(0, lambda: 1, 1, lambda _: 1)
    told = str(in_our_words(none.value, "cuda"))
    assert told.startswith("generation.gpu_memory_fraction: vLLM cannot start: No available memory")
    assert "gpu_memory_utilization" not in told
    assert in_our_words(ValueError("no such architecture"), "cpu") is None


# --- launchers, paths -----------------------------------------------------------------------------


def test_foreign_launchers_are_cleared(monkeypatch: pytest.MonkeyPatch) -> None:
    """deepspeedai/DeepSpeed #461 and #1164, Lightning-AI/pytorch-lightning #13567."""
    names = [
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "PMI_RANK",
        "PMIX_RANK",
        "MV2_COMM_WORLD_SIZE",
        "LOCAL_RANK",
        "RANK",
        "WORLD_SIZE",
        "LOCAL_SIZE",
        "LOCAL_WORLD_SIZE",
        "GROUP_RANK",
        "TORCHELASTIC_RUN_ID",
        "MASTER_ADDR",
        "MASTER_PORT",
        "CROSS_RANK",
        "CROSS_SIZE",
    ]
    kept = [
        "SLURM_JOB_ID",
        "CUDA_VISIBLE_DEVICES",
        "NCCL_SOCKET_IFNAME",
        "FRANK",
        "MASTER",
        "CROSS_COMPILE",
    ]
    for name in (*names, *kept):
        monkeypatch.setenv(name, "2")
    clear_foreign_launchers()
    assert not set(names) & os.environ.keys() and set(kept) <= os.environ.keys()


def test_an_export_is_no_process_of_a_launcher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """deepspeedai/DeepSpeed #461: what is imported believes the variables."""
    from launch.export import export_model

    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_RANK", "2")
    checkpoint = tmp_path / "step-000001"
    for file in ("learner/layout.json", "model_files/config.json", "run_folder.json"):
        (checkpoint / file).parent.mkdir(parents=True, exist_ok=True)
        (checkpoint / file).write_text("{}")
    monkeypatch.setitem(sys.modules, "learners.weights", None)  # DeepSpeed is not waited for
    with pytest.raises(ImportError):
        export_model(checkpoint, tmp_path / "out")
    assert "OMPI_COMM_WORLD_LOCAL_RANK" not in os.environ


def test_paths_are_expanded_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No public report known to us."""
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.delenv("NOWHERE", raising=False)
    assert on_disk("$SCRATCH/a") == on_disk("${SCRATCH}/a") == "/scratch/me/a"
    assert on_disk("~/$SCRATCH") == "/home/me//scratch/me"
    assert [on_disk(p) for p in ("cost$", "a$1", "a/${", "org/name")] == [
        "cost$",
        "a$1",
        "a/${",
        "org/name",
    ]
    for path, told in (
        ("$NOWHERE/a", "the variable NOWHERE is not set"),
        ("${NOWHERE}/a", "the variable NOWHERE is not set"),
        ("~nobody-at-all/a", "there is no user nobody-at-all"),
    ):
        with pytest.raises(ValueError, match=told):
            on_disk(path)
    monkeypatch.chdir(tmp_path)
    Path("$NOWHERE").mkdir()
    assert on_disk("$NOWHERE") == "$NOWHERE"


def test_an_unset_variable_is_one_line_with_its_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No public report known to us."""
    monkeypatch.delenv("NOWHERE", raising=False)
    assert cli.main(["sft", str(RECIPES / "demo_sft.yaml"), "run.folder=$NOWHERE/a"]) == 2
    told = capsys.readouterr().err
    assert "command line: run.folder: $NOWHERE/a: the variable NOWHERE is not set" in told


# --- real runs ------------------------------------------------------------------------------------


def processes_of(marker: str) -> list[int]:
    """Return the processes whose environment has the marker."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if marker.encode() in (process / "environ").read_bytes():
                found.append(int(process.name))
        except OSError:
            continue
    return found


def begin(folder: Path, *options: str) -> tuple[subprocess.Popen[str], str]:
    """Start an SFT run of many steps in `folder`, as mpirun would; return it and its marker."""
    marker = f"WORLD_TEST={time.time_ns()}"
    overrides = [
        "learner.model.path=base",
        "data.path=sft.jsonl",
        "held_out=null",
        "train.steps=100000",
        "learner.ranks=1",
        "learner.optimizer.warmup_steps=2",
        "run.folder=run",
        "run.tensorboard=false",
    ]
    foreign = {"OMPI_COMM_WORLD_LOCAL_RANK": "2", "LOCAL_SIZE": "x", "MASTER_PORT": "1"}
    name, _, value = marker.partition("=")
    run = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "launch",
            "sft",
            str(RECIPES / "demo_sft.yaml"),
            *overrides,
            *options,
        ],
        cwd=folder,
        text=True,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        env={**os.environ, **foreign, name: value, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )
    return run, marker


def nothing_left(marker: str) -> bool:
    until = time.monotonic() + 10
    while (left := processes_of(marker)) and time.monotonic() < until:
        time.sleep(0.2)
    return not left


def wait_for(step: int, run: subprocess.Popen[str], file: Path) -> None:
    until = time.monotonic() + 90
    while not file.exists() or f'"step": {step},' not in file.read_text():
        assert run.poll() is None and time.monotonic() < until, run.communicate()[1]
        time.sleep(0.1)


@pytest.mark.engines
@pytest.mark.timeout(180)
def test_a_run_among_traps_is_stopped_and_resumed(traps: Path) -> None:
    """All at once: modules with others' names beside the recipe, mpirun's variables (DeepSpeed
    #461), SIGTERM to the whole process group in a step (NeMo Automodel #405), and SIGHUP before the
    first step of the resumed run (ray-project/ray #2005: processes were left).
    """
    from launch.tasks import unique_digits as task

    task.make_tokenizer(traps / "base")
    task.make_model(traps / "base", 0)
    task.write_rows(traps / "sft.jsonl", task.make_demonstrations(200, 0))
    run, marker = begin(traps)
    wait_for(2, run, traps / "run" / "metrics.jsonl")
    os.killpg(run.pid, signal.SIGTERM)
    told = run.communicate(timeout=60)[1].splitlines()
    assert run.returncode == 75 and "(SIGTERM); checkpoint saved" in told[-1], told
    assert nothing_left(marker)
    (saved,) = (traps / "run" / "checkpoints").iterdir()
    lines = [json.loads(x) for x in (traps / "run" / "metrics.jsonl").read_text().splitlines()]
    assert saved.name == f"step-{lines[-1]['step']:06d}"
    before = sorted((p, p.stat().st_mtime_ns) for p in (traps / "run").rglob("*"))

    run, marker = begin(traps, "--resume")
    until = time.monotonic() + 60
    while not any("raylet" in title(pid) for pid in processes_of(marker)):
        assert run.poll() is None and time.monotonic() < until
        time.sleep(0.1)
    run.send_signal(signal.SIGHUP)
    told = run.communicate(timeout=60)[1].splitlines()
    step = lines[-1]["step"]
    assert told == [f"stopped by SIGHUP; --resume goes on from step {step}"]
    assert run.returncode == 129 and nothing_left(marker)
    assert sorted((p, p.stat().st_mtime_ns) for p in (traps / "run").rglob("*")) == before


def title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""


@pytest.mark.engines
def test_an_engine_without_room_names_the_recipes_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vllm-project/vllm #2418. VLLM_CPU_KVCACHE_SPACE of the environment does not replace the
    recipe's.
    """
    from actors.engine.engine import GenerationEngine
    from actors.settings import GenerationSettings
    from learners.settings import ModelSettings
    from tests.actors.tiny_models import MAX_TOKENS, save_model

    save_model(tmp_path, seed=0, tied=True)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    small = GenerationSettings(kv_cache_gib=0.00001, max_concurrent=8, threads=1)
    with pytest.raises(UserError, match=r"^generation.kv_cache_gib: .* `generation.kv_cache_gib`"):
        GenerationEngine(ModelSettings(path=str(tmp_path)), small, "cpu", MAX_TOKENS, [])


class Writer:
    """Writes where there is no room, in a process of its own."""

    def plainly(self) -> None:
        with open("/dev/full", "w") as file:
            file.write("x" * 9000)

    def torches(self) -> None:
        import torch

        torch.save({"w": torch.zeros(9000)}, "/dev/full")


@pytest.mark.engines
def test_a_full_disk_in_a_worker_is_one_line(tmp_path: Path, cluster: None) -> None:
    """zai-org/ChatGLM-6B #1166: save_checkpoint ended in `PytorchStreamWriter failed`."""
    from actors.cluster.groups import WorkerGroup
    from actors.cluster.placement import environment

    options = {"num_cpus": 1, "runtime_env": {"env_vars": environment("cpu", 1)}}
    group = WorkerGroup("writer", f"{__name__}:Writer", [options])
    group.gather(group.start({}, 60), "start", 60)
    for method, said in (("plainly", "No space left on device"), ("torches", "to its end")):

        def write(method: str = method) -> None:
            group.call(method, phase="checkpoint", deadline_s=60)

        told = storage_error(tmp_path, write)
        assert told.startswith("checkpoint: writer[0] on node ") and said in told, told
        assert "free some space there" in told and str(tmp_path) in told
