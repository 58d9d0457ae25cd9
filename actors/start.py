"""The running processes of an RL run, by role."""

from __future__ import annotations

from actors.cluster.groups import WorkerError
from actors.cluster.processes import Processes
from actors.cluster.sharing import GpuSharing
from actors.rewards.score import Rewards
from actors.roles import roles_of
from actors.rollouts.generator import Engines
from actors.run_data import RunData
from actors.settings import RLRecipe
from actors.weights.sync import WeightSync, probe_ids


class Workers:
    """The running processes of one RL run, by role; `critic`, `reference` and `evaluator` are None
    where the recipe has none. `reference` is the group that gives the Reference's log-probs, and
    its method.
    """

    def __init__(self, recipe: RLRecipe, data: RunData, processes: Processes) -> None:
        """Have them all load, and wait until they have."""
        roles = roles_of(recipe)
        placement = processes.placement
        facts = data.facts(recipe)
        groups = processes.start(facts)
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
