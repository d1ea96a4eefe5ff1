"""Entry point of ``python -m pytest_vram``: calls :func:`pytest_vram.cli.main`."""

import sys

from pytest_vram.cli import main

if __name__ == "__main__":
    sys.exit(main())
