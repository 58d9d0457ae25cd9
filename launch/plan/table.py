"""A plan on one screen, and into a file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from actors.cluster.layout import shares_gpus
from actors.settings import Recipe, RLRecipe
from launch.plan.adapters import trained
from launch.plan.devices import Memory, where_are
from launch.plan.hints import hints_for
from launch.plan.memory import GIB, Use, model_states, sum_of, total
from launch.plan.plan import Plan, as_json, make_plan
from launch.plan.shapes import Model
from launch.plan.swap import TIERS
from launch.recipe.document import Document
from learners.errors import UserError
from learners.settings import LearnerSettings

WIDTH = 116  # at least: a narrow terminal wraps lines itself
COLUMNS = {
    "weights": ("weights",),
    "grads": ("gradients",),
    "optimizer": ("optimizer",),
    "activ.": ("activations",),
    "KV": ("kv_cache",),
    "buffers": ("buffers", "sync", "runtime"),
}


def show_plan(
    recipe: Recipe, json_file: Path | None = None, document: Document | None = None
) -> bool:
    """Print the plan, write it as JSON if asked, and say whether the recipe fits. `document` knows
    where every value is written.
    """
    plan = make_plan(recipe, document)
    hints = hints_for(plan)
    if json_file is not None:
        try:
            json_file.write_text(
                json.dumps(as_json(plan, hints), indent=2) + "\n", encoding="utf-8"
            )
        except OSError as error:
            raise UserError(f"--json: {json_file} cannot be written: {error.strerror}") from None
    print_plan(plan, hints)
    return plan.fits


def print_plan(plan: Plan, hints: Mapping[str, str]) -> None:
    console = Console(highlight=False)
    console.width = max(console.width, WIDTH)
    for title, lines in (
        ("Models", _models(plan)),
        ("Batch", _batch(plan)),
        ("Sync", _sync(plan)),
        ("Swap", _swap(plan)),
    ):
        for i, line in enumerate(lines):
            console.print(Text(f"{title if not i else '':<9}{line}"))
    console.print(_memory_table(plan))
    console.print(Text(f"{'Time':<9}{_time(plan)}"))
    verdict = "It fits." if plan.fits else "It does not fit."
    console.print(Text(verdict, style="bold green" if plan.fits else "bold red"))
    for problem in plan.problems:
        console.print(Text(f"  {problem}"))
    if not plan.fits:
        console.print(Text(f"  {_advice(hints)}"))


def _models(plan: Plan) -> Iterator[str]:
    """Yield the models; roles that share one share a line."""
    roles: dict[tuple[str, int, str], list[str]] = {}
    for role, m in plan.models.items():
        roles.setdefault((m.settings.path, m.parameters, m.settings.dtype), []).append(role)
    for (path, parameters, dtype), names in roles.items():
        yield f"{path}: {_count(parameters)} parameters, {dtype} ({', '.join(names)})"
    for role, m in plan.models.items():
        if m.role.learner and m.settings.lora:
            yield f"{role}: {_saved(m, m.role.learner, m.settings.lora.rank)}"
    if isinstance(plan.recipe, RLRecipe) and plan.recipe.shares_reference:
        yield "the Reference is the Actor without its adapter"
    for family in dict.fromkeys(
        m.shape.family for m in plan.models.values() if m.shape.own_head is not None
    ):
        yield f"{family} is not in the table: counted on torch's meta device, which takes seconds"


def _saved(model: Model, settings: LearnerSettings, rank: int) -> str:
    """Return how many parameters LoRA trains, and what a rank holds for them and for all."""
    head = model.role.head
    all_learn = settings.model.model_copy(update={"lora": None})
    held, whole = (
        sum(model_states(model.shape, head, s)[part] for part in ("gradients", "optimizer"))
        for s in (settings, settings.model_copy(update={"model": all_learn}))
    )
    count = _count(trained(model.shape, head, model.settings))
    return (
        f"LoRA of rank {rank} trains {count} parameters: gradients and optimizer "
        f"{_gib(held)} GiB a rank instead of {_gib(whole)}"
    )


def _batch(plan: Plan) -> Iterator[str]:
    b = plan.batch
    if "prompts" in b:
        yield (
            f"{b['prompts']} prompts × {b['group_size']} = {b['sequences']} sequences of up to "
            f"{b['longest_sequence_tokens']} tokens → "
            f"{_many(b['mini_batches'], 'mini-batch', 'es')} of "
            f"{b['mini_batch_size']}" + (f" × {b['epochs']} epochs" if b["epochs"] > 1 else "")
        )
    else:
        yield (
            f"{b['examples']} examples = {b['sequences']} sequences of up to "
            f"{b['longest_sequence_tokens']} tokens"
        )
    for role, r in b["ranks"].items():
        yield (
            f"{role}: {_many(r['ranks'], 'rank')} × {r['sequences_per_rank']} sequences, in up to "
            f"{_many(r['micro_batches_at_most'], 'micro-batch', 'es')} of "
            f"{r['micro_batch_tokens']} tokens"
        )
    run = f", {b['optimizer_steps']} in the run of {b['steps']}" if b["steps"] else ""
    yield f"→ {_many(b['optimizer_steps_per_step'], 'optimizer step')} a step{run}"


def _sync(plan: Plan) -> Iterator[str]:
    if not isinstance(plan.recipe, RLRecipe):
        return
    s = plan.sync
    engines = _many(s["engines"], "engine") + (
        f" on {s['devices']} GPUs" if s["devices"] > s["engines"] else ""
    )
    yield f"{_size(s['bytes'])} of weights a step to {engines}"
    yield (
        f"an engine's KV cache holds {plan.kv_room} of {plan.recipe.generation.max_concurrent} "
        "sequences at full length"
    )


def _swap(plan: Plan) -> Iterator[str]:
    """Yield what leaves the GPUs that roles share."""
    if shares_gpus(plan.recipe.cluster) and isinstance(plan.recipe, RLRecipe):
        why = "as the recipe says" if plan.recipe.cluster.swap != "auto" else "by arithmetic"
        yield f"{plan.tier} ({why}): {TIERS[plan.tier]}; {_size(plan.swapped)} move a step"


def _memory_table(plan: Plan) -> Table:
    """Return memory as a table in GiB; devices that hold the same in their largest phase share
    rows.
    """
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("GiB, largest phase")
    table.add_column("role", no_wrap=True)
    for name in (*COLUMNS, "sum", "of", "free"):
        table.add_column(name, justify="right", no_wrap=True)
    for group in _alike(plan.memories):
        where = f"{where_are(group)}, {group[0].peak[0]}"
        for i, row in enumerate(_rows(group[0], plan.recipe.cluster.device == "cuda")):
            table.add_row(*([where, *row] if not i else ["", *row]))
    return table


def _rows(one: Memory, gpus: bool) -> Iterator[list[str]]:
    """Yield one row per role, and one for all where several share the device. CPU memory beside
    GPUs is one row.
    """
    phase, size = one.peak
    uses = one.uses[phase]
    bound = [_gib(size), _gib(one.limit), _gib(one.headroom)]
    if len(uses) == 1:
        yield from ([role, *_cells(use), *bound] for role, use in uses.items())
    elif gpus and not one.is_gpu:
        yield ["all", *_cells(sum_of(*uses.values())), *bound]
    else:
        yield from ([role, *_cells(use), _gib(total(use)), "", ""] for role, use in uses.items())
        yield ["all", *[""] * len(COLUMNS), *bound]


def _alike(memories: list[Memory]) -> Iterator[list[Memory]]:
    groups: dict[Any, list[Memory]] = {}
    for m in memories:
        same = tuple((role, tuple(_cells(use))) for role, use in m.uses[m.peak[0]].items())
        groups.setdefault((m.is_gpu, m.peak[0], same), []).append(m)
    yield from groups.values()


def _cells(use: Use) -> list[str]:
    return [_gib(sum(use.get(c, 0) for c in parts)) for parts in COLUMNS.values()]


def _time(plan: Plan) -> str:
    whole = sum(plan.seconds.values())
    shares = ", ".join(f"{phase} {seconds / whole:.0%}" for phase, seconds in plan.seconds.items())
    return f"rough estimate, nothing measured: {shares} of a step"


def _advice(hints: Mapping[str, str]) -> str:
    if not hints:
        return "No key helps: it takes a smaller model, shorter sequences or more memory."
    return f"These help: {', '.join(f'{key} {what}' for key, what in hints.items())}"


def _many(count: int, what: str, plural: str = "s") -> str:
    return f"{count} {what}{plural if count != 1 else ''}"


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.2f} B" if parameters >= 1e8 else f"{parameters / 1e6:.2f} M"


def _size(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _gib(size: int | None) -> str:
    """Return GiB with one decimal; nothing for nothing, three decimals for what would round
    to 0.
    """
    if size is None:
        return "?"
    if size == 0:
        return ""
    value = size / GIB
    return f"{value:.1f}" if abs(value) >= 0.05 else f"{value:.3f}"
