"""Import what a run imports, so that a broken installation is found now and the byte code is there for the first run."""

import importlib
import os
import sys

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

MODULES = ["torch", "torch.utils.tensorboard", "transformers.models.qwen3.modeling_qwen3", "transformers.models.bert.modeling_bert", "datasets", "ray", "deepspeed", "vllm.v1.engine.llm_engine", "vllm.v1.worker.cpu_worker", "vllm.model_executor.models.qwen3", "vllm.distributed.weight_transfer", "pytest", "actors", "learners", "launch"]


def main() -> None:
    for module in MODULES:
        try:
            importlib.import_module(module)
        except Exception as error:
            sys.exit(f"install: '{module}' does not import: {type(error).__name__}: {error}")
    from deepspeed.git_version_info import installed_ops

    if not installed_ops["deepspeed_shm_comm"]:
        sys.exit("install: DeepSpeed came without its shared-memory operations: remove the environment and try again")


if __name__ == "__main__":
    main()
