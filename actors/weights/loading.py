"""Get weights into a vLLM model: directly where loading only copies, else by vLLM's layerwise
reload. Imports vLLM.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.model_loader.mtp_validation import disable_mtp_completeness_check
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)

from actors.weights.destinations import Destinations, NotRecordable


class Loader:
    """Loads whole updates into one model: `load` as often as need be, then `finish`.

    `indirect` says why an update is not loaded directly; empty where it is.
    """

    def __init__(self, model: nn.Module, model_config: Any) -> None:
        self.model = model
        self.model_config = model_config
        self.destinations = Destinations(model)
        self.indirect = ""
        self._refused = False  # this model can never be loaded directly
        self._reloading = False

    def load(self, weights: Mapping[str, Tensor], lent: bool = False) -> None:
        """Load weights by their names in a checkpoint. Their memory must stay as it is until
        `finish`, unless it is `lent` for this call alone.
        """
        if not self._reloading and self._recorded(weights):
            self.destinations.load(weights)
            return
        self._begin_reload()
        with disable_mtp_completeness_check():
            self.model.load_weights(
                (name, weight.clone() if lent else weight) for name, weight in weights.items()
            )

    def finish(self) -> None:
        """End the update; also one that failed."""
        if self._reloading:
            finalize_layerwise_reload(self.model, self.model_config)
            self._reloading = False
        self.destinations.clear()

    def _recorded(self, weights: Mapping[str, Tensor]) -> bool:
        """Tell whether it is known where these weights belong, if need be after recording it."""
        if not self._refused and not weights.keys() <= self.destinations.names:
            try:
                self.destinations.record(weights)
            except Exception as error:  # the reload can do more, or says better what is wrong
                self._refused = isinstance(error, NotRecordable)
                self.indirect = f"{type(error).__name__}: {error}"
                return False
            self.indirect = ""
        return not self._refused

    def _begin_reload(self) -> None:
        if self._reloading:
            return
        for layer in self.model.modules():
            method = getattr(layer, "quant_method", None)
            if isinstance(method, FusedMoEMethodBase):
                method.moe_kernel = None  # built again of the new weights, and so are they packed
        initialize_layerwise_reload(self.model)
        self._reloading = True
