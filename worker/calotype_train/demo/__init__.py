"""How the bundled demo model was made: `python -m calotype_train.demo --help`."""
