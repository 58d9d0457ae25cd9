"""Start the processes of a recipe: all at once, each with what the table of roles says it needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from actors.cluster.groups import WorkerError, WorkerGroup
from actors.cluster.layout import shares_gpus
from actors.cluster.placement import Placement
from actors.cluster.sharing import GpuSharing
from actors.evaluation import evaluate
from actors.rewards.score import Rewards
from actors.roles import Role, roles_of
from actors.rollouts.generator import Engines
from actors.run_data import RunData
from actors.settings import RLRecipe
from actors.weights.transfer import transfer_backend
from learners.rows import Prompt


def start_groups(
    roles: Mapping[str, Role], facts: Mapping[str, Any], placement: Placement
) -> dict[str, WorkerGroup]:
    """Start every process and wait until all have loaded; `facts` are what the data know.

    Raises WorkerError that names those which have not loaded by the start deadline.
    """
    cluster = placement.cluster
    groups = {name: _make_group(role, placement) for name, role in roles.items()}
    starting: dict[str, list[Any]] = {}
    for name, role in roles.items():
        starting[name] = groups[name].start(
            {**role.arguments, **{fact: facts[fact] for fact in role.from_data}},
            cluster.start_deadline_s,
            distributed=(cluster.device, cluster.call_deadline_s) if role.learner else None,
            each=role.each,
        )
        if role.kind == "engine" and placement.shared:
            # vLLM takes its share of what is free when it starts: it starts alone, and makes room.
            groups[name].gather(starting.pop(name), "start", cluster.start_deadline_s)
            groups[name].call("sleep", phase="start", deadline_s=cluster.call_deadline_s)
    for name, pending in starting.items():
        groups[name].gather(pending, "start", cluster.start_deadline_s)
    return groups


def _make_group(role: Role, placement: Placement) -> WorkerGroup:
    """Begin a role's processes, still empty."""
    options = placement.options(role.name)
    return (
        Engines(options) if role.kind == "engine" else WorkerGroup(role.name, role.target, options)
    )


class Workers:
    """The running processes of one RL run, by role; `critic`, `reference` and `evaluator` are None
    where the recipe has none.
    """

    def __init__(self, recipe: RLRecipe, data: RunData, placement: Placement) -> None:
        """Start them all."""
        roles = roles_of(recipe)
        groups = start_groups(roles, data.facts(recipe), placement)
        self.recipe = recipe
        self.tokenizer = data.tokenizer
        self.groups = groups
        engines = groups["engine"]
        assert isinstance(engines, Engines)
        self.engines = engines
        self.actor = groups["actor"]
        self.critic = groups.get("critic")
        self.reference = groups.get("reference")
        self.evaluator = groups.get("evaluator")
        self.learners = {name: groups[name] for name, role in roles.items() if role.learner}
        self.frozen = [groups[name] for name, role in roles.items() if role.kind == "frozen"]
        deadline = recipe.cluster.call_deadline_s
        sources = [groups[f"reward {reward.name}"] for reward in recipe.rewards]
        self.rewards = Rewards(recipe.rewards, sources, deadline)
        shared = roles if placement.shared else {}
        on_gpus = {name: groups[name] for name, role in shared.items() if role.gpus}
        self.gpu_sharing = GpuSharing(on_gpus, deadline)
        longest = data.facts(recipe)["max_model_tokens"]
        self.probe = probe_ids(data.prompts, min(recipe.sync.probe_tokens, longest - 1))

    def connect_engines(self, version: int) -> None:
        """Open the way from Actor to engines. At version 0 both loaded the same files; later the
        engines are behind.
        """
        cluster = self.recipe.cluster
        deadline = self.recipe.sync.deadline_s
        self.actor.call(
            "connect",
            self.engines.handles,
            deadline,
            self.recipe.generation.tensor_parallel,
            transfer_backend(cluster.device, shares_gpus(cluster)),
            self.actor.free_address(deadline),
            self.engines.names(),
            phase="sync",
            deadline_s=deadline,
        )
        if version:
            self.sync(version)

    def sync(self, version: int) -> float:
        """Bring the Actor's weights into every engine and prove it; return the largest probe
        difference in nats.
        """
        self.gpu_sharing.sync()
        recipe = self.recipe
        return self.engines.sync(
            self.actor,
            version,
            self.probe,
            recipe.sync.deadline_s,
            recipe.max_logprob_diff,
            recipe.mean_logprob_diff,
        )

    def fingerprints(self) -> list[str]:
        """Return the fingerprints of all frozen models."""
        deadline = self.recipe.cluster.call_deadline_s
        found = (
            g.call("fingerprint", phase="fingerprint", deadline_s=deadline) for g in self.frozen
        )
        return [one for group in found for one in group]

    def check_frozen(self, before: list[str]) -> None:
        """Raise WorkerError unless Reference and Reward models are bit by bit what they were."""
        if self.fingerprints() != before:
            raise WorkerError("export: a frozen model (Reference or Reward) changed during the run")

    def evaluate(self, prompts: Sequence[Prompt], name: str) -> tuple[dict[str, float], list[str]]:
        """Return metrics of held-out prompts under `name`, none without prompts; and the errors of
        the function that scores them.
        """
        if self.evaluator is None or not prompts:
            return {}, []
        return evaluate(self.engines, self.evaluator, prompts, self.recipe, self.tokenizer, name)


def probe_ids(prompts: Sequence[Prompt], tokens: int) -> list[int]:
    """Return the fixed sequence that proves a sync: the first prompts' ids, one after the other,
    repeated if need be.
    """
    ids = [i for prompt in prompts[:tokens] for i in prompt.ids]
    return (ids * tokens)[:tokens]
