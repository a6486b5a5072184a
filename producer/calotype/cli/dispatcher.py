"""`calotype dispatcher`: the process that leads batches."""

from __future__ import annotations

import logging

from calotype.batches.dispatcher import Dispatcher
from calotype.cli.output import say
from calotype.cli.serve import sigterm_interrupts
from calotype.gateway.settings import GatewaySettings
from calotype_shared.errors import ServiceUnavailable
from calotype_shared.observability.logs import set_up_logging
from calotype_shared.queue.server_check import refuse_unsuitable
from calotype_shared.settings import Settings

log = logging.getLogger(__name__)


def dispatcher() -> None:
    """Lead batches until interrupted: validate them, keep their jobs queued, and write their results.

    Any number of dispatchers can run. They share the batches and continue those of a dispatcher that died.
    CALOTYPE_GATEWAY_LOG_… and CALOTYPE_GATEWAY_METRICS_… apply here, too.
    """
    settings, options = Settings.load(), GatewaySettings.load()
    set_up_logging(log_format=options.log_format, level=options.log_level)
    refuse_unsuitable(settings, needed=False)
    as_json = options.log_format == "json"
    metrics = None
    if options.metrics_port is not None:
        try:
            from calotype.gateway.metrics import GatewayMetrics  # noqa: PLC0415 - an extra
        except ImportError:
            raise ServiceUnavailable("metrics need an optional package; run: pip install 'calotype[gateway]'") from None
        metrics = GatewayMetrics(settings, options)
        metrics.start()
    with sigterm_interrupts():
        try:
            dispatcher = Dispatcher(settings, on_webhook=metrics.webhook if metrics is not None else None)
            log.info("dispatcher runs") if as_json else say("dispatcher runs; Ctrl-C stops it")
            dispatcher.run()
        except KeyboardInterrupt:
            dispatcher.stop()
            log.info("dispatcher stopped") if as_json else say("stopped")
    if metrics is not None:
        metrics.close()
