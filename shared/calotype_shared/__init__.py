"""What producers and workers both serialize or address: configs, jobs, keys, storage, settings, errors."""
