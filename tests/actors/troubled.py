"""What may go wrong in the process that examines a family. Imports nothing heavy."""

from __future__ import annotations

import os
import time
from typing import Any


def crash(name: str, cells: Any, answers: Any, folder: str) -> None:
    answers.send(("actor", "yes"))
    os.abort()


def hang(name: str, cells: Any, answers: Any, folder: str) -> None:
    answers.send(("actor", "yes"))
    time.sleep(60)
