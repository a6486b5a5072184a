"""What producers and workers share: configs, job records, Redis keys, storage, settings, errors."""
