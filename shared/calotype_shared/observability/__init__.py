"""Metrics, traces, logs and the admin port, shared by all processes."""
