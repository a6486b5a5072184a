"""Real servers as child processes, so that a fresh machine needs no other service: extra `calotype[embedded]`."""

from calotype.embedded.process import ChildProcess
from calotype.embedded.servers import DEFAULT_BUCKET, EmbeddedServers
from calotype.embedded.workers import LocalWorkers, local_devices, require_worker

__all__ = ["DEFAULT_BUCKET", "ChildProcess", "EmbeddedServers", "LocalWorkers", "local_devices", "require_worker"]
