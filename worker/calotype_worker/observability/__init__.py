"""A worker's metrics, counters, admin port and live view."""
