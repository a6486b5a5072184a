"""Training: what is added to a model (`calotype train`), and how the bundled demo model was made (`demo`)."""
