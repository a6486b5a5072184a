"""Real servers as child processes, so that a fresh machine needs no other service: extra `calotype[embedded]`."""

from calotype.embedded.process import ChildProcess
from calotype.embedded.servers import DEFAULT_BUCKET, EmbeddedServers

__all__ = ["DEFAULT_BUCKET", "ChildProcess", "EmbeddedServers"]
