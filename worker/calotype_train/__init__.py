"""Training: additions to a model (`calotype train`), and the bundled demo model (`demo`)."""
