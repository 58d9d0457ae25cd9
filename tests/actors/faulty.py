"""Actor ranks and engines whose next weight sync goes wrong in a chosen way."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from actors.engine.adapter import Adapter
from actors.engine.engine import GenerationEngine
from actors.weights import senders
from actors.weights.packing import pack_group
from actors.weights.proof import Receipt, Sent, SyncError
from actors.weights.senders import SyncedActor


class FaultyActor(SyncedActor):
    """One rank. `break_next` names the fault of the next `send_weights`; the one after is sound
    again.
    """

    fault = ""

    def connect(self, engines: Any, deadline_s: float, *others: Any) -> None:
        super().connect(engines, deadline_s, *others)
        senders.GROUP_BYTES = 1  # in this process: every layer is a group
        groups = super().iter_groups()
        self.first = {
            n: t.clone() for names, tensors in groups for n, t in zip(names, tensors, strict=True)
        }

    def break_next(self, fault: str) -> None:
        self.fault = fault

    def send_weights(self, version: int) -> Sent:
        pack = senders.pack_group
        if self.fault in ("a corrupted bucket", "a sender that hears nothing"):
            senders.pack_group = corrupted
        if self.fault == "a sender that hears nothing" and self.rank.index == 0:
            self.client.update_weights = self.without_hearing  # type: ignore[method-assign]
        if self.fault == "an update cut off halfway" and self.rank.index == 0:
            self.client.update_weights = self.half_of_it  # type: ignore[method-assign]
        try:
            return super().send_weights(version)
        finally:
            self.fault = ""
            senders.pack_group = pack
            self.client.__dict__.pop("update_weights", None)

    def iter_groups(self) -> Iterator[tuple[list[str], list[Tensor]]]:
        for names, tensors in super().iter_groups():
            if self.fault == "a missing name" and "model.norm.weight" in names:
                continue
            if self.fault == "a head left stale" and names == ["lm_head.weight"]:
                tensors = [self.first[names[0]]]
            if self.fault == "an adapter left out":
                tensors = [self.first[name] for name in names]
            yield names, tensors

    def adapter(self) -> dict[str, Tensor]:
        tensors = super().adapter()
        if self.fault == "a part for no layer":
            tensors = {name.replace("layers.1", "layers.9"): t for name, t in tensors.items()}
        return tensors

    def disturb_the_base(self) -> None:
        weight = next(iter(self.model.parameters()))
        assert not weight.requires_grad
        weight.data[0, 0] += 1e-3

    def without_hearing(self, update: dict[str, Any]) -> None:
        with contextlib.suppress(SyncError):
            type(self.client).update_weights(self.client, update)
        time.sleep(10)
        raise ConnectionError("nobody took part")

    def half_of_it(self, update: dict[str, Any]) -> None:
        groups = update["groups"]
        type(self.client).update_weights(self.client, {"groups": groups[: len(groups) // 2]})
        raise ConnectionError("the sender is gone")


class FaultyEngine(GenerationEngine):
    """After `forget_the_head`, the next update leaves a tied head with its old packed weights."""

    forgetful = False
    dropping = False
    delay_s = 0.0

    def dawdle(self, seconds: float) -> None:
        """Be late with the next update."""
        self.delay_s = seconds

    def start_weight_update(self) -> None:
        delay = self.delay_s
        self.delay_s = 0.0
        time.sleep(delay)
        super().start_weight_update()

    def forget_the_head(self) -> None:
        self.forgetful = True

    def drop_the_next_adapter(self) -> None:
        self.dropping = True

    def load_adapter(self, adapter: Adapter) -> Receipt:
        """After `drop_the_next_adapter`, load it and serve the base."""
        receipt = super().load_adapter(adapter)
        if self.dropping:
            self._adapters.serving = None
            self.dropping = False
        return receipt

    def adapters(self) -> tuple[list[int], str]:
        """Return the numbers of the adapters that vLLM has, and the name of the one that serves."""
        serving = self._adapters.serving
        return sorted(self._engine.list_loras()), serving.lora_name if serving else ""

    def finish_weight_update(self, weight_version: str | None = None) -> Receipt:
        from actors.weights import receiver

        head = receiver.ParallelLMHead
        if self.forgetful:
            receiver.ParallelLMHead = type("NoLayerIsOne", (), {})
        try:
            return super().finish_weight_update(weight_version)
        finally:
            self.forgetful = False
            receiver.ParallelLMHead = head


def corrupted(name: str, tensors: Any, buffer: Any = None) -> Any:
    meta, data = pack_group(name, tensors)
    data = data.copy()
    data[5] ^= 1  # after the digest was taken
    return meta, data
