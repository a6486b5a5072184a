"""`python -m calotype` is the `calotype` command."""

import sys

from calotype.cli import main

if __name__ == "__main__":
    sys.exit(main())
