"""Packed transfers by nccl between two processes on one GPU: do they arrive, and what happens to
the sender when the receiver dies in the middle?

    .venv/bin/python benchmarks/nccl.py --json FILE

NCCL lets two ranks share a card from 2.30 on, and slowly: the seconds say that the way works, not
how fast it is between two cards. The sender is ours with vLLM's trainer; the receiver is vLLM's
alone, without an engine. The weights are random, of the shape of Qwen3-0.6B.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run as a script, Python looks beside it alone

ENVIRONMENT = {  # for two ranks on one card
    "NCCL_MULTI_RANK_GPU_ENABLE": "1",
    "NCCL_MAX_CTAS": "1",
    "NCCL_NVLS_ENABLE": "0",
}
OLDEST = 23000  # NCCL 2.30.0
SHAPE = {"vocabulary": 151936, "hidden": 1024, "intermediate": 3072, "heads": 2048, "layers": 28}
ROUNDS = 3
LIMIT_S = 150.0  # for both processes to start, and all rounds
DEATH_S = 20.0  # for the sender to notice that the receiver has died


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, required=True, help="file for the result")
    arguments = parser.parse_args()
    os.environ.update(ENVIRONMENT)
    why = impossible()
    result = {"ok": False, "why": why} if why else between_two_processes()
    arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


def impossible() -> str:
    """Return why two ranks cannot share a card here, or nothing."""
    import torch

    if not torch.cuda.is_available():
        return "torch sees no GPU"
    from vllm.distributed.device_communicators.pynccl_wrapper import NCCLLibrary

    library = NCCLLibrary()
    if library.ncclGetRawVersion() < OLDEST:
        return f"two ranks on one card need NCCL 2.30, here is {library.ncclGetVersion()}"
    return ""


def between_two_processes() -> dict[str, Any]:
    """Return what the sender found. Whatever happens, both processes have ended by then."""
    context = multiprocessing.get_context("spawn")
    calls, answers = context.Pipe()
    result, found = context.Pipe()
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    processes = [
        context.Process(target=receive, args=(answers, "cuda")),
        context.Process(target=send, args=(calls, found, port, SHAPE, "cuda")),
    ]
    for process in processes:
        process.start()
    answers.close()
    found.close()
    try:
        if not result.poll(LIMIT_S):
            return {"ok": False, "why": f"no answer from the sender within {LIMIT_S:.0f} s"}
        told: dict[str, Any] = result.recv()
        return {**told, "sender_of_a_dead_receiver": noticed(result)} if told["ok"] else told
    except EOFError:
        return {"ok": False, "why": "the sender died"}
    finally:
        for process in processes:
            process.kill()
            process.join()


def noticed(result: Connection) -> str:
    """Return what the sender noticed of its receiver's death."""
    if not result.poll(DEATH_S):
        return "nothing: it waits"
    try:
        return str(result.recv())
    except EOFError:
        return "it died too"


# --- the sender's process -------------------------------------------------------------------------


class Weights:
    """Random weights on a device, a layer after the other, as an Actor yields them."""

    def __init__(self, shape: dict[str, int], device: str) -> None:
        self.shape = shape
        self.device = device

    def groups(self) -> Iterator[dict[str, tuple[int, ...]]]:
        s = self.shape
        hidden = s["hidden"]
        yield {"model.embed_tokens.weight": (s["vocabulary"], hidden)}
        for i in range(s["layers"]):
            layer = {
                "self_attn.q_proj": (s["heads"], hidden),
                "self_attn.k_proj": (s["heads"] // 2, hidden),
                "self_attn.v_proj": (s["heads"] // 2, hidden),
                "self_attn.o_proj": (hidden, s["heads"]),
                "mlp.gate_proj": (s["intermediate"], hidden),
                "mlp.up_proj": (s["intermediate"], hidden),
                "mlp.down_proj": (hidden, s["intermediate"]),
                "input_layernorm": (hidden,),
            }
            yield {f"model.layers.{i}.{name}.weight": size for name, size in layer.items()}

    def metadata(self) -> list[tuple[str, Any, tuple[int, ...]]]:
        import torch

        named = (item for group in self.groups() for item in group.items())
        return [(name, torch.bfloat16, size) for name, size in named]

    def iter_groups(self) -> Iterator[tuple[list[str], list[Any]]]:
        import torch

        for group in self.groups():
            sizes = group.values()
            drawn = [torch.randn(s, dtype=torch.bfloat16, device=self.device) for s in sizes]
            yield list(group), drawn

    def adapter(self) -> dict[str, Any]:
        return {}

    def adapter_config(self) -> dict[str, Any]:
        return {}


class PipeClient:
    """Calls the receiver through a pipe; what EngineClient is to engines in Ray."""

    world_size = 2

    def __init__(self, pipe: Connection) -> None:
        self.pipe = pipe
        self.lock = threading.Lock()  # an update is called from a thread of vLLM's trainer

    def call(self, method: str, *args: Any) -> Any:
        with self.lock:
            self.pipe.send((method, args))
            error, answer = self.pipe.recv()
        if error:
            raise RuntimeError(f"the receiver failed in {method}: {error}")
        return answer

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.call("init", init_info)

    def start_weight_update(self) -> None:
        self.call("start")

    def update_weights(self, update_info: Any) -> None:
        self.call("update", update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.received = self.call("finish")


def send(
    calls: Connection, found: Connection, port: int, shape: dict[str, int], device: str
) -> None:
    """Send some rounds and tell what came of it, then one more to a receiver that dies; tell what
    was noticed of that.
    """
    client = PipeClient(calls)
    try:
        sender = connected(client, port, shape, device)
        found.send(rounds(sender, client))
    except Exception as error:
        found.send({"ok": False, "why": f"{type(error).__name__}: {error}"})
        return
    try:
        client.call("die")
        sender.send_weights()
        found.send("nothing: it went on")
    except Exception as error:
        found.send(f"{type(error).__name__}: {error}")


def connected(client: PipeClient, port: int, shape: dict[str, int], device: str) -> Any:
    from actors.weights.senders import SENDERS

    return SENDERS["nccl"](Weights(shape, device), client, 0, "127.0.0.1", port)  # type: ignore[arg-type]


def rounds(sender: Any, client: PipeClient) -> dict[str, Any]:
    """Return the seconds and bytes of each round. Raises SyncError where they are not those
    sent.
    """
    from math import prod
    from statistics import median

    from actors.weights.proof import verify

    seconds = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        sent = sender.send_weights()
        seconds.append(time.perf_counter() - began)
        verify(sent, client.received, sender.names(), "the receiver")
    size = sum(prod(shape) * dtype.itemsize for _, dtype, shape in sender.source.metadata())
    return {"ok": True, "seconds": median(seconds), "rounds": seconds, "bytes": size}


# --- the receiver's process -----------------------------------------------------------------------


class Recorder:
    """Stands where the model is: keeps a receipt of what it is given."""

    def __init__(self) -> None:
        self.receipt: list[tuple[str, str, list[str]]] = []
        self.mortal = False

    def load_weights(self, weights: Any) -> None:
        from actors.weights.proof import bit_sums, checksums

        if self.mortal:
            os._exit(1)
        named = dict(weights)
        found = checksums([bit_sums(tensor) for tensor in named.values()])
        self.receipt += [(name, value, [name]) for name, value in zip(named, found, strict=True)]


def receive(calls: Connection, device: str) -> None:
    """Answer the sender's calls until it has gone."""
    recorder = Recorder()
    engine = transfer_engine(recorder, device)
    while True:
        try:
            method, args = calls.recv()
        except EOFError:
            return
        try:
            calls.send(("", answer(engine, recorder, method, *args)))
        except Exception as error:
            calls.send((f"{type(error).__name__}: {error}", None))


def transfer_engine(recorder: Recorder, device: str) -> Any:
    import torch
    from vllm.config.weight_transfer import WeightTransferConfig
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    alone = SimpleNamespace(data_parallel_index=0, world_size=1, rank=0)
    config: Any = SimpleNamespace(parallel_config=alone, model_config=None)
    where = torch.device(device, 0) if device == "cuda" else torch.device(device)
    chosen = WeightTransferConfig(backend="nccl")
    return WeightTransferEngineFactory.create_engine(chosen, config, where, recorder)  # type: ignore[arg-type]


def answer(engine: Any, recorder: Recorder, method: str, *args: Any) -> Any:
    """Do what a worker does in an update, except for what concerns a real model's layers."""
    if method == "init":
        engine.init_transfer_engine(engine.parse_init_info(*args))
    elif method == "start":
        recorder.receipt = []
    elif method == "update":
        engine.update_weights(*args)
    elif method == "die":
        recorder.mortal = True
    return recorder.receipt if method == "finish" else None


if __name__ == "__main__":
    main()
