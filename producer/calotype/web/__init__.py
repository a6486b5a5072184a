"""The web UI: files that the gateway serves."""
