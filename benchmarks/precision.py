"""How far the log-probs of engine and Actor lie apart on the same tokens, by dtype.

    .venv/bin/python benchmarks/precision.py --json FILE [--device cuda] [--models tiny,27m,135m]

Models are drawn at random in the shape of their name, or loaded from a folder. The engine samples
responses at temperature 1, the Actor reads them; nats, over all tokens of the responses. On a GPU
each case has a process of its own, which gives the memory back.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Literal, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run as a script, Python looks beside it alone


class Case(NamedTuple):
    """One way to compute: the dtype of the weights, and that of the output layer where it is
    another.
    """

    dtype: str
    head_dtype: str | None = None

    def __str__(self) -> str:
        return self.dtype + (f", {self.head_dtype} head" if self.head_dtype else "")


CASES = (Case("float32"), Case("bfloat16"), Case("bfloat16", "float32"))
SHAPES: dict[str, dict[str, Any]] = {  # of Qwen3 decoders
    "tiny": {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 192, "head_dim": 32}
    | {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
    "27m": {"vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1536, "head_dim": 64}
    | {"num_hidden_layers": 7, "num_attention_heads": 8, "num_key_value_heads": 4},
    "135m": {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "head_dim": 64}
    | {"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3},
    "0.6b": {"vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072, "head_dim": 128}
    | {"num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8},
}
SPREAD = 3.0  # of the embeddings, so that some tokens are likelier than others
PROMPT = 16  # tokens
END = 2  # the id that ends a response
FIRST = 4  # ordinary id


def save_model(name: str, folder: Path, device: str = "cpu") -> str:
    """Write a model of random weights in bfloat16 unless it is there; return its path."""
    if name not in SHAPES:
        return name
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    path = folder / name
    if not path.exists():
        ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": END}
        config = Qwen3Config(
            **SHAPES[name], **ends, tie_word_embeddings=True, max_position_embeddings=8192
        )
        torch.manual_seed(0)
        with torch.device(device):
            model = Qwen3ForCausalLM(config).to(torch.bfloat16)
        with torch.no_grad():
            model.model.embed_tokens.weight.mul_(SPREAD)
        model.save_pretrained(path)
    return str(path)


def difference(
    path: str, case: Case, device: Literal["cpu", "cuda"], sequences: int, tokens: int
) -> dict[str, float]:
    """Return how far engine and Actor lie apart on so many responses of up to so many tokens."""
    from actors.engine.engine import GenerationEngine
    from actors.settings import GenerationSettings
    from learners.checkpoints import load_causal_lm
    from learners.experience import Experience, map_rows
    from learners.forward import response_logprobs
    from learners.settings import ModelSettings

    settings = ModelSettings.model_validate({"path": path, **case._asdict()})
    generation = GenerationSettings(
        max_new_tokens=tokens, max_concurrent=sequences, gpu_memory_fraction=0.4
    )
    engine = GenerationEngine(settings, generation, device, PROMPT + tokens, [END])
    groups = [g for part in engine.generate(requests(path, sequences, tokens)) for g in part]
    engine.close()
    batch = Experience.from_rollouts([rollout for group in groups for rollout in group])
    model = load_causal_lm(settings).to(device).eval()
    read = map_rows(batch, 4096, lambda part: response_logprobs(model, part, 1.0), device)
    assert batch.rollout_logprobs is not None
    gaps = (read - batch.rollout_logprobs).abs()[batch.loss_mask]
    return {"max": float(gaps.max()), "mean": float(gaps.mean()), "tokens": len(gaps)}


def requests(path: str, count: int, tokens: int) -> list[Any]:
    """Return requests for one response each: to questions where the model has a tokenizer, else to
    random ids.
    """
    import torch

    from learners.experience import PromptRequest

    vocabulary = json.loads(Path(path, "config.json").read_text())["vocab_size"]
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(FIRST, vocabulary, (count, PROMPT), generator=draw).tolist()
    if Path(path, "tokenizer.json").exists():
        from learners.checkpoints import load_tokenizer
        from learners.settings import ModelSettings

        tokenizer = load_tokenizer(ModelSettings(path=path))
        asked = [f"Write a short story about {5 * i + 3} sheep and a wolf." for i in range(count)]
        ids = [tokenizer(text)["input_ids"][:PROMPT] for text in asked]
    return [PromptRequest(i, i, row, 1, 1.0, tokens, (i,)) for i, row in enumerate(ids)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, required=True, help="file for the numbers")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--models", default="tiny,27m,135m", help=f"of {', '.join(SHAPES)}, or folders"
    )
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=128, help="longest response")
    parser.add_argument("--folder", type=Path, help="where models are kept; default: nowhere")
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        for name in options.models.split(","):
            path = save_model(name, options.folder or Path(temporary), options.device)
            for case in CASES:
                began = time.monotonic()
                arguments = (path, case, options.device, options.sequences, options.tokens)
                if options.device == "cpu":
                    gaps = difference(*arguments)
                else:
                    with context.Pool(1) as pool:
                        gaps = pool.apply(difference, arguments)
                found.setdefault(name, {})[str(case)] = gaps
                print(f"{name}, {case}: {gaps} ({time.monotonic() - began:.0f} s)", flush=True)
                options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
