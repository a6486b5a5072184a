"""API keys on a real Valkey: what is stored, who gets in, and how much they may use."""

from __future__ import annotations

import functools
import json

import pytest
from redis import Redis

from calotype.api_keys import ApiKey, ApiKeys, Forbidden, Scope, TooManyRequests, Unauthorized
from calotype_shared.errors import InvalidRequest
from calotype_shared.settings import Settings
from tests.integration.conftest import Command, until


@pytest.fixture
def keys(redis: Redis, settings: Settings) -> ApiKeys:
    return ApiKeys(redis, key_prefix=settings.key_prefix)


def test_a_token_is_stored_as_a_hash_only(keys: ApiKeys, redis: Redis) -> None:
    """Who reads Redis cannot act as anyone; who has the token is its tenant."""
    token, key = keys.create(name="web", tenant="acme")
    stored = redis.hget(keys.keys.api_keys, key.id)
    assert token.split("_", 2)[2] not in str(stored)
    found = keys.authenticate(token)
    assert (found.tenant, found.scopes) == ("acme", frozenset(Scope) - {Scope.ADMIN})
    found.require(Scope.BATCHES)
    with pytest.raises(Forbidden, match="'admin'"):
        found.require(Scope.ADMIN)


@pytest.mark.parametrize("change", ["secret", "id", "shape", "empty"])
def test_anything_else_is_refused(keys: ApiKeys, change: str) -> None:
    """Another secret, another id, another shape."""
    token, _ = keys.create(name="web")
    other, _ = keys.create(name="other")
    keys.authenticate(token)  # and is remembered
    wrong = {
        "secret": token[:-4] + ("AAAA" if not token.endswith("AAAA") else "BBBB"),
        "id": other[:11] + token[11:],
        "shape": "Bearer " + token,
        "empty": "",
    }[change]
    with pytest.raises(Unauthorized, match="is not an API key" if change in ("shape", "empty") else "is not valid"):
        keys.authenticate(wrong)


def test_a_revoked_key_stops_working(redis: Redis, settings: Settings) -> None:
    """At once for who has not used it lately, within seconds for the rest."""
    now = 0.0
    keys = ApiKeys(redis, key_prefix=settings.key_prefix, clock=lambda: now)
    token, key = keys.create(name="web")
    keys.authenticate(token)
    assert keys.revoke(key.id)
    assert not keys.revoke(key.id)
    now = 5.0
    with pytest.raises(Unauthorized, match="is not valid"):
        keys.authenticate(token)
    assert keys.all() == []


def spend(keys: ApiKeys, key: ApiKey, requests: int) -> None:
    for _ in range(requests):
        keys.allow(key)


def test_requests_are_limited_and_come_back(keys: ApiKeys, redis: Redis) -> None:
    """A burst of a minute's worth, then as they are refilled; a refusal says how long to wait."""
    _, key = keys.create(name="web", requests_per_minute=300)
    for _ in range(300):
        keys.allow(key)
    with pytest.raises(TooManyRequests, match="300 requests a minute") as refused:
        spend(keys, key, 100)  # more than is refilled meanwhile
    assert 0 < refused.value.retry_after_seconds <= 0.2

    def works() -> bool:
        try:
            keys.allow(key)
        except TooManyRequests:
            return False
        return True

    until(works)
    assert redis.ttl(keys.keys.rate_limit(key.id)) > 0


def test_images_are_counted_by_the_day(keys: ApiKeys) -> None:
    """What would go over is refused whole, and takes nothing."""
    _, key = keys.create(name="web", images_per_day=10)
    keys.allow(key, images=7)
    with pytest.raises(TooManyRequests, match="10 images a day") as refused:
        keys.allow(key, images=4)
    assert 0 < refused.value.retry_after_seconds <= 86_400
    keys.allow(key, images=3)
    keys.allow(key)
    with pytest.raises(TooManyRequests, match="10 images a day"):
        keys.allow(key, images=1)
    with pytest.raises(Forbidden, match=r"11 images exceed .* \(10\); request fewer"):
        keys.allow(key, images=11)  # tomorrow neither


def test_bad_keys_are_not_made(keys: ApiKeys) -> None:
    """Names that could not be a part of a Redis key, limits that forbid everything."""
    with pytest.raises(InvalidRequest, match="tenant='A b'"):
        keys.create(name="x", tenant="A b")
    with pytest.raises(InvalidRequest, match="images_per_day=0"):
        keys.create(name="x", images_per_day=0)
    for field, value in (
        ("tenant", "acme\n"),
        ("tenant", ""),
        ("name", ""),
        ("name", "x" * 101),
        ("name", "\x1b[2Jx"),
        ("scopes", ["jobs:read", "root"]),
        ("scopes", []),
        ("requests_per_minute", True),
        ("images_per_day", 1.5),
        ("images_per_day", 10**10),
    ):
        with pytest.raises(InvalidRequest, match=field):
            keys.create(**{"name": "x", field: value})  # type: ignore[arg-type]
    assert keys.all() == []


def test_the_commands(keys: ApiKeys, calotype: Command) -> None:
    """Made, listed without the token, revoked."""
    run = functools.partial(calotype, "keys")
    made = run("create", "--name", "web", "--tenant", "acme", "--scope", "jobs:read", "--json")
    created = json.loads(made.stdout)
    assert keys.authenticate(created["token"]).scopes == {Scope.JOBS_READ}
    keys.create(name="a name [/with] [bold]brackets")
    listed = run("list")
    assert created["id"] in listed.stdout
    assert "a name [/with] [bold]brackets" in listed.stdout
    assert created["token"] not in listed.stdout + run("list", "--json").stdout
    assert run("revoke", created["id"]).returncode == 0
    assert run("revoke", created["id"]).returncode == 3
