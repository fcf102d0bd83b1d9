"""`python -m impasto` is the command `impasto`."""

from __future__ import annotations

import sys

from impasto.cli import main

if __name__ == "__main__":
    sys.exit(main())
