"""Every Redis key of Calotype, documented once. All of them begin with the setting `key_prefix`.

| key | type | content | lifetime |
|---|---|---|---|
| `job:{id}` | hash | the job's record, the source of truth (`jobs.py`) | while unfinished; then `retention_seconds` |
| `{models}.{lane}` | list | Celery messages, one per waiting job; Celery pops from the right | until popped |
| `messages` | string | number of messages pushed so far; each message gets a number | tiny |
| `waiting:{queue}` | zset | ids of queued jobs, by queue position (decision 10) | until claimed or cancelled |
| `tenant_tags:{queue}` | hash | tenant -> the queue position of its newest job | tiny |
| `queue_state:{queue}` | hash | `virtual`: last claimed position; other fields belong to claims and reapers | tiny |
| `queues` | set | names of all queues that ever had a job | tiny |
| `in_flight:{identity}` | string | the unfinished job that equal jobs wait for | until that job is final |
| `followers:{id}` | list | equal jobs that wait for this job's outcome | until that job is final |
| `finished:{identity}` | string | images of a finished job, as JSON, for later equal jobs | `retention_seconds` |
| `idempotency:{tenant}:{key}` | hash | `id` of the first submission, `request`: a hash of it | `retention_seconds` |
| `leases` | zset | ids of running jobs, by expiry of their lease in milliseconds | until it ends |
| `orphans` | zset | `{id}/{attempt}-{token}`: folders of attempts that ended without a commit, by time | until swept |
| `dead` | zset | ids of jobs that failed permanently, by time | until dropped or their records expire |
| `counts` | hash | jobs by state: current numbers for queued and running, totals for the final ones | forever |
| `pending` | hash | tenant -> its queued jobs outside batches; `*`: all tenants | forever |
| `completion_rate` | hash | `per_second`: recent rate of ended jobs; `at`, `ended`: the reaper's last count | tiny |
| `recent:{tenant}` | zset | ids of jobs outside batches, by creation time | until their records expire; trimmed |
| `tenants` | set | every tenant that ever submitted | tiny |
| `batch:{id}` | hash | a batch's record (`batches/record.py`) | while unfinished; then `retention_seconds` |
| `open_batches` | zset | ids of unfinished batches, by creation time | until they are final |
| `batches:{tenant}` | zset | ids of batches, by creation time | until their records expire |
| `leader:{batch}` | string | the dispatcher that leads the batch | seconds; renewed |
| `live:{batch}` | set | ids of its unfinished jobs | until they are final |
| `done:{batch}` | list | ids of its final jobs whose results are not in storage yet | until they are |
| `parts:{batch}` | list | storage keys of its results so far | as the batch |
| `models` | hash | model name -> its card as JSON | forever: jobs can be queued while no worker runs |
| `together` | set | names of models that one worker serves, joined by `+`: the possible ensembles | tiny |
| `preview:{id}` | hash | image number -> its newest preview as JSON | a minute |
| `worker:{name}` | string | a worker's report as JSON | seconds; renewed by the worker |
| `workers` | set | names of workers that reported | trimmed when read |
| `reaper` | string | the worker that is reaping now | a second or two |
| `reaped_at` | string | time of the last reaping | tiny |
| `api_keys` | hash | API key id -> the key as JSON, with only a hash of its secret | until revoked |
| `files:{tenant}` | hash | file id -> its name and size as JSON; the bytes are in storage | until deleted |
| `options:{tenant}` | string | the checkpoint that clients of AUTOMATIC1111's API have chosen | until changed |
| `rate_limit:{key}` | hash | an API key's remaining requests and images | a day after its last use |
| `hooks` | zset | webhook deliveries, by the millisecond at which they are due | until delivered or dropped |
| `hook:{id}` | hash | one delivery: address, job or batch, attempts so far | at most three days |
| `gc` | hash | `name`, `bucket` and `runs` of collections: identifies the bucket that belongs to this Redis | forever |
| `check` | any | written and deleted again by the check of a server's rights | a second |
| `cancelled` | channel | ids of jobs that are cancelled while running | – |
| `arrived:{queue}` | channel | the queue's name, when jobs enter it; interactive queues only | – |
| `changed:{id}` | channel | the job's state, when its record changes or it has a new preview | – |

Celery's Redis transport keeps its own keys under the same prefix: `unacked`, `unacked_index`, `unacked_mutex`,
`_kombu.binding*`. Nothing here reads them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from calotype_shared.schema.enums import Lane


@dataclass(frozen=True)
class Keys:
    """Names of keys under one prefix."""

    prefix: str

    def job(self, job_id: str) -> str:
        return f"{self.prefix}job:{job_id}"

    def messages(self, queue: str) -> str:
        return f"{self.prefix}{queue}"

    def waiting(self, queue: str) -> str:
        return f"{self.prefix}waiting:{queue}"

    def queue_state(self, queue: str) -> str:
        return f"{self.prefix}queue_state:{queue}"

    def tenant_tags(self, queue: str) -> str:
        return f"{self.prefix}tenant_tags:{queue}"

    def in_flight(self, identity: str) -> str:
        return f"{self.prefix}in_flight:{identity}"

    def followers(self, job_id: str) -> str:
        return f"{self.prefix}followers:{job_id}"

    def finished(self, identity: str) -> str:
        return f"{self.prefix}finished:{identity}"

    def idempotency(self, tenant: str, key: str) -> str:
        return f"{self.prefix}idempotency:{tenant}:{key}"

    def batch(self, batch_id: str) -> str:
        return f"{self.prefix}batch:{batch_id}"

    def batches(self, tenant: str) -> str:
        return f"{self.prefix}batches:{tenant}"

    def leader(self, batch_id: str) -> str:
        return f"{self.prefix}leader:{batch_id}"

    def live(self, batch_id: str) -> str:
        return f"{self.prefix}live:{batch_id}"

    def done(self, batch_id: str) -> str:
        return f"{self.prefix}done:{batch_id}"

    def parts(self, batch_id: str) -> str:
        return f"{self.prefix}parts:{batch_id}"

    def worker(self, name: str) -> str:
        return f"{self.prefix}worker:{name}"

    def preview(self, job_id: str) -> str:
        return f"{self.prefix}preview:{job_id}"

    def rate_limit(self, key_id: str) -> str:
        return f"{self.prefix}rate_limit:{key_id}"

    def files(self, tenant: str) -> str:
        return f"{self.prefix}files:{tenant}"

    def options(self, tenant: str) -> str:
        return f"{self.prefix}options:{tenant}"

    def arrived(self, queue: str) -> str:
        return f"{self.prefix}arrived:{queue}"

    def changed(self, job_id: str) -> str:
        return f"{self.prefix}changed:{job_id}"

    def hook(self, about: str) -> str:
        return f"{self.prefix}hook:{about}"

    @property
    def api_keys(self) -> str:
        return f"{self.prefix}api_keys"

    @property
    def hooks(self) -> str:
        return f"{self.prefix}hooks"

    @property
    def together(self) -> str:
        return f"{self.prefix}together"

    @property
    def open_batches(self) -> str:
        return f"{self.prefix}open_batches"

    @property
    def message_number(self) -> str:
        return f"{self.prefix}messages"

    @property
    def queues(self) -> str:
        return f"{self.prefix}queues"

    @property
    def leases(self) -> str:
        return f"{self.prefix}leases"

    @property
    def orphans(self) -> str:
        return f"{self.prefix}orphans"

    @property
    def dead(self) -> str:
        return f"{self.prefix}dead"

    @property
    def reaped_at(self) -> str:
        return f"{self.prefix}reaped_at"

    @property
    def counts(self) -> str:
        return f"{self.prefix}counts"

    @property
    def pending(self) -> str:
        return f"{self.prefix}pending"

    @property
    def completion_rate(self) -> str:
        return f"{self.prefix}completion_rate"

    def recent(self, tenant: str) -> str:
        return f"{self.prefix}recent:{tenant}"

    @property
    def tenants(self) -> str:
        return f"{self.prefix}tenants"

    @property
    def models(self) -> str:
        return f"{self.prefix}models"

    @property
    def workers(self) -> str:
        return f"{self.prefix}workers"

    @property
    def reaper(self) -> str:
        return f"{self.prefix}reaper"

    @property
    def gc(self) -> str:
        return f"{self.prefix}gc"

    @property
    def cancelled(self) -> str:
        return f"{self.prefix}cancelled"


def queue_name(models: Iterable[str], lane: Lane) -> str:
    """The Celery queue of jobs that need these models, in a lane."""
    return f"{together(models)}.{lane.value}"


def models_of(queue: str) -> list[str]:
    """The models that jobs of a queue need."""
    return queue.rpartition(".")[0].split("+")


def together(models: Iterable[str]) -> str:
    """One name for a set of models."""
    return "+".join(sorted(set(models)))
