"""Training that the project does itself: the bundled demo model."""
