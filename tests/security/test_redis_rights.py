"""A Redis that may not be trusted with jobs is refused at the start, and its rights never leave a job half-written."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from redis import Redis

from calotype import Client
from calotype.embedded.valkey import ValkeyServer
from calotype.testing import demo_card
from calotype_shared.errors import RedisUnavailable
from calotype_shared.queue.job_store import JobStore
from calotype_shared.queue.server_check import ServerReport, check_server, refuse_unsuitable
from calotype_shared.schema.enums import JobState
from calotype_shared.settings import Settings

RIGHTS = ("~calotype:*", "+@all", "-@dangerous")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ValkeyServer]:
    server = ValkeyServer.start(tmp_path_factory.mktemp("valkey"))
    yield server
    server.stop()


@pytest.fixture
def admin(server: ValkeyServer) -> Iterator[Redis]:
    with Redis.from_url(server.url, decode_responses=True) as redis:
        yield redis
        redis.config_set("maxmemory", 0)
        redis.config_set("maxmemory-policy", "noeviction")


def url_of(server: ValkeyServer, admin: Redis, *rights: str) -> str:
    """The address of a user with these rights and no others."""
    admin.execute_command("ACL", "SETUSER", "app", "reset", "on", ">pw", *rights)
    return server.url.replace("redis://", "redis://app:pw@")


def test_a_user_without_channels_is_named_at_the_start_and_loses_nothing(server: ValkeyServer, admin: Redis) -> None:
    """E22: submitting failed with an error, and the job was queued: repeats made duplicates."""
    settings = Settings(redis_url=url_of(server, admin, *RIGHTS, "+info"))
    JobStore(admin).announce_model(demo_card())
    with pytest.raises(RedisUnavailable, match=r"grant it ~calotype:\* &calotype:\* \+@all"):
        refuse_unsuitable(settings)
    with Client(settings=settings) as client:
        job = client.submit("a cat", idempotency_key="one")
        assert client.submit("a cat", idempotency_key="one").id == job.id
        assert client.counts()[JobState.QUEUED] == 1
        assert client.cancel(job) is JobState.CANCELLED


def test_the_rights_in_the_documents_are_enough(server: ValkeyServer, admin: Redis) -> None:
    rights = ("~calotype:*", "&calotype:*", "+@all", "-@dangerous", "+info", "+keys", "+client")
    before = set(admin.keys())
    with Redis.from_url(url_of(server, admin, *rights), decode_responses=True) as redis:
        assert check_server(redis, key_prefix="calotype:") == ServerReport(None)
    assert set(admin.keys()) == before


def test_what_cannot_be_looked_at_is_a_warning(server: ValkeyServer, admin: Redis) -> None:
    with Redis.from_url(url_of(server, admin, *RIGHTS, "&calotype:*"), decode_responses=True) as redis:
        report = check_server(redis, key_prefix="calotype:")
    assert report.problem is None
    assert "does not allow INFO" in report.warnings[0]


def test_a_server_that_deletes_jobs_is_refused(server: ValkeyServer, admin: Redis) -> None:
    """E23: by INFO, where CONFIG is forbidden."""
    url = url_of(server, admin, *RIGHTS, "&calotype:*", "+info")
    admin.config_set("maxmemory", 10**9)
    admin.config_set("maxmemory-policy", "allkeys-lru")
    with pytest.raises(RedisUnavailable, match="set maxmemory-policy noeviction"):
        refuse_unsuitable(Settings(redis_url=url))
    admin.config_set("maxmemory-policy", "volatile-lru")
    with Redis.from_url(url, decode_responses=True) as redis:
        report = check_server(redis, key_prefix="calotype:")
    assert report.problem is None
    assert "maxmemory-policy volatile-lru" in report.warnings[0]
    with pytest.raises(RedisUnavailable):
        refuse_unsuitable(Settings(redis_url="redis://127.0.0.1:1"))
    refuse_unsuitable(Settings(redis_url="redis://127.0.0.1:1"), needed=False)
