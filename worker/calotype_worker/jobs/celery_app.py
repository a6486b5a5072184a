"""The Celery app of a worker. The reason of each setting is in the comments or in `docs/decisions/`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from celery import Celery
from kombu import Exchange, Queue

from calotype_shared.queue.connection import CONNECT_SECONDS, HEALTH_SECONDS, SOCKET_SECONDS
from calotype_shared.queue.keys import queue_name
from calotype_shared.queue.message import TASK_NAME
from calotype_shared.schema.enums import Lane
from calotype_shared.settings import Settings
from calotype_worker.jobs.transport import broker_of


def queue_names(models: Sequence[str], lane: Lane) -> list[str]:
    """Queues of a lane that a worker listens to: jobs that need several models have one for that set of models."""
    sets = [chosen for size in range(1, len(models) + 1) for chosen in itertools.combinations(models, size)]
    return [queue_name(chosen, lane) for chosen in sets]


def make_app(settings: Settings, *, models: Sequence[str], run_next: Callable[[str], None]) -> Celery:
    """A Celery app whose only task passes a queue's name to `run_next`.

    It consumes the models' queues: interactive ones first, and the models in turn.
    """
    broker = broker_of(settings)
    app = Celery("calotype", broker=broker.url, set_as_current=False)
    direct = Exchange("", type="direct")
    names = [*queue_names(models, Lane.INTERACTIVE), *queue_names(models, Lane.BULK)]
    app.conf.update(
        task_queues=[Queue(name, exchange=direct, routing_key=name) for name in names],
        task_default_queue=names[-1],
        # Messages are never unpickled.
        accept_content=["json"],
        task_serializer="json",
        result_serializer="json",
        # The record is the truth: no result backend, and a message is acknowledged only after its job's commit.
        task_ignore_result=True,
        task_acks_late=True,
        worker_prefetch_multiplier=1,
        # True raises NotImplementedError under threads: the worker would stop consuming but stay alive.
        worker_cancel_long_running_tasks_on_connection_loss=False,
        # The default of 100 attempts would end the worker after a long outage of Redis.
        broker_connection_max_retries=None,
        broker_connection_retry_on_startup=True,
        # Otherwise a Redis error such as "out of memory" or "read-only replica" would end the worker.
        broker_channel_error_retry=True,
        broker_use_ssl=broker.ssl,
        broker_transport_options={
            **broker.options,
            "global_keyprefix": settings.key_prefix,
            # Only a backstop: leases return lost jobs long before. A shorter time would cause duplicates.
            "visibility_timeout": 3600,
            "unacked_mutex_expire": 30,  # by default, a process that dies in a restore blocks others for 5 minutes
            "queue_order_strategy": "calotype_worker.jobs.lanes:PriorityRoundRobin",
            "priority_steps": [0],  # urgency is by queue; every step would add keys to each BRPOP
            # Without time-outs a dropped connection can hang a worker for ever. `retry_on_timeout` stays unset.
            "socket_timeout": SOCKET_SECONDS,
            "socket_connect_timeout": CONNECT_SECONDS,
            "socket_keepalive": True,
            "health_check_interval": HEALTH_SECONDS,
        },
        worker_send_task_events=False,
        worker_enable_remote_control=False,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        enable_utc=True,
    )

    @app.task(name=TASK_NAME)
    def generate(queue: str) -> None:
        if queue in names:  # a message in the wrong list would bring jobs that this worker has no model for
            run_next(queue)

    return app
