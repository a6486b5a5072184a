"""The Celery message of a job, as Celery's own producer would write it. Needs no Celery.

Calotype pushes messages from the scripts that write the job's record, so that the two are one step. The format is
Celery's message protocol 2 in kombu's Redis envelope, with a plain-text body; a test compares it with what Celery
itself sends. The body says nothing but the job's id: the record is the truth, the message only a hint to look at it.
"""

from __future__ import annotations

import json

TASK_NAME = "calotype.generate"


def envelope_template() -> str:
    """The message of any job: replace every `@id@` by the job's id and every `@queue@` by its queue's name."""
    body = json.dumps([["@id@"], {}, {"callbacks": None, "errbacks": None, "chain": None, "chord": None}])
    message = {
        "body": body,
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": {
            "lang": "py",
            "task": TASK_NAME,
            "id": "@id@",
            "root_id": "@id@",
            "parent_id": None,
            "group": None,
            "argsrepr": "",
            "kwargsrepr": "",
            "retries": 0,
            "eta": None,
            "expires": None,
            "timelimit": [None, None],
            "ignore_result": True,
        },
        "properties": {
            "correlation_id": "@id@",
            "reply_to": "",
            "delivery_mode": 2,
            "delivery_info": {"exchange": "", "routing_key": "@queue@"},
            "priority": 0,
            "delivery_tag": "@id@",
        },
    }
    return json.dumps(message, separators=(",", ":"))


def envelope(job_id: str, queue: str) -> str:
    """The message of one job, filled in as the scripts do it."""
    return envelope_template().replace("@id@", job_id).replace("@queue@", queue)
