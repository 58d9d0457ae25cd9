"""Contents of every GPU and of every node's CPU memory, phase by phase, and what is too much."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from actors.cluster.layout import shares_gpus
from actors.settings import Recipe, RLRecipe
from launch.plan import memory
from launch.plan.batches import load
from launch.plan.memory import GIB, PHASES, Footprint, Use, sum_of, total
from launch.plan.nodes import Device, Kind, NodePlan
from launch.plan.shapes import Model


@dataclass(frozen=True)
class Memory:
    """GPUs, or CPU memories of nodes, that hold the same: where they are, how many bytes each has,
    and what is there: roles, what one process of it holds in each phase, and how many processes
    there are.
    """

    devices: list[Device]
    limit: int | None
    held: list[tuple[str, dict[str, Use], int]]
    phases: Sequence[str]

    @property
    def is_gpu(self) -> bool:
        return self.devices[0][1] is not None

    @cached_property
    def uses(self) -> dict[str, dict[str, Use]]:
        """Phase -> role -> component -> bytes on one device."""
        found: dict[str, dict[str, Use]] = {phase: {} for phase in self.phases}
        for role, use, count in self.held:
            for phase, roles in found.items():
                roles[role] = sum_of(roles.get(role, {}), *[use[phase]] * count)
        return found

    @cached_property
    def peak(self) -> tuple[str, int]:
        """The phase that holds most, and how much."""
        sizes = {
            phase: sum(total(use[phase]) * count for _, use, count in self.held)
            for phase in self.phases
        }
        return max(sizes.items(), key=lambda item: item[1])

    @property
    def headroom(self) -> int | None:
        return None if self.limit is None else self.limit - self.peak[1]

    @property
    def overflows(self) -> bool:
        return self.headroom is not None and self.headroom < 0


def footprints(
    recipe: Recipe, models: Mapping[str, Model], where: NodePlan, longest: int
) -> dict[Kind, Footprint]:
    """Return what one process of every kind takes; functions are those that have no model."""
    found = {(name, False): memory.function() for name, _ in where.need}
    for name, model in models.items():
        found[name, False] = _footprint(recipe, model, longest)
    if actor := models.get("actor"):
        assert isinstance(recipe, RLRecipe)
        found["actor", True] = memory.sending(found["actor", False], actor, recipe)
    if shares_gpus(recipe.cluster) and recipe.cluster.tier == "never":
        return {kind: memory.keeping(one) for kind, one in found.items()}
    return found


def _footprint(recipe: Recipe, model: Model, longest: int) -> Footprint:
    """Return what one process of a role takes, but for sending weights."""
    role = model.role
    reads = load(recipe, role, longest)
    if role.learner:
        learns = load(recipe, role, longest, learning=True)
        return memory.learner(model, role.learner, reads, learns, recipe.cluster)
    if role.kind == "frozen":
        return memory.frozen(model, reads, recipe.cluster)
    assert isinstance(recipe, RLRecipe)
    return memory.engine(model, recipe.generation, recipe.cluster, longest)


def memories(recipe: Recipe, held: Mapping[Kind, Footprint], where: NodePlan) -> list[Memory]:
    """Return every GPU in use, and every node's CPU memory; those that hold the same are one."""
    cluster = recipe.cluster
    gpu = int(cluster.gpu_memory_gib * GIB)
    node = cluster.node_memory_gib
    host = None if node is None else int(node * GIB)
    phases: Sequence[str] = PHASES
    if not isinstance(recipe, RLRecipe):
        phases = ("start", "score", "learn") if recipe.held_out else ("start", "learn")
    found = []
    for devices, kinds in where.alike:
        on_gpu = devices[0][1] is not None
        uses = [
            (kind[0], held[kind].device if on_gpu else held[kind].host, count)
            for kind, count in kinds.items()
        ]
        found.append(Memory(devices, gpu if on_gpu else host, uses, phases))
    return found


def memory_problems(found: list[Memory]) -> Iterator[str]:
    """Yield one line for all devices that overflow alike."""
    over: dict[tuple[str, int, bool], list[Memory]] = {}
    for one in found:
        if one.overflows:
            over.setdefault((*one.peak, one.is_gpu), []).append(one)
    for (phase, size, _), group in over.items():
        limit = group[0].limit or 0
        role, use = max(group[0].uses[phase].items(), key=lambda item: total(item[1]))
        yield (
            f"{where_are(group)}: {phase} needs {size / GIB:.1f} GiB, there are {limit / GIB:.4g}; "
            f"most of it is {role}: {_largest_parts(use)}"
        )


def _largest_parts(use: Use) -> str:
    parts = sorted(use.items(), key=lambda item: -item[1])[:2]
    return ", ".join(f"{component.replace('_', ' ')} {size / GIB:.1f}" for component, size in parts)


def where_are(memories: list[Memory]) -> str:
    """Return devices in a few words: node 0 GPU 0-3, node 1-3 GPU 0-7."""
    devices = [device for m in memories for device in m.devices]
    if not memories[0].is_gpu:
        return f"node {ranges([node for node, _ in devices])} CPU memory"
    by_node: dict[int, list[int]] = {}
    for node, gpu in devices:
        by_node.setdefault(node, []).append(gpu or 0)
    alike: dict[str, list[int]] = {}
    for node, gpus in by_node.items():
        alike.setdefault(ranges(gpus), []).append(node)
    return ", ".join(f"node {ranges(nodes)} GPU {gpus}" for gpus, nodes in alike.items())


def ranges(numbers: list[int]) -> str:
    """Return 0-3,5 for 0, 1, 2, 3, 5."""
    runs: list[list[int]] = []
    for n in sorted(set(numbers)):
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
