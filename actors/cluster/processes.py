"""The processes of a recipe, as the table of roles describes them: begun empty, so that they import
their modules while the driver reads the data; then all of them load.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from actors.cluster.groups import WorkerGroup
from actors.cluster.placement import Placement
from actors.roles import Role
from actors.rollouts.generator import Engines
from learners.spans import Span, Stopwatch


class Processes:
    """The processes of the roles, by role in `groups`, in the places that `placement` has."""

    def __init__(self, roles: Mapping[str, Role], placement: Placement) -> None:
        """Begin them all, and have each import its modules as soon as it is there."""
        self.roles = roles
        self.placement = placement
        self.stopwatch = Stopwatch()
        self.groups = {
            name: (Engines if role.kind == "engine" else WorkerGroup)(
                name, role.target, placement.options(name)
            )
            for name, role in roles.items()
        }
        device = placement.cluster.device
        self.imports = {
            name: group.prepare(roles[name].prepare, device) for name, group in self.groups.items()
        }

    def start(self, facts: Mapping[str, Any]) -> dict[str, WorkerGroup]:
        """Have every process load, and wait until all have; return the groups by role.

        `facts` come from the data (`Role.from_data`). Raises WorkerError that names the processes
        which have not loaded by the start deadline.
        """
        starting: dict[str, list[Any]] = {}
        for name, role in self.roles.items():
            starting[name] = self._load(name, role, facts)
            if role.kind == "engine" and self.placement.shared and self._makes_room():
                # vLLM takes its share of what is free when it starts: it starts alone, and leaves.
                self._loaded(name, starting.pop(name))
                cluster = self.placement.cluster
                self.groups[name].call(
                    "sleep", cluster.tier, phase="start", deadline_s=cluster.call_deadline_s
                )
        for name, pending in starting.items():
            self._loaded(name, pending)
        return self.groups

    def _makes_room(self) -> bool:
        """Tell whether the engines leave the GPUs that they share once they have loaded. Where
        nothing is ever taken off, the recipe says how much they take, and all load at once.
        """
        return self.placement.cluster.tier != "never"

    def _load(self, name: str, role: Role, facts: Mapping[str, Any]) -> list[Any]:
        cluster = self.placement.cluster
        return self.groups[name].start(
            {**role.arguments, **{fact: facts[fact] for fact in role.from_data}},
            cluster.start_deadline_s,
            distributed=(cluster.device, cluster.call_deadline_s) if role.learner else None,
            each=role.each,
        )

    def _loaded(self, name: str, pending: Sequence[Any]) -> None:
        """Wait until the processes of a role have loaded; keep how long they took."""
        deadline_s = self.placement.cluster.start_deadline_s
        group = self.groups[name]
        loaded = group.gather(pending, "start", deadline_s)
        imported = group.gather(self.imports[name], "start", deadline_s)
        for part, spans in (("import", imported), ("load", loaded)):
            self.stopwatch.add([slowest(f"{part} {name}", [span for s in spans for span in s])])


def slowest(name: str, spans: Sequence[Span]) -> Span:
    """Return the longest of the spans under a name."""
    return max(spans, key=lambda span: span.seconds)._replace(name=name)


def start_groups(
    roles: Mapping[str, Role], facts: Mapping[str, Any], placement: Placement
) -> dict[str, WorkerGroup]:
    """Begin every process and have it load; return the groups by role (`Processes.start`)."""
    return Processes(roles, placement).start(facts)
