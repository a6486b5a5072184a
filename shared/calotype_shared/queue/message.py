"""The Celery wake-up message, as Celery's own producer would write it. Needs no Celery.

Calotype pushes messages from the scripts that write the job's record, so that the two are one step. The format is
Celery's message protocol 2 in kombu's Redis envelope, with a plain-text body; a test compares it with what Celery
itself sends. The body names a queue, not a job: a message is a wake-up to claim the next job of that queue,
which is chosen when a worker is free, not at submission (decision 10).
"""

from __future__ import annotations

import json
from functools import cache

TASK_NAME = "calotype.generate"


@cache
def message_template() -> str:
    """The message template: replace every `@queue@` by the queue's name, and every `@id@` by a unique id."""
    body = json.dumps([["@queue@"], {}, {"callbacks": None, "errbacks": None, "chain": None, "chord": None}])
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


def message(message_id: str, queue: str) -> str:
    """One message, filled in as the scripts do."""
    return message_template().replace("@id@", message_id).replace("@queue@", queue)
