"""Folder and token that Ray needs where it starts: paths short enough for its sockets, and a place
to keep the token. Ray itself is not imported.
"""

from __future__ import annotations

import os
import secrets
import tempfile
from pathlib import Path

from learners.errors import UserError

LONGEST_PATH = 107  # of a Unix socket, in bytes
# the longest name that Ray gives a socket, in the folder of a session: its date and process
SOCKET = "session_2000-01-01_00-00-00_000000_4194304/sockets/dash_TaskEventsHead"
LONGEST_FOLDER = LONGEST_PATH - len(f"/{SOCKET}")


def system_folder() -> Path:
    """Return the folder for temporary files by Ray's own rule, in which it makes its `ray`."""
    return Path(os.path.abspath(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"))


def ray_folder() -> str:
    """Return the folder where Ray is to keep sessions, logs and sockets: its own choice, unless
    sockets there would have too long a path, or nothing can be written.

    Raises UserError when no folder of this machine will do.
    """
    own = f"/tmp/ray-{os.getuid()}"  # /tmp/ray may be another user's
    folders = [str(system_folder() / "ray"), "/tmp/ray", own, "/var/tmp/ray", "/dev/shm/ray"]
    short = [folder for folder in folders if len(os.fsencode(folder)) <= LONGEST_FOLDER]
    for folder in short:
        if writable(Path(folder)):
            return folder
    raise UserError(
        f"Ray needs a folder to write in whose path has at most {LONGEST_FOLDER} bytes, for its "
        f"sockets, and can have none of {', '.join(folders)}: set RAY_TMPDIR to one"
    )


def provide_token() -> None:
    """Give Ray a token of this run's own where it could neither read nor write the file that it
    keeps one in, below HOME. A token that somebody gave, or a mode, stays.
    """
    names = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    mode = os.environ.get("RAY_AUTH_MODE", "token")
    if mode != "token" or any(name in os.environ for name in names):
        return
    file = token_file()
    if not (os.access(file, os.R_OK) if file.is_file() else writable(file.parent)):
        os.environ[names[0]] = secrets.token_hex(32)


def token_file() -> Path:
    """Return where Ray keeps its token; a file that is not there where nobody knows a home."""
    home = os.path.expanduser("~")
    return Path(os.devnull if home == "~" else home, ".ray", "auth_token")


def writable(folder: Path) -> bool:
    """Tell whether files can be written in a folder, which is made if need be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return False
    return True
