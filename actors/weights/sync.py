"""The weight sync as the driver runs it: send the Actor's weights, and prove that the engines hold
them.
"""

from __future__ import annotations

from collections.abc import Sequence

from actors.cluster.groups import WorkerError, WorkerGroup
from actors.cluster.layout import shares_gpus
from actors.cluster.sharing import GpuSharing
from actors.settings import RLRecipe
from actors.weights.client import ADAPTER, transfer_backend
from actors.weights.proof import check_adapter, check_probe, probe_decides, verify
from learners.data.rows import Prompt

FAILURE_S = 10.0  # for an engine to answer with the error of an update


class WeightSync:
    """The way from the Actor to the engines; `probe` are the ids whose log-probs prove a sync."""

    def __init__(
        self,
        actor: WorkerGroup,
        engines: WorkerGroup,
        gpu_sharing: GpuSharing,
        probe: list[int],
        recipe: RLRecipe,
    ) -> None:
        self.actor = actor
        self.engines = engines
        self.gpu_sharing = gpu_sharing
        self.probe = probe
        self.recipe = recipe
        self.deadline_s = recipe.sync.deadline_s
        self.readings = ("probe", "base_probe") if recipe.actor.model.lora else ("probe",)

    def connect(self, version: int) -> None:
        """Connect the Actor to the engines. At version 0 both have loaded the same files; later the
        engines are behind and get the weights. An adapter that goes alone goes at version 0 too,
        though it changes nothing yet: what vLLM cannot serve is known before step 1.
        """
        cluster = self.recipe.cluster
        alone = self.recipe.sync.lora == "adapter"
        backend = transfer_backend(cluster.device, shares_gpus(cluster))
        self.actor.call(
            "connect",
            self.engines.handles,
            self.deadline_s,
            self.recipe.generation.tensor_parallel,
            ADAPTER if alone else backend,
            self.actor.free_address(self.deadline_s),
            self.engines.names(),
            phase="sync",
            deadline_s=self.deadline_s,
        )
        if version or alone:
            self.sync(version)

    def sync(self, version: int) -> dict[str, float]:
        """Give every engine the Actor's weights and prove it; until then they are STALE and serve
        nothing.

        Digests and names of the received bytes must agree with what was sent, and log-probs of the
        probe within the recipe's bounds. Returns the metrics of the proof. Raises SyncError or
        WorkerError.
        """
        deadline_s = self.deadline_s
        actor = self.actor
        stopwatch = self.gpu_sharing.stopwatch
        self.gpu_sharing.sync()
        try:
            results = actor.call("send_weights", version, phase="sync", deadline_s=deadline_s)
        except WorkerError as error:
            raise WorkerError("; ".join([str(error), *self._failures()])) from error
        sent, received, parameters, spans = results[0]
        stopwatch.add(spans)
        engines = self.engines.names()
        for engine, receipt in zip(engines, received, strict=True):
            verify(sent, receipt, parameters, engine)
        with stopwatch("probe"):
            ours, theirs = self._read_probe()
        metrics = self._prove(ours, dict(zip(engines, theirs, strict=True)))
        spans_of = self.engines.call("accept", version, phase="sync", deadline_s=deadline_s)
        stopwatch.add(max(spans_of, key=lambda spans: sum(span.seconds for span in spans)))
        return metrics

    def _read_probe(self) -> tuple[dict[str, list[float]], list[list[float]]]:
        """Return the log-probs of the probe: the Actor's by reading, and every engine's."""

        def ours() -> dict[str, list[float]]:
            return {
                reading: self.actor.gather(refs, "sync", self.deadline_s)[0]
                for reading, refs in pending.items()
            }

        def theirs() -> list[list[float]]:
            return self.engines.call(
                "probe_logprobs", self.probe, phase="sync", deadline_s=self.deadline_s
            )

        pending = {reading: self.actor.submit(reading, self.probe) for reading in self.readings}
        if self.recipe.cluster.device == "cpu":  # threads of both on the same cores take far longer
            return ours(), theirs()
        found = theirs()
        return ours(), found

    def _prove(
        self, ours: dict[str, list[float]], theirs: dict[str, list[float]]
    ) -> dict[str, float]:
        """Hold the engines' log-probs of the probe against the Actor's and, with LoRA, against its
        base's.
        """
        bounds = (self.recipe.max_logprob_diff, self.recipe.mean_logprob_diff)
        actor = ours["probe"]
        metrics = {}
        if base := ours.get("base_probe"):
            decidable = probe_decides(actor, base, *bounds)
            effect = max(abs(a - b) for a, b in zip(actor, base, strict=True))
            metrics = {"sync/adapter_decidable": float(decidable), "sync/adapter_effect": effect}
            for engine, given in theirs.items() if decidable else ():
                check_adapter(actor, base, given, engine)
        gaps = [check_probe(actor, given, *bounds, engine) for engine, given in theirs.items()]
        return {"sync/probe_difference": max(gaps)} | metrics

    def _failures(self) -> list[str]:
        """Return what went wrong in the engines: a rank that waits in a transfer never hears of
        it.
        """
        try:
            told = self.engines.gather(
                self.engines.submit_without_swap("failure"), "sync", FAILURE_S
            )
        except WorkerError as error:
            return [str(error)]
        return [f"{e}: {said}" for e, said in zip(self.engines.names(), told, strict=True) if said]


def probe_ids(prompts: Sequence[Prompt], tokens: int) -> list[int]:
    """Return the fixed sequence that proves a sync: the first prompts' ids, one after the other,
    repeated if need be.
    """
    ids = [i for prompt in prompts[:tokens] for i in prompt.ids]
    return (ids * tokens)[:tokens]
