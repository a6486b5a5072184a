"""Our hand-written Celery message against what Celery itself writes into the same Valkey."""

from __future__ import annotations

import base64
import json
from typing import Any

from celery import Celery
from kombu import Connection, Exchange, Queue
from redis import Redis

from calotype_shared.queue.message import TASK_NAME, message
from calotype_shared.settings import Settings


def test_it_says_what_celerys_own_producer_says(settings: Settings, redis: Redis) -> None:
    """Same body, same headers and properties that a consumer reads; only ids, origin and encoding may differ."""
    app = Celery(broker=settings.redis_url, set_as_current=False)
    app.conf.broker_transport_options = {"global_keyprefix": settings.key_prefix}
    app.send_task(TASK_NAME, args=["m.bulk"], task_id="number-1", queue="m.bulk", ignore_result=True)
    theirs = json.loads(str(redis.lpop(f"{settings.key_prefix}m.bulk")))
    ours = json.loads(message("number-1", "m.bulk"))

    def body(sent: dict[str, Any]) -> Any:
        text = sent["body"]
        if sent["properties"].get("body_encoding") == "base64":
            text = base64.b64decode(text)
        return json.loads(text)

    assert body(ours) == body(theirs) == [["m.bulk"], {}, body(theirs)[2]]
    for field in ("content-type", "content-encoding"):
        assert ours[field] == theirs[field]
    for header in ("lang", "task", "id", "root_id", "parent_id", "group", "retries", "eta", "expires", "timelimit"):
        assert ours["headers"][header] == theirs["headers"][header], header
    assert ours["headers"]["ignore_result"] is theirs["headers"]["ignore_result"] is True
    for name in ("correlation_id", "delivery_mode", "priority"):
        assert ours["properties"][name] == theirs["properties"][name], name
    assert ours["properties"]["delivery_info"]["routing_key"] == theirs["properties"]["delivery_info"]["routing_key"]


def test_kombu_delivers_it(settings: Settings, redis: Redis) -> None:
    """The transport that every worker uses reads it, and acknowledging leaves nothing behind."""
    redis.lpush(f"{settings.key_prefix}m.bulk", message("number-1", "m.bulk"))
    options = {"global_keyprefix": settings.key_prefix, "priority_steps": [0]}
    with Connection(settings.redis_url, transport_options=options) as connection:
        queue = Queue("m.bulk", exchange=Exchange(""), routing_key="m.bulk")(connection.default_channel)
        delivered = queue.get()
        assert delivered is not None
        assert delivered.payload[0] == ["m.bulk"]
        assert delivered.headers["task"] == TASK_NAME
        delivered.ack()
    assert not redis.exists(f"{settings.key_prefix}m.bulk")
    assert not redis.exists(f"{settings.key_prefix}unacked")
