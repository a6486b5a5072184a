"""How the bundled demo model was made: `python -m calotype_worker.training.demo --help`."""
