"""Order of imports: our packages are those of one folder, and the folder that a run was started in,
which users import their functions from, hides nobody's.

Only what every Python process has imported already is imported here: this comes before all else.
"""

import gc
import os
import sys
from importlib import import_module

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import ModuleType

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # holds our packages


def imported(name: str) -> "ModuleType":
    """Return a module, imported without the garbage collector: a fifth of the time that torch,
    Transformers and vLLM take to import would be its looking through what stays anyway.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        return import_module(name)
    finally:
        gc.freeze()  # and back: all that is there counts as old, and is not looked through next
        gc.unfreeze()
        if collects:
            gc.enable()


def settle_imports(root: str, here: str) -> None:
    """Take our packages from the folder `root` from now on, and make what lies in the folder `here`
    importable behind everything else.

    Raises ImportError, which names the file, where one of them was loaded from elsewhere before.
    """
    ours = ("learners", "actors", "launch")
    others = [folder for folder in sys.path if folder not in ("", here)]
    sys.path[:] = [root]
    try:
        # They are empty. What is inside them is looked for in their own folders, not in sys.path.
        loaded = [import_module(name) for name in ours]
    finally:
        last = [folder for folder in dict.fromkeys((root, here)) if folder not in others]
        sys.path[:] = [*others, *last]
    for name, module in zip(ours, loaded, strict=True):
        own = os.path.join(root, name, "__init__.py")
        file = getattr(module, "__file__", None) or "somewhere unknown"
        if os.path.realpath(file) != os.path.realpath(own):
            raise ImportError(
                f"{name} was loaded from {file}, which hides Quatuor's own {os.path.dirname(own)}: "
                "rename or move that file"
            )
