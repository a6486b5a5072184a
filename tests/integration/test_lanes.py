"""In which order a worker takes messages from its queues."""

from __future__ import annotations

from typing import Any

from calotype_shared.queue.keys import queue_name
from calotype_shared.schema.enums import Lane
from calotype_shared.settings import Settings
from calotype_worker.jobs.celery_app import make_app


def test_every_model_is_served_and_interactive_jobs_first(valkey: str) -> None:
    """Two models with a backlog each take turns, though one is named first; interactive messages go before both."""
    settings = Settings.load(redis_url=valkey, key_prefix="lanes:")
    app = make_app(settings, models=["alpha", "beta"], run_next=lambda _: None)
    taken: list[str] = []

    def take(_: Any, message: Any) -> None:
        taken.append(message.delivery_info["routing_key"])
        message.ack()

    with app.connection_for_write() as connection, connection.channel() as channel:
        producer = app.amqp.Producer(channel, auto_declare=False)
        for lane, count in ((Lane.BULK, 6), (Lane.INTERACTIVE, 2)):
            for model in ("alpha", "beta"):
                for _ in range(count):
                    producer.publish({}, routing_key=queue_name([model], lane), exchange="", serializer="json")
    with app.connection_for_read() as connection, connection.channel() as channel:
        channel.basic_qos(0, 1, False)
        with app.amqp.Consumer(channel, queues=app.conf.task_queues, callbacks=[take]):
            while len(taken) < 16:
                connection.drain_events(timeout=10)
    interactive, bulk = taken[:4], taken[4:]
    assert sorted(interactive) == ["alpha.interactive"] * 2 + ["beta.interactive"] * 2
    assert sorted(bulk[:6]) == ["alpha.bulk"] * 3 + ["beta.bulk"] * 3, bulk
