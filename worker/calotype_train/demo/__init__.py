"""Trains the bundled demo model: `python -m calotype_train.demo --help`."""
