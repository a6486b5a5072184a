"""Any diffusers pipeline: requests run its own `__call__`, and their network calls are merged."""
