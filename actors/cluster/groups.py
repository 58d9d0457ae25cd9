"""WorkerGroup: plain classes run as Ray actors; start, call, scatter, gather, each with a deadline.

A plain class is named as "module:Class" and imported only inside its own process, so that the
driver never loads vLLM, DeepSpeed or Transformers.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import ray
from ray.exceptions import (
    GetTimeoutError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
)

from actors.cluster.host import Host
from learners.errors import UserError
from learners.imports import ROOT
from learners.settings import DeviceType, Rank, Settings, located


class WorkerError(RuntimeError):
    """A worker failed, died or did not answer in time; the message names phase, worker and node."""


class Node(NamedTuple):
    """A machine: Ray's id of it, and its host name. Two nodes may share a host."""

    id: str
    host: str

    def __str__(self) -> str:
        return f"{self.host} ({self.id[:8]})"


class WorkerGroup:
    """`len(options)` processes of one role, each with its own Ray options (resources, placement)
    and its `environment`.

    Before any work it calls `acquire_gpus`, which does nothing unless roles share their GPUs
    (`actors.cluster.sharing.GpuSharing`).
    """

    concurrency = 1  # calls that one process answers at the same time

    def __init__(self, name: str, target: str, options: Sequence[dict[str, Any]]) -> None:
        self.name = name
        # Ray calls a process after its class, in `ps` and in its own reports.
        classes = [ray.remote(type(f"{name}[{i}]", (Host,), {})) for i in range(len(options))]
        self.handles = [
            one.options(
                max_concurrency=self.concurrency,
                **{name: value for name, value in own.items() if name != "environment"},
            ).remote(target, ROOT, os.getcwd(), own.get("environment"))
            for one, own in zip(classes, options, strict=True)
        ]
        self.nodes = [Node("?", "?")] * len(self.handles)
        self.acquire_gpus: Callable[[], None] = lambda: None
        # the arguments of each process, so that it can be built again
        self.started_with: list[dict[str, Any]] = []

    def __len__(self) -> int:
        return len(self.handles)

    def prepare(self, prepare: str, device: str) -> list[Any]:
        """Have every process import its modules, as soon as it is there; return pending spans for
        `gather`. `prepare` is the role's.
        """
        return [h.prepare.remote(prepare, device) for h in self.handles]

    def start(
        self,
        arguments: Mapping[str, Any],
        deadline_s: float,
        *,
        distributed: tuple[DeviceType, float] | None = None,
        each: Sequence[Mapping[str, Any]] = (),
    ) -> list[Any]:
        """Begin building the plain object in every process; return pending results for `gather`.

        Waits for the processes themselves, which the constructor began. `each` has the arguments
        that are not the same for all workers. With `distributed` (device, collective time-out in
        seconds) each worker also gets its `rank`.
        """
        arguments = {k: located(v) if isinstance(v, Settings) else v for k, v in arguments.items()}
        nodes = self.gather([h.node.remote() for h in self.handles], "start", deadline_s)
        self.nodes = [Node(*node) for node in nodes]
        own = [dict(one) for one in each] or [{} for _ in self.handles]
        if distributed is not None:
            device, timeout_s = distributed
            address, port = self.free_address(deadline_s)
            ranks = [Rank(i, len(self), address, port, device, timeout_s) for i in range(len(self))]
            own = [{**one, "rank": rank} for one, rank in zip(own, ranks, strict=True)]
        self.started_with = [{**arguments, **one} for one in own]
        return [h.start.remote(one) for h, one in zip(self.handles, self.started_with, strict=True)]

    def free_address(self, deadline_s: float) -> tuple[str, int]:
        """Return the address of the first worker's node, and a port that was free a moment ago."""
        return self.gather([self.handles[0].free_address.remote()], "start", deadline_s)[0]

    def submit(self, method: str, *args: Any, **kwargs: Any) -> list[Any]:
        """Call `method` with the same arguments on every worker; return pending results for
        `gather`.
        """
        self.acquire_gpus()
        return self.submit_without_swap(method, *args, **kwargs)

    def submit_without_swap(self, method: str, *args: Any, **kwargs: Any) -> list[Any]:
        """Submit without acquiring the GPUs: for calls that move a group on or off them, and for
        those that need no GPU.
        """
        return [h.call.remote(method, *args, **kwargs) for h in self.handles]

    def scatter(self, method: str, shares: Sequence[Any], *args: Any) -> list[Any]:
        """Call `method` with one share per worker; return pending results for `gather`."""
        self.acquire_gpus()
        return [h.call.remote(method, s, *args) for h, s in zip(self.handles, shares, strict=True)]

    def gather(self, pending: Sequence[Any], phase: str, deadline_s: float) -> list[Any]:
        """Wait for pending results; return them in order. Raises WorkerError."""
        return gather(pending, self.names(), phase, deadline_s)

    def call(
        self, method: str, *args: Any, phase: str, deadline_s: float, **kwargs: Any
    ) -> list[Any]:
        return self.gather(self.submit(method, *args, **kwargs), phase, deadline_s)

    def call_without_swap(
        self, method: str, *args: Any, phase: str, deadline_s: float
    ) -> list[Any]:
        """Call what works wherever a model lies, such as saving it."""
        return self.gather(self.submit_without_swap(method, *args), phase, deadline_s)

    def streams(self, method: str, shares: Sequence[Any]) -> list[Any]:
        """Start a generator method on every worker; return Ray's generators of object
        references.
        """
        self.acquire_gpus()
        return [
            h.stream.options(num_returns="streaming").remote(method, s)
            for h, s in zip(self.handles, shares, strict=True)
        ]

    def names(self) -> list[str]:
        """Return the names of the workers in errors: role, index and node."""
        return [f"{self.name}[{i}] on node {node}" for i, node in enumerate(self.nodes)]


def gather(
    pending: Sequence[Any],
    names: Sequence[str],
    phase: str,
    deadline_s: float,
    began: float | None = None,
) -> list[Any]:
    """Wait for the pending results of the workers `names`; return them in order.

    The time runs from `began` (by time.monotonic), or from now. Raises WorkerError that names
    phase, worker and node.
    """
    until = (time.monotonic() if began is None else began) + deadline_s
    workers = dict(zip(pending, names, strict=False))  # there may be more workers than results
    results: dict[Any, Any] = {}
    while waiting := [ref for ref in pending if ref not in results]:
        done, _ = ray.wait(waiting, timeout=max(0.0, until - time.monotonic()))
        if not done:
            late = ", ".join(workers[ref] for ref in waiting)
            raise WorkerError(f"{phase}: {late} did not answer within {deadline_s:.0f} s")
        # the first failure ends the wait, whichever worker it comes from
        results[done[0]] = fetch(done[0], workers[done[0]], phase)
    return [results[ref] for ref in pending]


def fetch(ref: Any, name: str, phase: str) -> Any:
    """Return the value of a finished result of worker `name`. Raises WorkerError for a failure,
    UserError for bad input.
    """
    try:
        return ray.get(ref, timeout=60)
    except RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise UserError(error.cause.problems) from error
        raise WorkerError(f"{phase}: {name} failed: {error.cause!r}\n{error}") from error
    except RayActorError as error:
        raise WorkerError(f"{phase}: {name} died: {last_words(error)}\n{error}") from error
    except GetTimeoutError as error:
        raise WorkerError(
            f"{phase}: the answer of {name} could not be fetched within 60 s"
        ) from error
    except OutOfMemoryError as error:
        raise WorkerError(
            f"{phase}: {name} was ended, its node ran out of memory: use fewer processes per "
            f"node, smaller micro_batch_tokens, or nodes with more memory\n{error}"
        ) from error
    except RayError as error:
        what = " ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])
        raise WorkerError(f"{phase}: the answer of {name} is lost: {what}\n{error}") from error


def last_words(error: RayActorError) -> str:
    """Return in one line what is known of the end of a Ray actor's process, and where more is."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if error.actor_init_failed:
        return lines[-1]  # of a traceback
    detail = lines[-1].rpartition("Worker exit detail: ")[2]
    if "connection error" in detail:  # what Ray says of every process that is suddenly gone
        detail = "it crashed, or was killed (by the kernel for want of memory? dmesg tells)"
    process = next((line for line in lines if line.startswith("pid: ")), "").removeprefix("pid: ")
    logs = f"; its log on that node: /tmp/ray/session_latest/logs/*{process}*" if process else ""
    return detail.rstrip(".") + logs
