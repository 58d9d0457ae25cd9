"""Ray actors that run before any of our packages is imported in their process.

Ray puts the folder that the run was started in before all others, where an `actors.py` of the
user's, or a `random.py`, would be taken for ours or Python's own. So these classes travel as code
and not by name, and set that right before anything else is imported.
"""

from __future__ import annotations

import importlib
import os
import socket
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import ray

import learners.imports
from learners.imports import imported, settle_imports

ray.cloudpickle.register_pickle_by_value(importlib.import_module(__name__))
ray.cloudpickle.register_pickle_by_value(learners.imports)


class Host:
    """The Ray actor around a plain object. Built first, filled by `start`, so that rank 0 can name
    the rendezvous.
    """

    def __init__(
        self, target: str, root: str, here: str, environment: Mapping[str, str] | None = None
    ) -> None:
        """Settle where modules come from: `root` is the folder of the driver's own packages, `here`
        the one it was started in. And the `environment`, before what reads it is imported: with an
        environment as a runtime_env Ray would start an agent and a second interpreter for each
        process, and could use none of those that it has started in advance.

        A job's checkout is unpacked on every node, where the process then runs. A node without
        `root` has an installation of its own.
        """
        os.environ.update(environment or {})
        path = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
        sys.path[:0] = [folder for folder in map(os.path.abspath, path) if folder not in sys.path]
        if ray.get_runtime_context().runtime_env.get("working_dir"):
            root = os.getcwd() if root == here else root
            here = os.getcwd()
        if not os.path.isdir(os.path.join(root, "actors")):
            import actors

            root = os.path.dirname(actors.__path__[0])
        settle_imports(root, here)
        from learners import naming

        naming.started_in = here  # Ray's processes may have another current folder
        from learners.launchers import clear_foreign_launchers

        clear_foreign_launchers()
        self.target = target
        self.worker: Any = None

    def node(self) -> tuple[str, str]:
        """Return Ray's id of this node, and its host name."""
        return ray.get_runtime_context().get_node_id(), socket.gethostname()

    def free_address(self) -> tuple[str, int]:
        """Return this node's address and a port that was free a moment ago, for the rendezvous of
        a process group.
        """
        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    def prepare(self, prepare: str, device: str) -> list[Any]:
        """Import the object's module, and let `prepare` ("module:function", which is given the
        device) import what comes later. Nothing is loaded. Return its seconds as spans.
        """
        from learners.spans import Stopwatch

        stopwatch = Stopwatch()
        with stopwatch("import"):
            imported(self.target.split(":")[0])
            if prepare:
                module, name = prepare.split(":")
                getattr(imported(module), name)(device)
        return stopwatch.take()

    def start(self, arguments: dict[str, Any]) -> list[Any]:
        """Build the object; what `prepare` still imports is waited for. Return its seconds as
        spans.
        """
        from learners.spans import Stopwatch

        stopwatch = Stopwatch()
        module, name = self.target.split(":")
        target = getattr(imported(module), name)
        with stopwatch("load"):
            self.worker = target(**arguments)
        return stopwatch.take()

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.worker, method)(*args, **kwargs)

    def stream(self, method: str, *args: Any) -> Iterator[Any]:
        yield from getattr(self.worker, method)(*args)


class GpuReservation:
    """Holds all GPUs of a bundle for the processes that share them."""

    def gpus(self) -> list[str]:
        """Return the GPUs' ids on their node."""
        return [str(i) for i in ray.get_gpu_ids()]
