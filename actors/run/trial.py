"""Trials of what a run needs from outside, before anything is started for it: a folder that can be
written, Weights & Biases.
"""

from __future__ import annotations

import importlib.util
import os
import re
import tempfile
from pathlib import Path
from urllib.parse import urlsplit

from actors.run.lock import only_locked

TRIAL_BYTES = 64 * 1024
# each of them says how a run reaches Weights & Biases, or that it need not
WANDB_VARIABLES = (
    "WANDB_API_KEY",
    "WANDB_MODE",
    "WANDB_IDENTITY_TOKEN_FILE",
)


def no_new_folder(path: Path) -> str:
    """Return why no new folder can be made and written there; nothing when one can. Leaves nothing
    behind.
    """
    where = ""
    try:
        if only_locked(path):
            return unwritable(path)
        if os.path.exists(path):
            return "exists: choose another folder, or --resume to go on with that run"
        if link := next((p for p in (path, *path.absolute().parents) if dangling(p)), None):
            return f"cannot be made: {link} is a link to {os.readlink(link)}, which does not exist"
        above = next(parent for parent in path.absolute().parents if os.path.exists(parent))
        if not above.is_dir():
            return f"cannot be made: {above} is a file"
        where = f"{above}: "
        # permissions alone do not tell: the disk may be read-only or full, the user root, or the
        # name too long
        with tempfile.TemporaryDirectory(dir=above) as trial:
            inside = Path(trial, path.absolute().relative_to(above))
            inside.mkdir(parents=True)
            write_trial(inside)
    except (OSError, ValueError) as error:
        return f"cannot be made: {where}{getattr(error, 'strerror', None) or error}"
    return ""


def unwritable(path: Path) -> str:
    """Return why nothing can be written in a folder; nothing when it can."""
    try:
        write_trial(path)
    except OSError as error:
        return f"cannot be written: {error.strerror}"
    return ""


def write_trial(folder: Path) -> None:
    """Write a file there that is gone at once. Raises OSError."""
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(bytes(TRIAL_BYTES))
        file.flush()
        os.fsync(file.fileno())


def dangling(path: Path) -> bool:
    return os.path.islink(path) and not os.path.exists(path)


def wandb_problem() -> str:
    """Return why Weights & Biases cannot take a run; nothing when it can, as far as that is known
    without asking it.
    """
    if importlib.util.find_spec("wandb") is None:
        return "wandb is not installed: pip install wandb, or remove the key"
    known = any(os.environ.get(name) for name in WANDB_VARIABLES)
    if known or os.environ.get("WANDB_ANONYMOUS") in ("allow", "must"):
        return ""
    # what `wandb init` wrote here goes before what `wandb login` wrote for the user
    folders = ("wandb", os.environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb")
    settings = "\n".join(_text_of(os.path.join(folder, "settings")) for folder in folders)
    if re.search(r"mode|api_key|anonymous\s*[=:]\s*(allow|must)", settings):
        return ""
    login = re.search(r"^\s*base_url\s*[=:]\s*(\S+)", settings, re.MULTILINE)
    url = os.environ.get("WANDB_BASE_URL") or (login[1] if login else "https://api.wandb.ai")
    server = urlsplit(url).hostname or url
    keys = "\n".join(map(_text_of, (os.environ.get("NETRC") or "~/.netrc", "~/_netrc")))
    if re.search(re.escape(server), keys, re.IGNORECASE):
        return ""
    return (
        f"no key for Weights & Biases at {server} is here: wandb login, or set WANDB_API_KEY, or "
        "WANDB_MODE=offline"
    )


def _text_of(file: str) -> str:
    """Return the text of a file; nothing where it cannot be read."""
    try:
        return Path(file).expanduser().read_text(errors="replace")
    except (OSError, RuntimeError):  # there may be no home either
        return ""
