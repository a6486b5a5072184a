"""What a worker reports: metrics, counters, the admin port, the live view."""
