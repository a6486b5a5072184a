"""The command line: `calotype --help`."""

from calotype.cli.app import main

__all__ = ["main"]
