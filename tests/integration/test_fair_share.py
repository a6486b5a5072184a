"""Who is next in line, what equal jobs share, and keys that make a submission happen once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
from redis import Redis

from calotype import Client, IdempotencyConflict, InvalidRequest, JobState, Lane, Settings
from calotype_shared.queue.job_store import Claim, JobStore
from calotype_shared.schema.jobs import ImageRef, JobError
from calotype_shared.schema.model_card import ModelCard
from calotype_shared.schema.resolve import ResolvedConfig
from tests.invariants import check_store

IMAGE = ImageRef(key="k", seed=1, width=64, height=64, content_type="image/png", bytes=3, sha256="0" * 64)
CARD = ModelCard(
    name="demo",
    family="sd",
    version="1",
    size_multiple=8,
    native_sizes=((64, 64),),
    max_pixels=512 * 512,
    max_prompt_tokens=77,
    samplers=("ddpm", "ddim", "pndm", "euler", "euler_a", "heun", "dpmpp_2m", "dpmpp_2m_karras", "unipc", "lcm"),
)


@pytest.fixture
def client(settings: Settings, store: JobStore, redis: Redis) -> Iterator[Client]:
    store.announce_model(CARD)
    with Client(settings=settings) as client:
        yield client
    check_store(store, redis)


def config(steps: int = 10, **fields: object) -> dict[str, object]:
    return {"prompt": "x", "num_inference_steps": steps, "guidance_scale": 1, **fields}


def take(store: JobStore, queue: str = "demo.bulk") -> Claim:
    claim = store.claim(queue, worker="w", lease_seconds=60)
    assert claim is not None
    return claim


def test_work_that_did_not_begin_is_not_charged(client: Client, store: JobStore) -> None:
    """A tenant that cancels what it has queued stands where it would stand without it; what ran stays charged."""
    jobs = client.submit_many([config(10)] * 50, tenant="hasty")
    begun = take(store)
    client.cancel(jobs)
    client.submit_many([config(10)] * 40, tenant="other")
    client.submit_many([config(10)], tenant="hasty")
    assert begun.record.tenant == "hasty"
    assert "hasty" in [take(store).record.tenant for _ in range(3)]


def test_tenants_share_a_queue_by_work_not_by_jobs(client: Client, store: JobStore) -> None:
    """A thousand jobs of one tenant do not keep another waiting, and long jobs count for more than short ones."""
    client.submit_many([config(10)] * 60, tenant="crowd")
    client.submit_many([config(10)] * 10, tenant="small")
    client.submit_many([config(40)] * 10, tenant="heavy")
    first = Counter(take(store).record.tenant for _ in range(18))
    assert first == {"crowd": 8, "small": 8, "heavy": 2}, "the same steps for each"
    rest = [take(store).record.tenant for _ in range(62)]
    assert rest[-1] == "crowd"
    assert store.claim("demo.bulk", worker="w", lease_seconds=60) is None


def test_time_away_earns_no_credit(client: Client, store: JobStore) -> None:
    """Who comes after a long silence shares from then on, and does not first catch up."""
    client.submit_many([config()] * 30, tenant="busy")
    for _ in range(20):
        take(store)
    client.submit_many([config()] * 10, tenant="new")
    assert Counter(take(store).record.tenant for _ in range(10)) == {"busy": 5, "new": 5}


def test_a_job_handed_back_keeps_its_place(client: Client, store: JobStore) -> None:
    """It goes before every job that came later, of any tenant."""
    client.submit_many([config()] * 3, tenant="a")
    first = take(store)
    client.submit_many([config()] * 3, tenant="b")
    take(store)
    assert store.release(first)
    assert take(store).job_id == first.job_id


def test_equal_jobs_in_flight_are_made_once(client: Client, store: JobStore) -> None:
    """Each keeps its own record, and all get the one's images; another tenant, lane or seed is another job."""
    jobs = [client.submit(config(seed=5), lane=Lane.BULK, metadata={"number": i}) for i in range(3)]
    others = [
        client.submit(config(seed=5), lane=Lane.BULK, tenant="other"),
        client.submit(config(seed=6), lane=Lane.BULK),
        client.submit(config(), lane=Lane.BULK),
        client.submit(config(), lane=Lane.BULK),
    ]
    assert store.depths() == {"demo.bulk": 5}
    claim = take(store)
    assert claim.job_id == jobs[0].id
    assert store.commit(claim, images=[IMAGE], timings={"denoise": 1.0})
    records = [job.status() for job in jobs]
    assert [record.state for record in records] == [JobState.SUCCEEDED] * 3
    assert [record.images for record in records] == [(IMAGE,)] * 3
    assert [record.leader for record in records] == [None, jobs[0].id, jobs[0].id]
    assert [record.metadata["number"] for record in records] == [0, 1, 2]
    assert all(job.status().state is JobState.QUEUED for job in others)
    again = client.submit(config(seed=5), lane=Lane.BULK)
    assert again.status().state is JobState.QUEUED, "what has finished is not reused unless asked for"


def test_cancelling_one_of_equal_jobs_leaves_the_others(client: Client, store: JobStore) -> None:
    """The first of those that waited takes its place, and the rest wait for that one."""
    first, second, third, fourth = (client.submit(config(seed=5), lane=Lane.BULK) for _ in range(4))
    assert third.cancel() is JobState.CANCELLED
    claim = take(store)
    assert first.cancel() is JobState.CANCELLED
    assert not store.commit(claim, images=[IMAGE], timings={})
    assert fourth.status().leader == second.id
    heir = take(store)
    assert heir.job_id == second.id
    assert store.fail(heir, JobError(code="bad", message="as asked"), retry=False) is JobState.FAILED
    assert [job.status().state.value for job in (first, second, third, fourth)] == [
        *("cancelled", "failed", "cancelled", "failed"),
    ]
    assert store.counts()[JobState.QUEUED] == 0


def test_finished_images_are_reused_where_that_is_asked_for(settings: Settings, store: JobStore) -> None:
    """Opt-in, and only for a config whose seed was given."""
    store.announce_model(CARD)
    with Client(settings=settings.model_copy(update={"reuse_finished": True})) as client:
        client.submit(config(seed=5), lane=Lane.BULK)
        assert store.commit(take(store), images=[IMAGE], timings={})
        again = client.submit(config(seed=5), lane=Lane.BULK).status()
        assert (again.state, again.images, again.leader) == (JobState.SUCCEEDED, (IMAGE,), "storage")
        assert client.submit(config(), lane=Lane.BULK).status().state is JobState.QUEUED
        store.announce_model(CARD.model_copy(update={"version": "2"}))
    with Client(settings=settings.model_copy(update={"reuse_finished": True})) as client:
        assert client.submit(config(seed=5), lane=Lane.BULK).status().state is JobState.QUEUED, "other weights"


def test_an_idempotency_key_makes_a_submission_happen_once(client: Client, store: JobStore) -> None:
    """The same key returns the same job, though a seed was left open; for another request it is refused."""
    first = client.submit(config(), idempotency_key="order-1")
    assert client.submit(config(), idempotency_key="order-1").id == first.id
    assert client.submit(config(), idempotency_key="order-2").id != first.id
    assert client.submit(config(), idempotency_key="order-1", tenant="other").id != first.id
    with pytest.raises(IdempotencyConflict, match=r"idempotency_key='order-1'.*different request"):
        client.submit(config(steps=11), idempotency_key="order-1")
    with pytest.raises(InvalidRequest, match="1 to 200 printable characters"):
        client.submit(config(), idempotency_key="")
    with pytest.raises(InvalidRequest, match="tenant='No!'"):
        client.submit(config(), tenant="No!")
    assert store.counts()[JobState.QUEUED] == 3


def test_jobs_are_listed_by_tenant_in_pages(client: Client) -> None:
    """Every job once, newest first, whatever arrives in between."""
    ids = [client.submit(config(), tenant=tenant).id for tenant in ("a", "b", "a", "a", "b")]
    assert [job.id for job in client.jobs()] == ids[::-1]
    page = client.jobs(tenant="a", limit=2)
    assert [job.id for job in page] == [ids[3], ids[2]]
    client.submit(config(), tenant="a")
    assert [job.id for job in client.jobs(tenant="a", limit=2, after=page[-1].id)] == [ids[0]]
    assert [job.id for job in client.jobs(after=ids[3])] == ids[2::-1]


def test_a_config_costs_its_work() -> None:
    """Row-steps times blocks of 64x64 pixels."""
    plain = ResolvedConfig(prompt="x", width=128, height=64, seed=1, num_inference_steps=10, guidance_scale=1)
    assert plain.cost == 20
    assert plain.model_copy(update={"guidance_scale": 5.0, "num_images": 3}).cost == 120
