"""``python -m finetune.ladder``."""

import sys

from finetune.ladder.command import main

if __name__ == "__main__":
    sys.exit(main())
