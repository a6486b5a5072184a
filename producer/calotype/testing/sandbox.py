"""`Sandbox`: a separate, empty Calotype for one test: queue, bucket, worker, dispatcher and client."""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from calotype.batches.dispatcher import Dispatcher
from calotype.client import Client
from calotype.embedded import EmbeddedServers
from calotype.testing.worker import ScriptedWorker
from calotype_shared.schema.enums import SamplerType
from calotype_shared.schema.model_card import ModelCard
from calotype_shared.settings import Settings
from calotype_shared.storage.s3 import Storage


def demo_card(name: str = "demo", **changes: Any) -> ModelCard:
    """The card of a model like the bundled one. `changes` are fields of `ModelCard`."""
    fields: dict[str, Any] = {
        "name": name,
        "family": "sd",
        "version": "test",
        "size_multiple": 32,
        "native_sizes": ((128, 128), (160, 96), (96, 160)),
        "max_pixels": 512 * 512,
        "max_prompt_tokens": 77,
        "samplers": tuple(SamplerType),
        "features": frozenset({"text_to_image", "image_to_image", "inpainting"}),
    }
    return ModelCard.model_validate({**fields, **changes})


class Sandbox:
    """A context manager. `client`, `worker` and `settings` exist inside its block.

    ```python
    with Sandbox() as sandbox:
        [image] = sandbox.client.submit("a red circle", seed=7).result(30)
    ```

    It starts servers of its own, which takes a few seconds, or uses `servers`, which may serve many sandboxes: each
    has keys and a bucket that no other has. `cards` are the models that the worker serves, `lease_seconds` how long a
    job stays with a worker that crashes, and `options` are fields of `Settings`, such as `tenant` or `max_queued`.

    Raises:
        ServiceUnavailable: the servers are not installed, or did not start.
    """

    def __init__(
        self,
        *,
        servers: EmbeddedServers | None = None,
        cards: Sequence[ModelCard] | None = None,
        lease_seconds: float = 10.0,
        **options: Any,
    ) -> None:
        self._servers = servers
        self._cards = [demo_card()] if cards is None else list(cards)
        self._lease_seconds = lease_seconds
        self._options = options
        self._opened = ExitStack()
        self.settings: Settings
        self.worker: ScriptedWorker
        self.client: Client

    @property
    def environment(self) -> Mapping[str, str]:
        """The variables with which any process, and `Client()` without arguments, finds this sandbox."""
        return self.settings.environment()

    def __enter__(self) -> Self:
        with ExitStack() as opened:
            servers = self._servers or opened.enter_context(_own_servers(opened))
            name = f"test-{uuid.uuid4().hex[:12]}"
            own = {"key_prefix": f"{name}:", "s3_bucket": name, "s3_public_endpoint_url": servers.seaweed.endpoint_url}
            self.settings = servers.settings(**{**own, **self._options})
            Storage(self.settings).check(create=True)
            worker = ScriptedWorker(self.settings, self._cards, lease_seconds=self._lease_seconds)
            self.worker = opened.enter_context(worker)
            opened.enter_context(Dispatcher(self.settings))
            self.client = opened.enter_context(Client(settings=self.settings))
            self._opened = opened.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()


def _own_servers(opened: ExitStack) -> EmbeddedServers:
    folder = opened.enter_context(tempfile.TemporaryDirectory(prefix="calotype-test-"))
    return EmbeddedServers.start(Path(folder))
