"""Import what a run imports: a broken installation is found now, and the first run finds byte code.

`check_install.py packages` leaves our own modules out, which an image's first layer does not have.

Nothing is compiled: `learners/deepspeed_setup.py` switches off the one operation that DeepSpeed
would build at first use.
"""

import importlib
import os
import sys

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

PACKAGES = [
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
]
OURS = ["actors", "learners", "launch"]


def main() -> None:
    for module in PACKAGES if sys.argv[1:] == ["packages"] else PACKAGES + OURS:
        try:
            importlib.import_module(module)
        except Exception as error:
            sys.exit(f"install: '{module}' does not import: {type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
