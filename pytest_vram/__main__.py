"""``python -m pytest_vram``."""

import sys

from pytest_vram.cli import main

if __name__ == "__main__":
    sys.exit(main())
