"""Start the processes of a recipe, all at once, as the table of roles describes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from actors.cluster.groups import WorkerError, WorkerGroup
from actors.cluster.placement import Placement
from actors.cluster.sharing import GpuSharing
from actors.rewards.score import Rewards
from actors.roles import Role, roles_of
from actors.rollouts.generator import Engines
from actors.run_data import RunData
from actors.settings import RLRecipe
from actors.weights.sync import WeightSync, probe_ids


def start_groups(
    roles: Mapping[str, Role], facts: Mapping[str, Any], placement: Placement
) -> dict[str, WorkerGroup]:
    """Start every process and wait until all have loaded; return the groups by role.

    `facts` come from the data (`Role.from_data`). Raises WorkerError that names the processes which
    have not loaded by the start deadline.
    """
    cluster = placement.cluster
    groups = {  # their processes begin, still empty
        name: (Engines if role.kind == "engine" else WorkerGroup)(
            name, role.target, placement.options(name)
        )
        for name, role in roles.items()
    }
    starting: dict[str, list[Any]] = {}
    for name, role in roles.items():
        starting[name] = groups[name].start(
            {**role.arguments, **{fact: facts[fact] for fact in role.from_data}},
            cluster.start_deadline_s,
            distributed=(cluster.device, cluster.call_deadline_s) if role.learner else None,
            each=role.each,
        )
        if role.kind == "engine" and placement.shared and cluster.tier != "never":
            # vLLM takes its share of what is free when it starts: it starts alone, and makes room.
            groups[name].gather(starting.pop(name), "start", cluster.start_deadline_s)
            groups[name].call(
                "sleep", cluster.tier, phase="start", deadline_s=cluster.call_deadline_s
            )
    for name, pending in starting.items():
        groups[name].gather(pending, "start", cluster.start_deadline_s)
    return groups


class Workers:
    """The running processes of one RL run, by role; `critic`, `reference` and `evaluator` are None
    where the recipe has none. `reference` is the group that gives the Reference's log-probs, and
    its method.
    """

    def __init__(self, recipe: RLRecipe, data: RunData, placement: Placement) -> None:
        """Start them all and wait until they have loaded."""
        roles = roles_of(recipe)
        facts = data.facts(recipe)
        groups = start_groups(roles, facts, placement)
        self.groups = groups
        engines = groups["engine"]
        assert isinstance(engines, Engines)
        self.engines = engines
        self.actor = groups["actor"]
        self.critic = groups.get("critic")
        self.reference = (self.actor, "base_infer") if recipe.shares_reference else None
        if "reference" in groups:
            self.reference = (groups["reference"], "logprobs")
        self.evaluator = groups.get("evaluator")
        self.learners = {name: groups[name] for name, role in roles.items() if role.learner}
        methods = {name: role.fingerprint for name, role in roles.items()}
        self.frozen = {name: (groups[name], method) for name, method in methods.items() if method}
        self.deadline_s = recipe.cluster.call_deadline_s
        sources = [groups[f"reward {reward.name}"] for reward in recipe.rewards]
        compared = recipe.step.group_size if recipe.algorithm.compares_groups else 1
        self.rewards = Rewards(recipe.rewards, sources, self.deadline_s, compared)
        shared = roles if placement.shared else {}
        on_gpus = {name: groups[name] for name, role in shared.items() if role.gpus}
        self.gpu_sharing = GpuSharing(on_gpus, self.deadline_s, recipe.cluster.tier)
        longest = facts["max_model_tokens"]
        probe = probe_ids(data.prompts, min(recipe.sync.probe_tokens, longest - 1))
        self.weights = WeightSync(self.actor, engines, self.gpu_sharing, probe, recipe)
        self.loaded = self.fingerprints()

    def fingerprints(self) -> dict[str, list[str]]:
        """Return the fingerprints of all frozen models, and of what is frozen below an adapter, by
        role; one a process.
        """
        deadline_s = self.deadline_s
        return {
            name: group.call(method, phase="fingerprint", deadline_s=deadline_s)
            for name, (group, method) in self.frozen.items()
        }

    def check_frozen(self) -> None:
        """Raise WorkerError unless Reference and Reward models, and the models below adapters, are
        as they were loaded.
        """
        now = self.fingerprints()
        if changed := [name for name, prints in self.loaded.items() if now[name] != prints]:
            raise WorkerError(
                f"export: a frozen model ({', '.join(changed)}) changed during the run"
            )
