"""WorkerGroup: plain classes run as Ray actors; start, call, scatter, gather, each with a deadline.

A plain class is named as "module:Class" and imported only inside its own process, so that whoever
conducts a run never loads vLLM, DeepSpeed or Transformers.
"""

from __future__ import annotations

import importlib
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import ray
from ray.exceptions import (
    GetTimeoutError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
)

from learners.errors import UserError
from learners.settings import DeviceType, Rank, Settings, located


class WorkerError(RuntimeError):
    """A worker failed, died or did not answer in time; the message names phase, worker and node."""


class Node(NamedTuple):
    """A machine as Ray knows it, and as its owner calls it. Two nodes may share a host."""

    id: str
    host: str

    def __str__(self) -> str:
        return f"{self.host} ({self.id[:8]})"


class Host:
    """The Ray actor around a plain object. Built first, filled by `start`, so that rank 0 can name
    the rendezvous.
    """

    def __init__(self, target: str) -> None:
        self.target = target
        self.worker: Any = None

    def node(self) -> Node:
        return Node(ray.get_runtime_context().get_node_id(), socket.gethostname())

    def free_address(self) -> tuple[str, int]:
        """This node's address and a port that was free a moment ago, for a process-group
        rendezvous.
        """
        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    def start(self, arguments: dict[str, Any]) -> None:
        module, name = self.target.split(":")
        self.worker = getattr(importlib.import_module(module), name)(**arguments)

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.worker, method)(*args, **kwargs)

    def stream(self, method: str, *args: Any) -> Iterator[Any]:
        yield from getattr(self.worker, method)(*args)


class WorkerGroup:
    """`len(options)` processes of one role, each with its own Ray options (resources, environment,
    placement).

    Before any work it calls `acquire_gpus`, which does nothing unless roles share their GPUs
    (`actors.cluster.placement.GpuSharing`).
    """

    def __init__(
        self, name: str, target: str, options: Sequence[dict[str, Any]], concurrency: int = 1
    ) -> None:
        self.name = name
        self.handles = [
            _named(f"{name}[{i}]").options(max_concurrency=concurrency, **one).remote(target)
            for i, one in enumerate(options)
        ]
        self.nodes = [Node("?", "?")] * len(self.handles)
        self.acquire_gpus: Callable[[], None] = _no_need
        # What each process was built with, so that it can be built again.
        self.started_with: list[dict[str, Any]] = []

    def __len__(self) -> int:
        return len(self.handles)

    def start(
        self,
        arguments: Mapping[str, Any],
        deadline_s: float,
        *,
        distributed: tuple[DeviceType, float] | None = None,
        each: Sequence[Mapping[str, Any]] = (),
    ) -> list[Any]:
        """Begin building the plain object in every process; returns pending results for `gather`.

        The processes themselves were begun by the constructor, and are waited for here. `each` has
        the arguments that are not the same for all workers. With `distributed` (device, collective
        time-out in seconds) each worker also gets its `rank` among the ranks.
        """
        arguments = {k: located(v) if isinstance(v, Settings) else v for k, v in arguments.items()}
        self.nodes = self.gather([h.node.remote() for h in self.handles], "start", deadline_s)
        own = [dict(one) for one in each] or [{} for _ in self.handles]
        if distributed is not None:
            device, timeout_s = distributed
            address, port = self.free_address(deadline_s)
            ranks = [Rank(i, len(self), address, port, device, timeout_s) for i in range(len(self))]
            own = [{**one, "rank": rank} for one, rank in zip(own, ranks, strict=True)]
        self.started_with = [{**arguments, **one} for one in own]
        return [h.start.remote(one) for h, one in zip(self.handles, self.started_with, strict=True)]

    def free_address(self, deadline_s: float) -> tuple[str, int]:
        """Where the first worker's node can be reached, with a port that was free a moment ago."""
        return self.gather([self.handles[0].free_address.remote()], "start", deadline_s)[0]

    def submit(self, method: str, *args: Any, **kwargs: Any) -> list[Any]:
        """Call `method` with the same arguments on every worker; returns pending results for
        `gather`.
        """
        self.acquire_gpus()
        return self.submit_without_swap(method, *args, **kwargs)

    def submit_without_swap(self, method: str, *args: Any, **kwargs: Any) -> list[Any]:
        """`submit` for whoever conducts the sharing: without asking for GPUs."""
        return [h.call.remote(method, *args, **kwargs) for h in self.handles]

    def scatter(self, method: str, shares: Sequence[Any], *args: Any) -> list[Any]:
        """Call `method` with one share per worker; returns pending results for `gather`."""
        self.acquire_gpus()
        return [h.call.remote(method, s, *args) for h, s in zip(self.handles, shares, strict=True)]

    def gather(self, pending: Sequence[Any], phase: str, deadline_s: float) -> list[Any]:
        """Wait for pending results, in order. Raises WorkerError naming phase, worker and node."""
        until = time.monotonic() + deadline_s
        results: dict[int, Any] = {}
        waiting = dict(enumerate(pending))
        while waiting:  # the first failure ends the wait, whichever worker it comes from
            done, _ = ray.wait(
                list(waiting.values()), num_returns=1, timeout=max(0.0, until - time.monotonic())
            )
            if not done:
                late = ", ".join(self._who(i) for i in waiting)
                raise WorkerError(f"{phase}: {late} did not answer within {deadline_s:.0f} s")
            index = next(i for i, ref in waiting.items() if ref == done[0])
            results[index] = self.fetch(waiting.pop(index), index, phase)
        return [results[i] for i in range(len(pending))]

    def call(
        self, method: str, *args: Any, phase: str, deadline_s: float, **kwargs: Any
    ) -> list[Any]:
        return self.gather(self.submit(method, *args, **kwargs), phase, deadline_s)

    def streams(self, method: str, shares: Sequence[Any]) -> list[Any]:
        """Start a generator method on every worker; returns Ray's generators of object
        references.
        """
        self.acquire_gpus()
        return [
            h.stream.options(num_returns="streaming").remote(method, s)
            for h, s in zip(self.handles, shares, strict=True)
        ]

    def fetch(self, ref: Any, index: int, phase: str) -> Any:
        """The value of a finished result of worker `index`. A failure becomes a WorkerError, bad
        input a UserError.
        """
        who = self._who(index)
        try:
            return ray.get(ref, timeout=60)
        except RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise UserError(error.cause.problems) from error
            raise WorkerError(f"{phase}: {who} failed: {error.cause!r}\n{error}") from error
        except RayActorError as error:
            raise WorkerError(f"{phase}: {who} died: {error}") from error
        except GetTimeoutError as error:
            raise WorkerError(
                f"{phase}: the answer of {who} could not be fetched within 60 s"
            ) from error
        except OutOfMemoryError as error:
            raise WorkerError(
                f"{phase}: {who} was ended, its node ran out of memory: use fewer processes per "
                f"node, smaller micro_batch_tokens, or nodes with more memory\n{error}"
            ) from error
        except RayError as error:
            what = " ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])
            raise WorkerError(f"{phase}: the answer of {who} is lost: {what}\n{error}") from error

    def names(self) -> list[str]:
        """What errors call the workers."""
        return [self._who(i) for i in range(len(self))]

    def _who(self, index: int) -> str:
        return f"{self.name}[{index}] on node {self.nodes[index]}"


def _named(name: str) -> Any:
    """The remote class of one process. Ray calls a process after its class, in `ps` and in its own
    reports.
    """
    return ray.remote(type(name, (Host,), {}))


def _no_need() -> None:
    """Every role has its GPUs to itself."""
