"""``python -m rai_toolbox``: the command, as torchrun starts it."""

from __future__ import annotations

import sys

from rai_toolbox.cli import main

if __name__ == "__main__":
    sys.exit(main())
