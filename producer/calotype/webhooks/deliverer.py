"""`Deliverer`: attempts the deliveries that are due, a few at a time, and decides the outcome of each."""

from __future__ import annotations

import json
import logging
import random
import ssl
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any

from redis.exceptions import RedisError

from calotype.webhooks.addresses import without_secrets
from calotype.webhooks.deliveries import Hook, Hooks
from calotype.webhooks.network import Resolver, resolve_host
from calotype.webhooks.payload import Describe
from calotype.webhooks.sender import Response, Sender
from calotype.webhooks.signing import signed_headers, tenant_secret
from calotype_shared.errors import CalotypeError, InvalidRequest

log = logging.getLogger(__name__)

ATTEMPTS = 8  # the last about eight hours after the first
MAX_RETRY_AFTER_SECONDS = 3_600.0
_SLACK_SECONDS = 50.0  # part of a lease for what the timeout does not cover: resolving names, reading records
_BUSY_PAUSE, _IDLE_PAUSE, _OUTAGE_PAUSE = 0.05, 0.5, 5.0  # seconds between checks of Redis


class Deliverer:
    """Delivers the webhooks of all tenants. Any number of processes may do so at the same time.

    `secret` is the operator's, `timeout` seconds for one attempt. At most `concurrency` attempts run at a time, of
    which `per_host` go to one host and `per_tenant` belong to one tenant, so that slow receivers hold up only
    themselves. `run` and `deliver_due` belong to one thread; their attempts run in threads of their own.

    Raises:
        SettingsError: the secret is too short.
    """

    def __init__(
        self,
        hooks: Hooks,
        *,
        describe: Describe,
        secret: str,
        allow_private: bool = False,
        timeout: float = 10.0,
        concurrency: int = 16,
        per_host: int = 4,
        per_tenant: int = 8,
        resolve: Resolver = resolve_host,
        tls: ssl.SSLContext | None = None,
        clock: Callable[[], float] = time.time,
        on_outcome: Callable[[str], object] | None = None,
    ) -> None:
        tenant_secret(secret, "")  # refuses a weak one now, not at the first delivery
        self._hooks = hooks
        self._describe = describe
        self._secret = secret
        self._sender = Sender(allow_private=allow_private, timeout=timeout, resolve=resolve, tls=tls)
        self._clock = clock
        self._on_outcome = on_outcome or (lambda _: None)  # of an attempt: delivered, postponed or dropped
        self._lease_seconds = timeout + _SLACK_SECONDS
        self._concurrency = concurrency
        self._per_host = per_host
        self._per_tenant = per_tenant
        self._under_way: set[Hook] = set()
        self._lock = threading.Lock()  # of the set

    def run(self, stop: threading.Event) -> None:
        """Deliver until `stop` is set, then finish the attempts in progress. Survives outages of Redis."""
        with self._threads() as threads:
            while not stop.wait(_BUSY_PAUSE if self._under_way else _IDLE_PAUSE):
                try:
                    self._start_due(threads)
                except (CalotypeError, RedisError) as error:
                    log.warning("webhooks cannot be read", extra={"reason": str(error)})
                    stop.wait(_OUTAGE_PAUSE)
                except Exception:
                    log.exception("unexpected error in webhook delivery")
                    stop.wait(_OUTAGE_PAUSE)

    def deliver_due(self) -> int:
        """One round: attempt the deliveries that are due, up to the limits, and wait for them. Returns how many.

        Raises:
            RedisUnavailable: Redis cannot be reached.
        """
        with self._threads() as threads:
            return self._start_due(threads)

    def _threads(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self._concurrency, thread_name_prefix="webhook")

    def _start_due(self, threads: Executor) -> int:
        with self._lock:
            under_way = tuple(self._under_way)
        if len(under_way) >= self._concurrency:
            return 0
        hooks = self._hooks.take(
            lease_seconds=self._lease_seconds,
            most=self._concurrency - len(under_way),
            under_way=under_way,
            per_host=self._per_host,
            per_tenant=self._per_tenant,
        )
        with self._lock:
            self._under_way.update(hooks)
        for hook in hooks:
            threads.submit(self._deliver, hook)
        return len(hooks)

    def _deliver(self, hook: Hook) -> None:
        """One attempt, from reading the record to settling the delivery. Contains its own errors."""
        try:
            self._attempt(hook)
        except (CalotypeError, RedisError) as error:  # its lease brings it back
            log.warning("webhook outcome not recorded", extra={"job_id": hook.id, "reason": str(error)})
        except Exception:
            log.exception("unexpected error in a webhook", extra={"job_id": hook.id})
        finally:
            with self._lock:
                self._under_way.discard(hook)

    def _attempt(self, hook: Hook) -> None:
        try:
            data = self._describe(hook.type, hook.id)
            if data is None:
                self._hooks.done(hook)
                return
            answer = self._post(hook, data)
        except InvalidRequest as error:
            self._give_up(hook, error.problem)
        except Exception as error:  # anything an untrusted server can cause, and unavailable storage
            self._try_again(hook, str(error) or type(error).__name__)
        else:
            self._settle(hook, answer)

    def _post(self, hook: Hook, data: dict[str, Any]) -> Response:
        at = datetime.fromtimestamp(hook.at, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        body = json.dumps({"type": hook.type, "timestamp": at, "data": data}, separators=(",", ":")).encode()
        signature = signed_headers(
            tenant_secret(self._secret, hook.tenant),
            message_id=hook.message_id,
            timestamp=int(self._clock()),
            body=body,
        )
        headers = {"content-type": "application/json", "user-agent": "Calotype-Webhook", **signature}
        return self._sender.post(hook.url, headers=headers, body=body)

    def _settle(self, hook: Hook, answer: Response) -> None:
        if answer.delivered:
            log.info("webhook delivered", extra={"job_id": hook.id, "attempt": hook.attempt})
            self._on_outcome("delivered")
            self._hooks.done(hook)
        elif answer.gone:
            self._give_up(hook, "the receiver wants no more (410)")
        else:
            asked = min(answer.retry_after, MAX_RETRY_AFTER_SECONDS)
            self._try_again(hook, f"the receiver answered {answer.status}", at_least=asked)

    def _try_again(self, hook: Hook, reason: str, *, at_least: float = 0.0) -> None:
        if hook.attempt >= ATTEMPTS:
            self._give_up(hook, reason)
            return
        self._hooks.postpone(hook, seconds=max(backoff(hook.attempt), at_least))
        self._on_outcome("postponed")
        log.info("webhook postponed", extra={"job_id": hook.id, "attempt": hook.attempt, "reason": reason})

    def _give_up(self, hook: Hook, reason: str) -> None:
        if self._hooks.done(hook):
            self._on_outcome("dropped")
            log.warning(
                "webhook dropped",
                extra={"job_id": hook.id, "url": without_secrets(hook.url), "attempt": hook.attempt, "reason": reason},
            )


def backoff(attempt: int) -> float:
    """Seconds after a failed attempt: about 5 s, 20 s, 80 s, 5 min, 20 min, 1.4 h and 5.7 h, half more or less."""
    return 5.0 * 4.0 ** (attempt - 1) * random.uniform(0.5, 1.5)
