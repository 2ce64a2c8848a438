"""``python -m came8bit``: the same as the ``came8bit`` command."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
