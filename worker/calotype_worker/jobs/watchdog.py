"""`Watchdog`: ends a worker whose engine makes no progress, so that its leases expire and others take over."""

from __future__ import annotations

import threading
from collections.abc import Callable

_LOOK_SECONDS = 0.5


class Watchdog:
    """`overdue()` says what hangs, or None; `leave(what)` ends the process and does not return."""

    def __init__(self, overdue: Callable[[], str | None], leave: Callable[[str], None]) -> None:
        self._overdue = overdue
        self._leave = leave
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="calotype-watchdog", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()

    def _watch(self) -> None:
        while not self._stopped.wait(_LOOK_SECONDS):
            if what := self._overdue():
                self._leave(what)
                return
