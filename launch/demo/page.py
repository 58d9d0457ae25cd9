"""One self-contained HTML page: a table of results and the curves of runs, as inline SVG. No
network, no script.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from actors.run.metrics import charts

Curve = list[tuple[int, float]]  # (step, value)
WIDTH = 460
HEIGHT = 250
LEFT = 44
RIGHT = 12
TOP = 10
BOTTOM = 36
STYLE = """
:root { color-scheme: light dark; --ink: #1c2026; --faint: #6b7280; --rule: #dfe3e8; --paper: #fff; --card: #f8f9fb;
  --s0: #2563eb; --s1: #d9480f; --s2: #0f8a5f; --s3: #9333ea; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --faint: #9aa3af; --rule: #333a44; --paper: #14171b;
  --card: #1b1f25; --s0: #6ea8fe; --s1: #ff9559; --s2: #4cc99a; --s3: #c792ff; } }
body { margin: 2.5rem auto; max-width: 62rem; padding: 0 1rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; font-weight: 600; } p { color: var(--faint); }
table { border-collapse: collapse; margin: 1.5rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem 1.4rem .4rem 0; text-align: right; border-bottom: 1px solid var(--rule); }
th { color: var(--faint); font-weight: 500; } :is(th, td):first-child { text-align: left; }
main { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1rem; }
figure { margin: 0; padding: .8rem 1rem; background: var(--card); border: 1px solid var(--rule); border-radius: 8px; }
figcaption { font-weight: 600; font-size: .9rem; margin-bottom: .3rem; } figcaption span { margin-right: 1rem; }
.key { font-weight: 400; color: var(--faint); } .key i { display: inline-block; width: 1.1rem; height: 3px;
  vertical-align: middle; margin-right: .35rem; background: var(--c); }
svg { width: 100%; height: auto; display: block; } svg text { fill: var(--faint); font-size: 11px; }
svg line { stroke: var(--rule); } svg polyline { fill: none; stroke: var(--c); stroke-width: 2; stroke-linejoin: round; }
svg circle { fill: var(--c); }
.s0 { --c: var(--s0); } .s1 { --c: var(--s1); } .s2 { --c: var(--s2); } .s3 { --c: var(--s3); }
"""


def write_page(
    path: str | Path,
    table: Sequence[Sequence[str]],
    runs: Mapping[str, str | Path],
    title: str = "Quatuor demo",
    note: str = "True accuracy: exact match, on prompts that no model was trained on.",
) -> None:
    """Write the page. `table` is rows of cells, the header first; `runs` maps labels to
    metrics.jsonl files.

    Each metric that the registry wants as a chart becomes one, with a curve for every run that has
    it.
    """
    curves = {
        name: {label: read_curve(run, metric) for label, run in runs.items()}
        for name, metric in charts().items()
    }
    figures = "\n".join(
        _figure(name, of_run) for name, of_run in curves.items() if any(of_run.values())
    )
    Path(path).write_text(
        '<!doctype html>\n<html lang="en"><head><meta '
        f'charset="utf-8"><title>{escape(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{STYLE}</style></head>\n<body><h1>{escape(title)}</h1>\n<p>{escape(note)}</p>\n"
        f"{_table(table)}\n<main>\n{figures}\n</main></body></html>\n",
        encoding="utf-8",
    )


def read_curve(metrics_jsonl: str | Path, metric: str) -> Curve:
    """Return all finite values of a metric by step; where a step was logged twice, the later value."""
    rows = [
        json.loads(line) for line in Path(metrics_jsonl).read_text(encoding="utf-8").splitlines()
    ]
    return sorted({row["step"]: row[metric] for row in rows if row.get(metric) is not None}.items())


def _table(table: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in table[0])
    rows = "".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>\n" for row in table[1:]
    )
    return f"<table><thead><tr>{head}</tr></thead>\n<tbody>\n{rows}</tbody></table>"


def _figure(title: str, curves: Mapping[str, Curve]) -> str:
    """Draw one chart with its legend. A run without values keeps its colour for the next chart."""
    keys = "".join(
        f'<span class="key s{i % 4}"><i></i>{escape(label)}</span>'
        for i, label in enumerate(curves)
        if curves[label]
    )
    caption = f"<figcaption><span>{escape(title)}</span>{keys}</figcaption>"
    return f"<figure>{caption}\n{_svg(title, curves)}</figure>"


def _svg(title: str, curves: Mapping[str, Curve]) -> str:
    x_ticks = _ticks([float(step) for curve in curves.values() for step, _ in curve], whole=True)
    y_ticks = _ticks([value for curve in curves.values() for _, value in curve])
    bottom = HEIGHT - BOTTOM

    def x(step: float) -> float:
        return LEFT + (step - x_ticks[0]) / (x_ticks[-1] - x_ticks[0]) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return bottom - (value - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]) * (bottom - TOP)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
    parts += [
        f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>\n'
        f'<text x="{LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>'
        for tick in y_ticks
    ]
    parts += [
        f'<text x="{x(tick):.1f}" y="{bottom + 16}" text-anchor="middle">{tick:g}</text>'
        for tick in x_ticks
    ]
    parts.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 4}" text-anchor="middle">step</text>'
    )
    for i, (label, curve) in enumerate(curves.items()):
        if curve:
            line = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in curve)
            circles = [
                f'<circle cx="{x(step):.1f}" cy="{y(value):.1f}" r="2.2">'
                f"<title>{escape(label)}, step {step}: {value:.4g}</title></circle>"
                for step, value in curve
            ]
            parts += [f'<g class="s{i % 4}"><polyline points="{line}"/>', *circles, "</g>"]
    return "\n".join(parts) + "\n</svg>"


def _ticks(values: Sequence[float], whole: bool = False) -> list[float]:
    """Return about five round numbers around `values`; 0 to 1 for shares; whole numbers on request."""
    low = min(values)
    high = max(values)
    if not whole and low >= 0 and high <= 1:
        low = 0.0
        high = 1.0
    rough = max(high - low, 1e-9 + abs(high) * 1e-6) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    size = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
    size = max(size, 1.0) if whole else size
    first = math.floor(low / size + 1e-9)
    last = math.ceil(high / size - 1e-9)
    return [round(i * size, 12) for i in range(first, max(last, first + 1) + 1)]
