"""Variables of other launchers (mpirun, torchrun, accelerate), which say who a process is among
processes that are not ours.

DeepSpeed, accelerate, Transformers and vLLM read them and believe them before what they are told.
"""

from __future__ import annotations

import os
import re

FOREIGN = re.compile(
    r"(OMPI_COMM_WORLD|PMI|PMIX|MV2_COMM_WORLD|TORCHELASTIC|ACCELERATE_USE|VLLM_DP)_\w+"
    r"|MPI_LOCAL(RANKID|NRANKS)|(LOCAL_|GROUP_|ROLE_|NODE_|CROSS_)?(RANK|WORLD_SIZE)"
    r"|ROLE_NAME|(LOCAL|CROSS)_SIZE|MASTER_(ADDR|PORT)"
)


def clear_foreign_launchers() -> None:
    """Remove them all; our process groups are told their rank and address."""
    for name in filter(FOREIGN.fullmatch, list(os.environ)):
        del os.environ[name]
