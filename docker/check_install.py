"""Import what a run imports: a broken installation is found now, and the first run finds byte code.

Nothing is compiled: `learners/zero.py` switches off the one operation that DeepSpeed would build at first use.
"""

import importlib
import os
import sys

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

MODULES = [
    "torch.utils.tensorboard",
    "transformers.models.bert.modeling_bert",
    "transformers.models.qwen3.modeling_qwen3",
    "datasets",
    "ray",
    "deepspeed",
    "vllm.distributed.weight_transfer",
    "vllm.model_executor.models.qwen3",
    "vllm.v1.engine.llm_engine",
    "vllm.v1.worker.cpu_worker",
    "actors",
    "learners",
    "launch",
]


def main() -> None:
    for module in MODULES:
        try:
            importlib.import_module(module)
        except Exception as error:
            sys.exit(f"install: '{module}' does not import: {type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
