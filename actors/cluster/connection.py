"""The Ray cluster of a run: joined at its address, or started here."""

from __future__ import annotations

import logging
import os
import socket

import ray
from ray._private.services import canonicalize_bootstrap_address
from ray.exceptions import RayError

from learners.errors import UserError

REACH_S = 5.0  # for a connection to a cluster
HTTP2_SETTINGS = b"\x04"  # the type of a frame, after three bytes of length


def connect(address: str | None, cpus: int) -> None:
    """Join the Ray cluster at `address`, or start one here with room for `cpus` threads.

    Raises UserError within seconds when nothing answers at `address`; Ray would try for long.
    """
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    if not address:
        # CPUs are logical in Ray: a dry run may have more processes than the machine has cores.
        ray.init("local", num_cpus=max(cpus, os.cpu_count() or 1), include_dashboard=False, **quiet)
        return
    try:
        if "://" not in address:  # `auto` may well name a cluster that has ended
            reach(canonicalize_bootstrap_address(address) or address)
        ray.init(address, **quiet)
    except (OSError, ValueError, RayError) as error:  # ConnectionError is an OSError
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"cluster.address: no Ray cluster can be joined at {address}: {reason}"
        ) from error


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
