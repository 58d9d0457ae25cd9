"""Our engine against bare vLLM on the same requests, without seeds and with.

    .venv/bin/python benchmarks/generation.py --json FILE [--quick] [--device cuda] [--model NAME]

Both live in one process, take turns and have equal settings; the reference is vLLM's own engine and
front end, as `LLM.generate` drives them. Ours is the whole GenerationEngine: its loop thread, the
commands and the finished groups that pass between threads, versions and log-probs of every token.
All responses have full length, so both do the same work. The file has the comparison without
seeds, and the same for seeded requests under `seeded`, where `same_tokens` tells whether both
engines sampled the same.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run as a script, Python looks beside it alone

PROMPT_TOKENS = 16
GROUP = 8
LENGTHS = {"tiny": (8, 16), "27m": (8, 64), "0.6b": (32, 512), "1.7b": (32, 512)}  # prompts, tokens
ROUNDS = {"cpu": 5, "cuda": 3}
GPU_SHARE = 0.42  # of each of the two engines


def main() -> None:
    from benchmarks.measure import options

    arguments = options(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        rounds = 2 if arguments.quick else ROUNDS[arguments.device]
        found = measure(Path(folder), arguments.model, arguments.device, rounds)
    arguments.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=2))


def measure(folder: Path, name: str, device: Literal["cpu", "cuda"], rounds: int) -> dict[str, Any]:
    """Start both engines on a model of this shape and compare them."""
    import torch

    from actors.engine.engine import GenerationEngine
    from actors.settings import GenerationSettings
    from benchmarks.measure import compare
    from benchmarks.random_models import save_model
    from learners.settings import ModelSettings

    prompts, tokens = LENGTHS[name]
    save_model(folder, name, device)
    model = ModelSettings(path=str(folder), dtype="float32" if device == "cpu" else "bfloat16")
    cores = len(os.sched_getaffinity(0))
    settings = GenerationSettings(
        threads=cores,
        kv_cache_gib=0.5,
        max_concurrent=prompts * GROUP,
        gpu_memory_fraction=GPU_SHARE,
    )
    torch.set_num_threads(cores)  # of this thread, which steps the reference
    longest = PROMPT_TOKENS + tokens
    with closing(GenerationEngine(model, settings, device, longest, [])) as engine:
        ours = Ours(engine)
        bare = Bare(model, settings, device, longest)
        found = []
        for kind in ("unseeded", "seeded"):
            asked = requests(name, prompts, tokens, kind == "seeded")
            first = ours(asked)[1]  # warms them
            second = bare(asked)[1]
            work = f"{name}: {len(first)} responses of {tokens} tokens, {kind}, {device}"
            result = compare(
                lambda a=asked: seconds(ours, a), lambda a=asked: seconds(bare, a), work, rounds
            )
            for side in ("ours", "reference"):
                result[f"{side}_tokens_per_s"] = round(sum(map(len, first)) / result[side], 1)
            assert {len(ids) for ids in first + second} == {tokens}, "responses of other lengths"
            found.append(result | {"same_tokens": first == second})
    return found[0] | {"seeded": found[1]}


def seconds(run: Ours | Bare, asked: list[Any]) -> float:
    """Return the seconds of a run that begins on an idle GPU: a batch that nobody waits for may be
    under way there.
    """
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return run(asked)[0]


def requests(name: str, prompts: int, tokens: int, seeded: bool) -> list[Any]:
    """Return prompts of random tokens, each for a group of responses."""
    import torch

    from benchmarks.random_models import SHAPES
    from learners.experience import PromptRequest

    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, SHAPES[name]["vocab_size"], (prompts, PROMPT_TOKENS), generator=draw)
    return [
        PromptRequest(i, i, row, GROUP, 1.0, tokens, seeds_of(i) if seeded else None)
        for i, row in enumerate(ids.tolist())
    ]


def seeds_of(slot: int) -> tuple[int, ...]:
    return tuple(range(slot * GROUP, (slot + 1) * GROUP))


class Ours:
    """The engine of a run, used as a run uses it."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    def __call__(self, asked: list[Any]) -> tuple[float, list[list[int]]]:
        """Generate; return the seconds, and the ids of all responses in order."""
        began = time.perf_counter()
        groups = [group for done in self.engine.generate(asked) for group in done]
        seconds = time.perf_counter() - began
        groups.sort(key=lambda group: group[0].slot)
        return seconds, [sample.response_ids for group in groups for sample in group]


class Bare:
    """vLLM's own engine with our settings, without a transfer of weights, driven by one loop."""

    def __init__(self, model: Any, settings: Any, device: Literal["cpu", "cuda"], longest: int):
        from vllm import EngineArgs, LLMEngine

        from actors.engine.arguments import engine_arguments

        arguments = engine_arguments(model, settings, device, longest)
        del arguments["weight_transfer_config"]
        self.engine = LLMEngine.from_engine_args(EngineArgs(**arguments))

    def __call__(self, asked: list[Any]) -> tuple[float, list[list[int]]]:
        """Generate; return the seconds, and the ids of all responses in order."""
        began = time.perf_counter()
        outputs = self._outputs(asked)
        seconds = time.perf_counter() - began
        outputs.sort(key=lambda output: int(output.request_id))
        return seconds, [list(output.outputs[0].token_ids) for output in outputs]

    def _outputs(self, asked: list[Any]) -> list[Any]:
        from vllm import SamplingParams
        from vllm.inputs.engine import tokens_input
        from vllm.sampling_params import RequestOutputKind

        for request in asked:
            for sample in range(GROUP):
                params = SamplingParams(
                    temperature=request.temperature,
                    max_tokens=request.max_new_tokens,
                    seed=request.seeds[sample] if request.seeds else None,
                    logprobs=0,
                    detokenize=False,
                    output_kind=RequestOutputKind.FINAL_ONLY,
                )
                name = str(request.slot * GROUP + sample)
                self.engine.add_request(name, tokens_input(request.prompt_ids), params)
        outputs = []
        while self.engine.has_unfinished_requests():
            outputs += self.engine.step()
        return outputs


if __name__ == "__main__":
    main()
