"""`quatuor inspect` on the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.text import Text

from launch.inspect import (
    MEASURED_ON,
    TRAINED_ON,
    Numbers,
    Source,
    also_in,
    buckets,
    count,
    first_rows,
    read_by_model,
    repeated,
    trained_of,
)

BAR = 40  # of the fullest bucket, letters
NAMED = 5  # rows named one by one
IDS = 64  # of a row that are printed
TRAINED = "bold green underline"
MARKS = ("«", "»")  # around what is trained where there are no colours


def show(every: Sequence[Source], data: Any, rows: int) -> None:
    """Print every source in numbers, what there is to say, and the first rows of each."""
    console = Console(highlight=False, soft_wrap=True)
    counted = {source.name: count(source, data.tokenizer) for source in every}
    for source in every:
        console.print(Text(f"{source.name}: {source.summary}", style="bold"))
        for line in _in_numbers(source, every, counted):
            console.print(Text(f"  {line}"))
    for line in data.notices:
        console.print(Text(f"notice: {printable(line)}"))
    for source in every:
        for row in first_rows(source, rows):
            names = ("chosen", "rejected") if len(read_by_model(row)) > 1 else ("",)
            for name, piece in zip(names, read_by_model(row), strict=True):
                title = " ".join(filter(None, [f"{source.name}: row {row.row}", name]))
                console.print(Text(f"\n{title} ({len(piece.ids)} tokens)", style="bold"))
                console.print(marked(piece, data.tokenizer, console.is_terminal))
                console.print(_ids(piece, console.is_terminal))


def _in_numbers(
    source: Source, every: Sequence[Source], counted: Mapping[str, Numbers]
) -> Iterator[str]:
    own = counted[source.name]
    found = buckets(own.lengths)
    fullest = max(rows for _, _, rows in found)
    width = len(f"{found[-1][0]}-{found[-1][1]}")
    for low, high, rows in found:
        span = f"{low}-{high}" if high > low else str(low)
        bar = "#" * -(-BAR * rows // fullest)
        yield f"{span:>{width}} tokens  {bar:<{BAR}}  {rows}"
    special = ", ".join(f"{printable(token)} {n}" for token, n in own.special.most_common())
    yield f"special tokens: {special or 'none'}"
    if again := repeated(own):
        yield f"repeated: {len(again)} rows are, id for id, earlier ones: {_numbers(again)}"
    for other in every:
        earlier = other.key == source.key and other.places.stop <= source.places.start
        trained = other.key in TRAINED_ON and source.key in MEASURED_ON
        seen = also_in(own, counted[other.name]) if earlier or trained else []
        if seen:
            word = "trained on" if trained else "repeated"
            yield f"{word}: {len(seen)} rows are, id for id, in {other.name}: {_numbers(seen)}"


def _numbers(numbers: Sequence[int]) -> str:
    more = f" and {len(numbers) - NAMED} more" if len(numbers) > NAMED else ""
    return f"row {', '.join(map(str, numbers[:NAMED]))}{more}"


def marked(piece: Any, tokenizer: Any, coloured: bool) -> Text:
    """Return the text that a prompt's or an example's ids stand for, with what is trained
    marked.
    """
    text = Text()
    written = ""
    end = 0
    for trained, group in groupby(trained_of(piece)):
        end += len(list(group))
        # ids are read from the first on: alone, some would lose a space or half a letter
        whole = tokenizer.decode(piece.ids[:end], clean_up_tokenization_spaces=False)
        _append(text, printable(whole[len(written) :]), bool(trained), coloured)
        written = whole
    return text


def _ids(piece: Any, coloured: bool) -> Text:
    """Return the ids of a prompt or an example, those that are trained marked."""
    text = Text()
    shown = zip(piece.ids[:IDS], trained_of(piece), strict=False)
    for trained, group in groupby(shown, key=lambda one: one[1]):
        if text:
            text.append(" ")
        _append(text, " ".join(str(i) for i, _ in group), bool(trained), coloured)
    if len(piece.ids) > IDS:
        text.append(f" and {len(piece.ids) - IDS} more")
    return text


def _append(text: Text, part: str, trained: bool, coloured: bool) -> None:
    if coloured or not trained:
        text.append(part, style=TRAINED if trained else "")
    else:
        text.append(part.join(MARKS))


def printable(text: str) -> str:
    """Return a text without letters that would command a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)
