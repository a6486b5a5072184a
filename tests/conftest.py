"""Shared fixtures: one pair of real servers for the whole run, and a fresh corner of them for each test."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from redis import Redis

from calotype.embedded import EmbeddedServers

if TYPE_CHECKING:
    from calotype_shared.queue.job_store import JobStore
    from calotype_shared.settings import Settings
    from calotype_shared.storage.s3 import Storage
    from tests.faults.harness import Forge

# Before torch is imported: tests run many processes on few cores, whose threads should not wait for each other at all.
os.environ.setdefault("GOMP_SPINCOUNT", "100")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the other cores are the other workers'


# The slowest first, two beside each other that use different things, so that no long file is left for the end.
FIRST = (
    *("faults/test_kills", "integration/test_examples", "integration/test_documents", "faults/test_outages"),
    *(
        "unit/test_founding_document",
        "integration/test_cli_end_to_end",
        "faults/test_protocol",
        "integration/test_demo",
    ),
    *("faults/", "integration/test_worker", "integration/test_compose", "integration/test_batches"),
    *("integration/test_openai", "integration/test_webuiapi", "browser/"),
)


def pytest_configure(config: pytest.Config) -> None:
    """An exception that ends a thread fails the test that it belongs to: else an assertion in one would pass."""
    config.addinivalue_line("filterwarnings", "error::pytest.PytestUnhandledThreadExceptionWarning")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """In the order of `FIRST`; within a file as written."""
    items.sort(key=_turn)


def _turn(item: pytest.Item) -> int:
    path = item.path.relative_to(Path(__file__).parent).as_posix()
    return next((turn for turn, start in enumerate(FIRST) if path.startswith(start)), len(FIRST))


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The developer's own CALOTYPE_* variables must not reach a test."""
    for name in [name for name in os.environ if name.startswith("CALOTYPE_")]:
        monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServers]:
    """A real Valkey and a real SeaweedFS, started once a run. Tests must not stop or flush them."""
    with EmbeddedServers.start(tmp_path_factory.mktemp("servers")) as servers:
        yield servers


@pytest.fixture(scope="session")
def valkey(servers: EmbeddedServers) -> str:
    """The shared Valkey's URL."""
    return servers.valkey.url


@pytest.fixture(scope="session")
def s3(servers: EmbeddedServers) -> dict[str, str]:
    """The shared S3 server as keyword arguments of `Settings.load`, without a bucket."""
    return {
        "s3_endpoint_url": servers.seaweed.endpoint_url,
        "s3_access_key_id": servers.seaweed.credentials.access_key_id,
        "s3_secret_access_key": servers.seaweed.credentials.secret_access_key,
    }


@pytest.fixture
def settings(valkey: str, s3: dict[str, str]) -> Settings:
    """Settings whose key prefix and bucket no other test uses. The bucket exists."""
    from calotype_shared.settings import Settings
    from calotype_shared.storage.s3 import Storage

    name = uuid.uuid4().hex[:12]
    settings = Settings.load(redis_url=valkey, key_prefix=f"test-{name}:", s3_bucket=f"test-{name}", **s3)
    Storage(settings).check(create=True)
    return settings


@pytest.fixture
def redis(settings: Settings) -> Iterator[Redis]:
    """A connection to the shared Valkey, as clients and workers make it: answers are strings."""
    from calotype_shared.queue.connection import connect_redis

    with connect_redis(settings) as connection:
        yield connection


@pytest.fixture
def store(settings: Settings, redis: Redis) -> JobStore:
    """A job store under this test's own key prefix."""
    from calotype_shared.queue.job_store import JobStore

    return JobStore(redis, key_prefix=settings.key_prefix, retention_seconds=settings.retention_seconds)


@pytest.fixture
def storage(settings: Settings) -> Storage:
    """This test's own bucket."""
    from calotype_shared.storage.s3 import Storage

    return Storage(settings)


@pytest.fixture
def environment(settings: Settings, servers: EmbeddedServers) -> dict[str, str]:
    """The environment of a child process that shares this test's corner: variables of the system plus CALOTYPE_*."""
    system = {name: value for name, value in os.environ.items() if not name.startswith("CALOTYPE_")}
    return {
        **system,
        **servers.environment,
        "CALOTYPE_KEY_PREFIX": settings.key_prefix,
        "CALOTYPE_S3_BUCKET": settings.s3_bucket,
        # What a busy machine makes of the profile would decide how many jobs run together.
        "CALOTYPE_WORKER_PROFILE_SECONDS": "0",
        "CALOTYPE_WORKER_REAP_SECONDS": "0.5",
    }


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random-weight Stable Diffusion model: small enough to load in a second."""
    from tests.models import write_tiny_sd

    return write_tiny_sd(tmp_path_factory.mktemp("tiny-model") / "tiny")


@pytest.fixture(scope="session")
def forge() -> Iterator[Forge]:
    """Starts worker processes that have torch imported already."""
    from tests.faults.harness import Forge

    forge = Forge()
    yield forge
    forge.close()
