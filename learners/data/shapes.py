"""Which columns a data set's rows are read from, and what a row says."""

from __future__ import annotations

from typing import Any

from learners.data.conversation import Conversation, Preference, Said


def recognised(data: Any, columns: Any) -> dict[str, str]:
    kind = type(data).__name__
    if kind == "PromptData":
        return {"prompt": data.columns.prompt or "prompt"}
    if kind == "SFTData":
        if "messages" in columns:
            return {"messages": "messages"}
        return {
            "prompt": data.columns.prompt or "prompt",
            "response": data.columns.response or "response",
        }
    return {"prompt": data.columns.prompt or "prompt", "chosen": "chosen", "rejected": "rejected"}


def prompt_of(data: Any, row: dict[str, Any], names: Any) -> Said:
    v = row[names["prompt"]]
    return v if isinstance(v, str) else Conversation(v, row.get("tools"), data.template_arguments)


def demonstration_of(data: Any, row: dict[str, Any], names: Any) -> Any:
    if "messages" in names:
        return Conversation(row["messages"], None, data.template_arguments)
    p = prompt_of(data, row, names)
    r = row[names["response"]]
    return (p, r) if isinstance(p, str) else p.answered({"role": "assistant", "content": r})


def preference_of(data: Any, row: dict[str, Any], names: Any) -> Preference:
    p = prompt_of(data, row, names)
    a, b = (row[names[n]] for n in ("chosen", "rejected"))
    if not isinstance(p, str):
        a, b = ([{"role": "assistant", "content": x}] for x in (a, b))
    return Preference(p, a, b)
