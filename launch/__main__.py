"""`python -m launch` is `quatuor`; both begin here, before anything is imported."""

import os
import sys


def main() -> int:
    """Settle where modules come from, then run the command line; return the exit code."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    sys.path.insert(0, root)
    try:
        from learners.imports import settle_imports

        del sys.path[0]
        settle_imports(root, os.getcwd())
    except ImportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    from launch.cli import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
