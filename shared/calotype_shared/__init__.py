"""What producers and workers both serialise or address: configs, jobs, keys, storage, settings, errors."""
