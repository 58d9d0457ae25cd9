"""`python -m launch` is `quatuor`."""

import sys

from launch.cli import main

sys.exit(main())
