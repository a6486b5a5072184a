"""Every Redis key of Calotype, documented once. All of them begin with the setting `key_prefix`.

| key | type | holds | lives |
|---|---|---|---|
| `job:{id}` | hash | the job's record: the truth about it (`jobs.py`) | while live; `retention_seconds` once final |
| `{models}.{lane}` | list | Celery messages of that queue; Celery pops from the right | until popped |
| `waiting:{queue}` | zset | ids queued there, by the microsecond they were queued | until claimed or cancelled |
| `mark:{queue}` | hash | `high`: newest queueing time claimed; `seen`, `at`: what the reaper saw of it, when | tiny |
| `queues` | set | names of queues that ever had a job | tiny |
| `leases` | zset | ids being worked on, by the millisecond their lease ends | until finished, released or reaped |
| `counts` | hash | jobs by state: now for queued and running, ever for the final ones | for ever |
| `recent` | zset | ids by creation time, for listing | entries go with their records (the reaper trims) |
| `models` | hash | model name -> its card as JSON | for ever: jobs may be queued while no worker runs |
| `together` | set | names of models that one worker serves, joined by `+`: what an ensemble can be made of | tiny |
| `preview:{id}` | hash | picture number -> its newest preview as JSON | a minute |
| `worker:{name}` | string | a worker's own report as JSON | seconds; renewed by the worker |
| `workers` | set | names of workers that reported | trimmed when read |
| `reaper` | string | who is reaping now | a second or two |
| `cancelled` | channel | ids of jobs as they are cancelled | – |

Celery's Redis transport keeps its own keys under the same prefix: `unacked`, `unacked_index`, `unacked_mutex`,
`_kombu.binding*`. They are Celery's and nothing here reads them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from calotype_shared.jobs import Lane


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

    def mark(self, queue: str) -> str:
        return f"{self.prefix}mark:{queue}"

    def worker(self, name: str) -> str:
        return f"{self.prefix}worker:{name}"

    def preview(self, job_id: str) -> str:
        return f"{self.prefix}preview:{job_id}"

    @property
    def together(self) -> str:
        return f"{self.prefix}together"

    @property
    def queues(self) -> str:
        return f"{self.prefix}queues"

    @property
    def leases(self) -> str:
        return f"{self.prefix}leases"

    @property
    def counts(self) -> str:
        return f"{self.prefix}counts"

    @property
    def recent(self) -> str:
        return f"{self.prefix}recent"

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
    def cancelled(self) -> str:
        return f"{self.prefix}cancelled"


def queue_name(models: Iterable[str], lane: Lane) -> str:
    """The Celery queue of jobs that need these models at hand, in a lane."""
    return f"{together(models)}.{lane.value}"


def together(models: Iterable[str]) -> str:
    """One name for a set of models."""
    return "+".join(sorted(set(models)))
