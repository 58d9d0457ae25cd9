"""`quatuor submit`: a recipe as a job of a Ray cluster.

Ray's job server takes a zip of this checkout and the recipe, unpacks it on every node of the job,
runs the driver on the cluster, and hands back its log and exit code. Paths in a job are relative to
what was shipped; whatever the run reads or writes beyond that needs an absolute path on storage
that every node sees.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import logging
import os
import re
import secrets
import shlex
import signal
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.run.progress import say
from actors.run.resume import Resume
from actors.settings import Recipe
from launch.recipe.document import Document, flat
from launch.recipe.machine import is_local
from launch.recipe.read import RecipeError, located, read_recipe
from learners.errors import Problem, UserError, in_a_line
from learners.settings import VARIABLE

ROOT = Path(__file__).resolve().parents[2]
FOLDER = "submitted"  # where a job finds its recipe
IGNORE_FILES = (".gitignore", ".rayignore")
NEVER_SHIPPED = (
    ".git",
    "/.venv*/",
    "/runs/",
    "/build/",
    "*.egg-info/",
    "__pycache__/",
    ".*_cache/",
)
MOST_MIB = 100  # what Ray's job server takes

CONNECT_S = 5.0  # to find a job server; one request to it
ANSWER_S = 60.0
POLL_S = 2.0  # following a job
LAST_LINES_S = 10.0
LOST_S = 60.0
END_S = 30  # a stopped driver's time to end by itself, and ours to see it ended
STOP_S = 45.0
FAILED = 1
NOT_FOUND = 127
INTERRUPTED = 130


def submit_job(
    kind: str, path: Path, overrides: Sequence[str], address: str, resume: Resume | None
) -> int:
    """Ship, run and follow; returns the driver's exit code, 130 when interrupted. Raises UserError
    before anything is sent when the job could not work, or nobody answers at `address`.
    """
    recipe, document = read_recipe(path, overrides, kind)
    if not address.startswith(("http://", "https://")):
        raise UserError(
            f"--address: {address} is not the URL of a job server, such as http://head:8265"
        )
    if not (ROOT / "pyproject.toml").is_file():
        raise UserError(
            f"submit ships a checkout, and {ROOT} is none: install with make install and run it "
            "from there"
        )
    files = list(shipped_files(ROOT))
    if problems := [
        *(located(p, document) for p in home_problems(document)),
        *(located(p, document) for p in path_problems(recipe, files)),
        *shadowing_problems(files, installed_modules()),
        *size_problems(sizes(ROOT, files)),
    ]:
        raise RecipeError(problems)
    client = connect(address)
    job = f"quatuor-{kind}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "checkout.zip"
        pack(ROOT, files, path, package)
        return run_job(client, job, entrypoint(kind, path.name, overrides, resume), package)


# --- what is shipped ------------------------------------------------------------------------------


def shipped_files(root: Path) -> Iterator[str]:
    """Yield the files of the checkout, relative to it: all but what git or Ray are told to ignore,
    and what is made here.
    """
    from pathspec import GitIgnoreSpec

    def walk(folder: Path, rules: list[tuple[Path, Any]]) -> Iterator[str]:
        lines = [
            line
            for f in IGNORE_FILES
            if (folder / f).is_file()
            for line in (folder / f).read_text().splitlines()
        ]
        rules = [*rules, (folder, GitIgnoreSpec.from_lines(lines))] if lines else rules
        for entry in sorted(folder.iterdir()):
            slash = "/" if entry.is_dir() else ""
            if any(rule.match_file(f"{entry.relative_to(base)}{slash}") for base, rule in rules):
                continue
            if entry.is_file():
                yield str(entry.relative_to(root))
            elif slash and not entry.is_symlink():
                yield from walk(entry, rules)

    yield from walk(root, [(root, GitIgnoreSpec.from_lines(NEVER_SHIPPED))])


def sizes(root: Path, files: Iterable[str]) -> dict[str, int]:
    return {name: (root / name).stat().st_size for name in files}


def size_problems(sizes: Mapping[str, int], most_mib: float = MOST_MIB) -> Iterator[str]:
    """Yield a problem if the job server will not take it; it refuses after the upload, in words of
    HTTP.
    """
    total = sum(sizes.values()) / 2**20
    if total > most_mib:
        largest = sorted(sizes, key=lambda name: -sizes[name])[:3]
        listed = ", ".join(f"{name} ({sizes[name] / 2**20:.0f} MiB)" for name in largest)
        yield (
            f"the checkout has {total:.0f} MiB to ship, and Ray's job server takes "
            f"{most_mib:.0f}; largest: {listed}: "
            "move them to storage that every node sees, or name them in .gitignore or .rayignore"
        )


def installed_modules() -> dict[str, str]:
    """Return importable names that are not the checkout's own, each with where it comes from."""
    installed = {
        module: f"the installed package {packages[0]}"
        for module, packages in importlib.metadata.packages_distributions().items()
        if set(packages) != {"quatuor"}
    }
    return installed | dict.fromkeys(sys.stdlib_module_names, "Python's own module")


def shadowing_problems(files: Iterable[str], installed: Mapping[str, str]) -> Iterator[str]:
    """Yield names of the checkout that hide those of packages: it comes first on the path of every
    process of a job.
    """
    for name in files:
        found = re.fullmatch(r"(\w+)(\.py|/__init__\.py)", name)
        if found and found[1] in installed:
            hidden = f"{installed[found[1]]} ({found[1]})"
            yield f"{name} would hide {hidden} from every process of the job: rename it"


def home_problems(document: Document) -> Iterator[Problem]:
    """Yield paths with `~` or variables, which are expanded where the recipe is read: a job reads
    it as another user on another machine.
    """
    for key, value in flat(document.values).items():
        path = key.endswith((".path", ".folder"))
        if isinstance(value, str) and (value.startswith("~") or (path and VARIABLE.search(value))):
            yield Problem(
                (key,), f"{value} is another folder where the job runs; give an absolute path"
            )


def path_problems(recipe: Recipe, files: Sequence[str]) -> Iterator[Problem]:
    """Yield paths that mean nothing in a job, or something that is lost with it."""
    where = "give an absolute path on storage that every node sees"
    folder = recipe.run.folder
    if not os.path.isabs(folder):
        lost = "a job would write it into a temporary folder that is lost with it"
        yield Problem(("run.folder",), f"{folder} is relative: {lost}; {where}")
    shipped = {str(p) for name in files for p in (Path(name), *Path(name).parents)}
    for key, value in flat(recipe.model_dump(mode="json")).items():
        if not isinstance(value, str):
            continue
        here = is_local(value) and os.path.normpath(value) not in shipped
        if key.endswith(".path") and here and not os.path.isabs(value):
            message = "is relative and not among the files that are shipped"
            yield Problem((key,), f"{value} {message}; {where}")
        top, colon, _ = value.partition(":")
        top = top.partition(".")[0]
        names = {f"{top}.py", top}
        code = key.endswith(".function") or (key == "algorithm.kind" and colon)
        if code and not names & shipped and any(map(os.path.exists, names)):
            message = "is here, but not among the files that are shipped"
            yield Problem((key,), f"{top} {message}; put it into {ROOT}")


def pack(root: Path, files: Iterable[str], recipe: Path, package: Path) -> None:
    """Write the zip that Ray unpacks on every node of the job: the checkout, and the recipe
    wherever it lies.
    """
    with zipfile.ZipFile(package, "w", zipfile.ZIP_DEFLATED, strict_timestamps=False) as archive:
        for name in files:
            if Path(name).parts[0] != FOLDER:
                archive.write(root / name, name)
        archive.write(recipe, f"{FOLDER}/{recipe.name}")


def entrypoint(kind: str, recipe: str, overrides: Sequence[str], resume: Resume | None) -> str:
    """Return what the cluster's shell runs, in the unpacked checkout, with the Python that is on
    its PATH.
    """
    options = resume.options if resume else []
    command = ["python", "-m", "launch", kind, *options, f"{FOLDER}/{recipe}"]
    return shlex.join([*command, *overrides, "cluster.address=auto"])


# --- the job --------------------------------------------------------------------------------------


def connect(address: str) -> Any:
    """Return Ray's client of the job server; every request has a time limit, which Ray's own has
    not.
    """
    for variable in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        os.environ.pop(variable, None)  # either would win over the address asked for
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    for module in ("dashboard_sdk", "job.sdk"):  # they tell of packages and sockets
        logging.getLogger(f"ray.dashboard.modules.{module}").setLevel(logging.WARNING)

    class Client(JobSubmissionClient):
        answer_s = CONNECT_S

        def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
            return super()._do_request(
                method, endpoint, timeout=(CONNECT_S, self.answer_s), **options
            )

    try:
        client = Client(address)
        client.answer_s = ANSWER_S
        return client
    except AuthenticationError as error:
        remedy = "set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the cluster's token"
        raise UserError(f"--address: {address}: {in_a_line(error).rstrip('.')}; {remedy}") from None
    except Exception as error:  # whatever is there, it is not Ray's job server
        raise UserError(
            f"--address: no Ray job server answers at {address}: {in_a_line(error)}"
        ) from None


def run_job(client: Any, job: str, command: str, package: Path) -> int:
    """Submit, print the log as it grows, and return the exit code; an interrupt stops the job on
    the cluster.
    """
    # Ray sends a job SIGTERM and kills it 3 s later; our driver cleans up on SIGINT, and may take
    # longer.
    ending = {"RAY_JOB_STOP_SIGNAL": "SIGINT", "RAY_JOB_STOP_WAIT_TIME_S": str(END_S)}
    environment = {"working_dir": str(package), "env_vars": ending}
    with interruptible():
        try:
            client.submit_job(entrypoint=command, submission_id=job, runtime_env=environment)
            say(f"{job}: {package.stat().st_size / 2**20:.1f} MiB shipped; Ctrl-C stops it")
            info = asyncio.run(follow(client, job))
        except KeyboardInterrupt:
            stop(client, job)
            return INTERRUPTED
        except (OSError, RuntimeError) as error:
            say(f"error: {job}: {in_a_line(error)}")
            return FAILED
    code = exit_code(str(info.status), info.driver_exit_code)
    ended = str(info.status).lower()
    if code and info.driver_exit_code is None:
        # the driver's own words are in the log; these are Ray's
        say(f"error: {job}: {ended}: {info.message}")
    if code == NOT_FOUND:
        say(
            f"error: {job}: start Ray on the cluster with the bin folder of its Python "
            "environment on PATH"
        )
    say(f"{job}: {ended}, exit code {code}")
    return code


def exit_code(status: str, driver: int | None) -> int:
    """Return the driver's own where Ray knows it; one that a signal ended counts as a
    shell would.
    """
    if driver is not None:
        return driver if driver >= 0 else 128 - driver
    return {"SUCCEEDED": 0, "STOPPED": INTERRUPTED}.get(status, FAILED)


async def follow(client: Any, job: str) -> Any:
    """Print the job's log until the job has ended; returns Ray's JobDetails. Raises TimeoutError
    when the job server is silent for long: the job may go on without it.
    """
    log = Log(client, job)
    last_answer = time.monotonic()
    tail = asyncio.create_task(log.print())
    try:
        while True:
            await asyncio.wait({tail}, timeout=POLL_S)
            try:
                info = await asyncio.to_thread(client.get_job_info, job)
            except (OSError, RuntimeError) as error:
                if time.monotonic() - last_answer > LOST_S:
                    reason = (
                        f"nothing heard from the job server for {LOST_S:.0f} s; the job may "
                        "still run"
                    )
                    raise TimeoutError(f"{reason} ({error})") from error
                await asyncio.sleep(POLL_S)
                continue
            last_answer = time.monotonic()
            if info.status.is_terminal():
                await asyncio.wait({tail}, timeout=LAST_LINES_S)
                await asyncio.to_thread(log.print_rest)
                return info
            if tail.done():  # the connection was lost, not the job
                await asyncio.sleep(POLL_S)
                tail = asyncio.create_task(log.print())
    finally:
        tail.cancel()


@dataclass
class Log:
    """A job's log on our stdout. Ray sends it from its beginning each time; what is printed is not
    printed again.
    """

    client: Any
    job: str
    printed: int = 0

    async def print(self) -> None:
        """Print what is new; return when the log ends or the connection is lost."""
        seen = 0
        # of HTTP, of the socket, of Ray: `follow` finds out what it means
        with contextlib.suppress(Exception):
            async for text in self.client.tail_job_logs(self.job):
                new = text[max(0, self.printed - seen) :]
                seen += len(text)
                self.printed = max(self.printed, seen)
                print(new, end="", flush=True)

    def print_rest(self) -> None:
        """Print what the connection has not brought when the job has ended: the last lines are the
        ones that matter.
        """
        try:
            print(self.client.get_job_logs(self.job)[self.printed :], end="", flush=True)
        except (OSError, RuntimeError) as error:
            say(
                f"{self.job}: its last lines could not be read ({in_a_line(error)}); ray job "
                f"logs {self.job}"
            )


def stop(client: Any, job: str) -> None:
    """Stop the job and wait until it has ended, within bounds."""
    say(f"{job}: stopping")
    started = time.monotonic()
    known = False
    while time.monotonic() - started < STOP_S:
        # the server is away, or does not know the job yet
        with contextlib.suppress(OSError, RuntimeError):
            client.stop_job(job)
            known = True
            if client.get_job_info(job).status.is_terminal():
                return say(f"{job}: stopped")
        if not known and time.monotonic() - started > CONNECT_S:
            return say(f"{job}: was not submitted")
        time.sleep(0.5)
    say(f"{job}: has not ended within {STOP_S:.0f} s; look with: ray job status {job}")


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Let SIGINT and SIGTERM raise KeyboardInterrupt, also where a parent process had switched
    SIGINT off.
    """
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
