"""The Ray cluster of a run: joined at its address, or started here."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import ray
from ray._private import node, parameter, services, utils
from ray.exceptions import RayError

from actors.cluster.surroundings import provide_token, ray_folder
from actors.run.stop import hold_signals, need
from learners.errors import UserError, in_a_line

REACH_S = 5.0  # for a connection to a cluster
HTTP2_SETTINGS = b"\x04"  # the type of a frame, after three bytes of length


def connect(address: str | None, cpus: int) -> None:
    """Join the Ray cluster at `address`, or start one here with room for `cpus` threads.

    Raises UserError within seconds when nothing answers at `address`; Ray would try for long. And
    when Ray could not start here.
    """
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    if not address:
        # CPUs are logical in Ray: a dry run may have more processes than the machine has cores.
        count = max(cpus, os.cpu_count() or 1)
        folder = ray_folder()
        provide_token()
        with signals_of_our_own(), only_what_a_run_needs():
            ray.init("local", num_cpus=count, include_dashboard=False, _temp_dir=folder, **quiet)
        need(cluster_ended)
        return
    try:
        if "://" not in address:  # `auto` may well name a cluster that has ended
            reach(services.canonicalize_bootstrap_address(address) or address)
        with signals_of_our_own():
            ray.init(address, **quiet)
    except (OSError, ValueError, RayError) as error:  # ConnectionError is an OSError
        raise UserError(
            f"cluster.address: no Ray cluster can be joined at {address}: {in_a_line(error)}"
        ) from error


def cluster_ended() -> bool:
    """Tell whether Ray was started here and has lost processes: after a signal to all of them some
    go at once; its head stops to answer, and takes long to end.
    """
    node = ray._private.worker._global_node
    return node is not None and bool(node.dead_processes())


@contextmanager
def signals_of_our_own() -> Iterator[None]:
    """Start Ray so that signals are ours to answer: its handler of SIGTERM would end the run, and
    one that a whole process group gets (`timeout`, `kill %1`) its processes, before a checkpoint.
    """
    popen = services.ConsolePopen
    install = utils.set_sigterm_handler
    services.ConsolePopen = partial(popen, process_group=0)
    utils.set_sigterm_handler = lambda _: None
    try:
        with hold_signals():  # Ray's C++ code has another handler, which prints a trace
            yield
    finally:
        services.ConsolePopen = popen
        utils.set_sigterm_handler = install


@contextmanager
def only_what_a_run_needs() -> Iterator[None]:
    """Start Ray without processes that nobody asks: the autoscaler's monitor, the log monitor (logs
    do not go to the driver), and the dashboard's server, which even without a dashboard starts for
    usage statistics and holds everything up. They cost a start 2 s of CPU.
    """
    params = parameter.RayParams
    serve = node.Node.start_api_server
    parameter.RayParams = partial(params, no_monitor=True, include_log_monitor=False)
    node.Node.start_api_server = lambda self, **_: None
    try:
        yield
    finally:
        parameter.RayParams = params
        node.Node.start_api_server = serve


def reach(address: str) -> None:
    """Return when Ray's head listens at host:port; raise OSError or ValueError if it does not.

    Ray itself would wait for minutes at the port of another server. Ray's server speaks gRPC, and
    so begins with the settings of an HTTP/2 connection unprompted (RFC 9113, 3.4), unless it speaks
    TLS.
    """
    host, port = address.rsplit(":", 1)
    with socket.create_connection((host.strip("[]"), int(port)), timeout=REACH_S) as head:
        if os.environ.get("RAY_USE_TLS", "0") != "0":
            return
        try:
            greeting = head.recv(4, socket.MSG_WAITALL)
        except TimeoutError:
            greeting = b""
    if greeting[3:] != HTTP2_SETTINGS:
        raise ConnectionError(
            "what listens there is not Ray's head, whose port is 6379 unless told otherwise"
        )
