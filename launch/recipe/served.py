"""Types of models that vLLM cannot run, told from the text of installed packages: importing them
takes seconds.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

REGISTERED = re.compile(r'^ {4}"(\w+)": \(', re.MULTILINE)
ENTRY = re.compile(r'^ {4}"(\w+)": \(\s*"([\w.]+)",\s*"(\w+)"', re.MULTILINE)
CAPABILITIES = ("Supports", "Is", "Has", "MixtureOfExperts")  # bases that are no other model
ATTENTION = re.compile(r"^class \w*Attention\w*\(nn\.Module\):", re.MULTILINE)
EXCHANGEABLE = ("_supports_attention_backend = True", "ALL_ATTENTION_FUNCTIONS.get_interface(")


def not_served(config: Mapping[str, Any]) -> str:
    """Return why no engine could run a model with this config.json; nothing where one can, or where
    these files do not tell: code of its own, or a package that is not installed.
    """
    names = [str(name) for name in config.get("architectures") or ()]
    kind = str(config.get("model_type")).replace("-", "_")
    registered = registered_names()
    if not names or not registered or config.get("auto_map") or registered.intersection(names):
        return ""
    # for others vLLM takes Transformers' class, where its attention can be exchanged
    code = _text("transformers", f"models/{kind}/modeling_{kind}.py")
    if not ATTENTION.search(code) or any(words in code for words in EXCHANGEABLE):
        return ""
    return (
        f"vLLM cannot run {names[0]}, so no engine could sample from it; use a model of another "
        "family (sft and rm train this one)"
    )


def no_adapters(config: Mapping[str, Any]) -> str:
    """Return why vLLM would serve no LoRA adapter for a model with this config.json; nothing where
    it does, or where the text of its class does not tell: it may come from another class.
    """
    names = [str(name) for name in config.get("architectures") or ()]
    entry = next((found for name in names if (found := _entries().get(name))), None)
    if entry is None:
        return ""
    module, name = entry
    file = module.removeprefix("vllm.").replace(".", "/")
    code = _text("vllm", f"{file}.py" if module != file else f"model_executor/models/{file}.py")
    written = re.search(rf"^class {name}\(([^)]*)\)", code, re.MULTILINE)
    bases = [base.strip() for base in written[1].split(",") if base.strip()] if written else []
    alone = bases and all(base == "nn.Module" or base.startswith(CAPABILITIES) for base in bases)
    if not alone or "SupportsLoRA" in bases:
        return ""
    return f"vLLM serves no adapters for {names[0]}: use merged, which sends them in the weights"


@cache
def _entries() -> dict[str, tuple[str, str]]:
    """Return module and class in vLLM by the names of its registry."""
    found = ENTRY.findall(_text("vllm", "model_executor/models/registry.py"))
    return {name: (module, served) for name, module, served in found}


@cache
def registered_names() -> frozenset[str]:
    """Return the classes of models in vLLM's registry; none where vLLM is not installed."""
    return frozenset(REGISTERED.findall(_text("vllm", "model_executor/models/registry.py")))


def _text(package: str, file: str) -> str:
    """Return a source file of an installed package, which is not imported; nothing where there is
    none.
    """
    spec = find_spec(package)
    paths = [Path(folder) / file for folder in (spec and spec.submodule_search_locations) or ()]
    return next((path.read_text(encoding="utf-8") for path in paths if path.is_file()), "")
