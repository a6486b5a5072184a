"""The Celery app of a worker. Each setting is here for a reason; `docs/decisions/` and the comments give it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from celery import Celery
from kombu import Exchange, Queue

from calotype_shared.broker import TASK_NAME
from calotype_shared.jobs import Lane
from calotype_shared.keys import queue_name
from calotype_shared.settings import Settings


def make_app(settings: Settings, *, models: Sequence[str], run_job: Callable[[str], None]) -> Celery:
    """A Celery app whose one task hands a job's id to `run_job`, consuming the models' queues, interactive first.

    Jobs that need several models have a queue for that set of models, so every subset is listened to.
    """
    app = Celery("calotype", broker=settings.redis_url, set_as_current=False)
    direct = Exchange("", type="direct")
    sets = [chosen for size in range(1, len(models) + 1) for chosen in itertools.combinations(models, size)]
    names = [queue_name(chosen, lane) for lane in (Lane.INTERACTIVE, Lane.BULK) for chosen in sets]
    app.conf.update(
        task_queues=[Queue(name, exchange=direct, routing_key=name) for name in names],
        task_default_queue=names[-1],
        # Nothing is ever unpickled.
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
        broker_transport_options={
            "global_keyprefix": settings.key_prefix,
            # Only a backstop: leases bring lost jobs back long before. Shorter would make duplicates.
            "visibility_timeout": 3600,
            "unacked_mutex_expire": 30,  # the default lets a dead restorer block restores for five minutes
            "queue_order_strategy": "priority",
            "priority_steps": [0],  # urgency is by queue; every step would add keys to each BRPOP
            # Without time-outs a dropped connection can hang a worker for ever. `retry_on_timeout` stays unset.
            "socket_timeout": 15,
            "socket_connect_timeout": 5,
            "socket_keepalive": True,
            "health_check_interval": 10,
        },
        worker_send_task_events=False,
        worker_enable_remote_control=False,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        enable_utc=True,
    )

    @app.task(name=TASK_NAME)
    def generate(job_id: str) -> None:
        run_job(job_id)

    return app
