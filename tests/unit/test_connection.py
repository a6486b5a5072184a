"""Redis URLs taken apart, and what becomes of an error."""

from __future__ import annotations

from pathlib import Path

import pytest
from redis.exceptions import AuthenticationError, OutOfMemoryError, RedisError, ResponseError
from redis.sentinel import MasterNotFoundError

from calotype_shared.errors import SettingsError
from calotype_shared.queue.address import RedisAddress
from calotype_shared.queue.connection import is_outage, unavailable
from calotype_shared.settings import Settings


@pytest.mark.parametrize(
    ("url", "hosts", "name", "db", "account", "shown"),
    [
        ("redis://localhost", [("localhost", 6379)], "", 0, (None, None), "redis://localhost:6379/0"),
        ("redis://:p%40ss@h:1/2", [("h", 1)], "", 2, (None, "p@ss"), "redis://h:1/2"),
        ("rediss://me:pa:ss@[::1]:7/", [("::1", 7)], "", 0, ("me", "pa:ss"), "rediss://[::1]:7/0"),
        ("redis+sentinel://a,b:3/main", [("a", 26379), ("b", 3)], "main", 0, (None, None), "redis+sentinel://a:26379,b:3/main/0"),
        ("rediss+sentinel://u:p@a/x/4", [("a", 26379)], "x", 4, ("u", "p"), "rediss+sentinel://a:26379/x/4"),
    ],
)  # fmt: skip
def test_an_address(
    url: str, hosts: list[tuple[str, int]], name: str, db: int, account: tuple[str | None, str | None], shown: str
) -> None:
    address = RedisAddress.parse(url)
    assert (list(address.hosts), address.name, address.db) == (hosts, name, db)
    assert (address.username, address.password) == account
    assert str(address) == shown == repr(address)
    assert address.tls == url.startswith("rediss")


def test_a_socket() -> None:
    address = RedisAddress.parse("unix://:secret@/run/redis.sock?db=3")
    assert (address.path, address.db, address.password) == ("/run/redis.sock", 3, "secret")
    assert str(address) == "unix:///run/redis.sock"


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("http://x", "must start with"),
        ("redis", "must start with"),
        ("rediss://h/0?ssl_cert_reqs=none", "does not allow \\?options"),
        ("redis://h:99999", "invalid host"),
        ("redis://h:0", "invalid host"),
        ("redis://a,b/0", "several hosts"),
        ("redis://h/zero", "invalid database"),
        ("redis://h/0/1", "only a database number"),
        ("redis+sentinel://a,b", "name the primary"),
        ("redis+sentinel://a,b/", "name the primary"),
        ("unix:///x?timeout=3", "allows only"),
        ("redis://[::1", "invalid host"),
    ],
)
def test_an_address_that_makes_no_sense(url: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=why):
        RedisAddress.parse(url)
    monkeypatch.setenv("CALOTYPE_REDIS_URL", url.replace("://", "://:hunter2@"))
    with pytest.raises(SettingsError, match="CALOTYPE_REDIS_URL") as refused:
        Settings.load()
    assert "hunter2" not in str(refused.value)


def test_a_certificate_needs_its_key_and_files_must_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "x.pem"
    file.touch()
    monkeypatch.setenv("CALOTYPE_S3_SECRET_ACCESS_KEY", "hunter2")
    with pytest.raises(SettingsError, match="must be set together") as refused:
        Settings.load(redis_cert_file=str(file))
    assert "hunter2" not in str(refused.value)
    with pytest.raises(SettingsError, match=r"REDIS_CA_FILE.*not a readable file"):
        Settings.load(redis_ca_file=str(tmp_path / "none.pem"))


def test_no_password_is_in_what_settings_show() -> None:
    settings = Settings(
        redis_url="redis://me:hunter2@h", redis_sentinel_password="hunter2", s3_secret_access_key="hunter2"
    )
    assert "hunter2" not in f"{settings!r} {settings} {settings.redis!r}"


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (MasterNotFoundError("No master found for 'x'"), "start Redis"),
        (AuthenticationError("invalid username-password pair"), "user and password"),
        (ResponseError("NOAUTH Authentication required."), "user and password"),
        (OutOfMemoryError("command not allowed when used memory > 'maxmemory'."), "maxmemory"),
        (ResponseError("MISCONF Errors writing to the AOF file: No space left on device"), "disk"),
        (ResponseError("NOREPLICAS Not enough good replicas to write."), "start Redis"),
    ],
)
def test_an_outage_says_what_to_do(error: RedisError, remedy: str) -> None:
    assert is_outage(error)
    assert remedy in str(unavailable(error, "h:1"))


def test_a_wrong_request_is_a_bug_and_no_outage() -> None:
    assert not is_outage(ResponseError("WRONGTYPE Operation against a key holding the wrong kind of value"))
    assert not is_outage(ResponseError("illegal transition queued to queued of job x"))
