"""The Actor's adapter as an engine takes it: proved by its digest, written as PEFT writes one,
loaded as a LoRA request.

vLLM reads adapters from a folder, keeps what it has read, and takes two requests of one name for
the same adapter. So every load has a name and a number of its own, never used again; its folder
lives as long as the load: should vLLM want to read it again, it would be missed aloud.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from actors.weights.packing import fetch_group, unpack_group
from actors.weights.proof import Receipt, SyncError


@dataclass
class Adapter:
    """An adapter under way to an engine: its packed tensors (a group with its bytes as `ref`), the
    content of its adapter_config.json, the version of the weights that it makes, and the seconds
    its bytes may take to arrive.
    """

    group: dict[str, Any]
    config: dict[str, Any]
    version: int
    timeout_s: float

    def write(self, folder: str) -> None:
        """Write it as PEFT does. Raises SyncError if its bytes are not those sent."""
        import torch
        from safetensors.torch import save_file

        with warnings.catch_warnings(action="ignore"):  # the store's memory is read-only
            packed = torch.from_numpy(fetch_group(self.group, self.timeout_s))
        tensors = dict(unpack_group(self.group, packed))
        save_file(tensors, Path(folder, "adapter_model.safetensors"))
        Path(folder, "adapter_config.json").write_text(json.dumps(self.config))


class Adapters:
    """The adapters of one vLLM engine. Every request carries the one that is `serving`: a LoRA
    request, or None where the base serves.
    """

    def __init__(self) -> None:
        self.serving: Any = None
        self.loads = 0

    def load(self, adapter: Adapter, engine: Any) -> Receipt:
        """Load the adapter into `engine` and serve it; return the receipt. Raises SyncError where
        bytes are not those sent, and where vLLM has no layer for a part of it.
        """
        from vllm.lora.request import LoRARequest

        from actors.weights.parallel import call_workers

        self.loads += 1
        with TemporaryDirectory(prefix="quatuor-adapter-") as folder:
            adapter.write(folder)
            name = f"version {adapter.version}, load {self.loads}"
            request = LoRARequest(name, self.loads, folder)
            call_workers(engine, "add_lora", request)
        unused = sorted(set().union(*call_workers(engine, unused_parts, self.loads)))
        if unused:
            raise SyncError(
                f"vLLM has no layer for {len(unused)} parts of the adapter, such as {unused[0]}: "
                "sync.lora: merged sends them within the weights"
            )
        self.serving = request
        return [(adapter.group["name"], adapter.group["digest"], adapter.group["names"])]

    def forget_others(self, engine: Any) -> None:
        """Remove all adapters but the one that serves."""
        for number in engine.list_loras() - {self.serving.lora_int_id}:
            engine.remove_lora(number)


def unused_parts(worker: Any, number: int) -> list[str]:
    """Return the modules of a loaded adapter that no layer of vLLM's model reads: it leaves them
    out without a word. Runs in the engine's worker.
    """
    manager = worker.model_runner.lora_manager._adapter_manager
    adapter = manager.get_adapter(number)
    used = {id(manager._get_lora_layer_weights(adapter, name)) for name in manager.modules}
    return [name for name, weights in adapter.loras.items() if id(weights) not in used]
