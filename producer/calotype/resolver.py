"""`Resolver`: turns what a submitter wrote into a complete job, or reports what is wrong with it."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

from pydantic_core import from_json, to_json

from calotype.job_image import ImageSource, image_bytes, is_image
from calotype_shared.errors import InvalidRequest, ObjectMissing, ServiceUnavailable, UnknownModel
from calotype_shared.queue.job_store import JobStore
from calotype_shared.queue.submission import Idempotency, NewJob
from calotype_shared.schema.config import GenerationConfig, digest_of
from calotype_shared.schema.enums import Lane
from calotype_shared.schema.model_card import ModelCard
from calotype_shared.schema.presets import quality_preset
from calotype_shared.schema.resolve import ResolvedConfig, draw_seed, resolve
from calotype_shared.settings import TENANT_PATTERN, Settings
from calotype_shared.storage.images import normalize_image, upload_key
from calotype_shared.storage.s3 import SAFE_SECONDS, Storage

Submission = GenerationConfig | str | Mapping[str, Any]  # a config, a bare prompt, or fields

_CARDS_SECONDS = 5.0  # how long the models' cards are remembered
_UPLOADS_SECONDS = 600.0  # how long an upload is believed to be there; well below half of the least age that gc removes
_UPLOADS = 100_000
_METADATA_BYTES = 16 * 1024
_IDEMPOTENCY_KEY = re.compile(r"[\x21-\x7e]{1,200}")


class Resolver:
    """Caches the models' cards and which images are uploaded. Thread-safe."""

    def __init__(
        self, settings: Settings, store: JobStore, storage: Storage, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._settings = settings
        self._store = store
        self._storage = storage
        self._clock = clock
        self._cards: dict[str, ModelCard] = {}
        self._cards_until = float("-inf")
        # Ids that are known to stay in storage long enough, and when that knowledge expires.
        self._uploaded: dict[str, float] = {}
        # `calotype gc` removes older unused uploads, so an upload that a job uses is renewed long before that.
        self._renewed_after = max(settings.retention_seconds, SAFE_SECONDS) / 2

    def parse(self, config: Submission, fields: Mapping[str, Any]) -> GenerationConfig:
        """Parse what was written into a config, and upload images in it. Raises InvalidRequest."""
        if isinstance(config, GenerationConfig) and not fields:
            return config
        return GenerationConfig.parse(self._with_uploads(_fields(config, fields)))

    def new_job(
        self,
        parsed: GenerationConfig,
        *,
        lane: Lane,
        tenant: str,
        job_id: str = "",
        draw_seed: Callable[[], int] = draw_seed,
    ) -> NewJob:
        """The job for a config. An explicit seed requests exactly the images that an equal job generates.

        Raises:
            InvalidRequest: as `resolve`.
        """
        resolved = self.resolve(parsed, draw_seed=draw_seed)
        new = NewJob.of(resolved, lane=lane, job_id=job_id)
        if parsed.seed is None or not self._settings.coalesce:
            return new
        versions = ",".join(self._card(model).version for model in resolved.models)
        return new._replace(identity=digest_of(f"{tenant} {lane.value} {new.digest} {versions}"))

    def resolve(self, config: GenerationConfig, *, draw_seed: Callable[[], int] = draw_seed) -> ResolvedConfig:
        """The complete config, if its models can make it, one worker serves them and its images are uploaded.

        Raises:
            InvalidRequest: it cannot be generated; `UnknownModel` if no worker ever announced the model.
        """
        resolved = resolve(config, {model: self._card(model) for model in config.models}, draw_seed=draw_seed)
        self._check_together(resolved)
        self._check_uploads(resolved)
        return resolved

    def _check_together(self, config: ResolvedConfig) -> None:
        """A job that uses several models goes to a worker that has them all."""
        wanted = set(config.models)
        if len(wanted) > 1 and not any(wanted <= served for served in self._store.served_together()):
            raise InvalidRequest(
                "no worker serves all of these models",
                field="ensemble" if config.ensemble else "refiner",
                value=", ".join(config.models),
                remedy=f"start one: calotype worker {' '.join(f'--model {name}' for name in config.models)}",
            )

    def _check_uploads(self, config: ResolvedConfig) -> None:
        for upload_id in config.uploads:
            if self._is_known(upload_id):
                continue
            key = upload_key(upload_id)
            age = self._storage.age(key)
            if age is not None and age > self._renewed_after:
                try:
                    self._storage.put(key, self._storage.get(key, sha256=upload_id), "image/png")
                except ObjectMissing:
                    age = None
            if age is None:
                raise InvalidRequest(
                    "does not exist", field="upload", value=upload_id, remedy="upload the image first: Client.upload"
                )
            self._remember(upload_id)

    def _is_known(self, upload_id: str) -> bool:
        return self._uploaded.get(upload_id, float("-inf")) > self._clock()

    def _remember(self, upload_id: str) -> None:
        if len(self._uploaded) >= _UPLOADS:
            self._uploaded.clear()
        self._uploaded[upload_id] = self._clock() + _UPLOADS_SECONDS

    def upload(self, image: ImageSource, *, field: str = "image") -> str:
        """Store an image for use as `init_image`, `mask_image` or a control; returns its id.

        Raises:
            InvalidRequest: it is not a PNG, JPEG or WebP, or too large. Nothing was stored.
        """
        upload_id, data = normalize_image(image_bytes(image, field), field=field)
        if not self._is_known(upload_id):
            self._storage.put(upload_key(upload_id), data, "image/png")
            self._remember(upload_id)
        return upload_id

    def _with_uploads(self, fields: dict[str, Any]) -> dict[str, Any]:
        """Uploads images that were given instead of ids."""
        for name in ("init_image", "mask_image", "control_image"):
            if is_image(fields.get(name)):
                fields[name] = self.upload(fields[name], field=name)
        references = fields.get("images")
        if isinstance(references, (list, tuple)):
            fields["images"] = [self.upload(one, field="images") if is_image(one) else one for one in references]
        controls = fields.get("controls")
        if isinstance(controls, (list, tuple)):
            fields["controls"] = [
                {**control, "image": self.upload(control["image"], field="controls.image")}
                if isinstance(control, Mapping) and is_image(control.get("image"))
                else control
                for control in controls
            ]
        return fields

    def _card(self, model: str) -> ModelCard:
        if model not in self._cards or self._clock() >= self._cards_until:
            self._cards = dict(self._store.models())
            self._cards_until = self._clock() + _CARDS_SECONDS
        card = self._cards.get(model)
        if card is None:
            known = f"use one of: {', '.join(sorted(self._cards))}; or start" if self._cards else "start"
            raise UnknownModel(
                "no worker has announced this model",
                field="model",
                value=model,
                remedy=f"{known} a worker for it: calotype worker --model {model}",
            )
        return card

    def tenant(self, name: str | None) -> str:
        """The job's tenant: the given one, or this process' own. Raises InvalidRequest."""
        if name is None:
            return self._settings.tenant
        if not re.fullmatch(TENANT_PATTERN, name):
            raise InvalidRequest(
                "is not a valid tenant name",
                field="tenant",
                value=name,
                remedy="use at most 64 lower-case letters, digits, '.', '_' and '-'",
            )
        return name

    def webhook(self, url: str | None) -> str | None:
        """The checked address of a webhook. Raises InvalidRequest, ServiceUnavailable."""
        if url is None:
            return None
        if self._settings.webhook_secret is None:
            raise InvalidRequest(
                "webhooks are not enabled",
                field="webhook_url",
                value=url,
                remedy="set CALOTYPE_WEBHOOK_SECRET for this process and the dispatcher",
            )
        try:
            from calotype.webhooks.addresses import check_webhook_url  # noqa: PLC0415 - only where they are used
        except ImportError:
            raise ServiceUnavailable("webhooks need optional packages; run: pip install 'calotype[gateway]'") from None
        check_webhook_url(url, allow_private=self._settings.webhook_allow_private)
        return url


def storable(metadata: Mapping[str, Any] | None) -> dict[str, Any]:
    """Check that metadata can be returned as JSON: no NaN, lone surrogates or very deep nesting, and not too long.

    Raises:
        InvalidRequest: it is none.
    """
    plain = dict(metadata or {})
    problem = f"takes more than {_METADATA_BYTES} bytes as JSON"
    try:
        written = to_json(plain)
        from_json(written, allow_inf_nan=False)
        if len(written) <= _METADATA_BYTES:
            return plain
    except ValueError:
        problem = "cannot be stored as JSON"
    raise InvalidRequest(
        problem,
        field="metadata",
        value=plain,
        remedy="send less, without NaN, infinities, lone surrogates and deep nesting",
    )


def idempotency(key: str | None, *asked: object) -> Idempotency | None:
    """The key of a submission, with a hash of the whole request. Raises InvalidRequest."""
    if key is None:
        return None
    if not _IDEMPOTENCY_KEY.fullmatch(key):
        raise InvalidRequest(
            "is not a valid idempotency key",
            field="idempotency_key",
            value=key,
            remedy="use 1 to 200 printable characters",
        )
    return Idempotency(key, digest_of(json.dumps(asked, sort_keys=True, default=str)))


def with_preset(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields in which `quality` stands for a preset; one that is written beside it wins."""
    values = dict(fields)
    quality = values.pop("quality", None)
    return values if quality is None else {**quality_preset(quality), **values}


def _fields(config: Submission, fields: Mapping[str, Any]) -> dict[str, Any]:
    """One mapping of fields: the config's own, then a quality preset's, then those given beside it."""
    if isinstance(config, GenerationConfig):
        base = config.model_dump()
    elif isinstance(config, str):
        base = {"prompt": config}
    else:
        base = dict(config)
    given = dict(fields)
    quality = given.pop("quality", base.pop("quality", None))
    if quality is None:
        return {**base, **given}
    preset = quality_preset(quality)
    if isinstance(config, Mapping):  # a field written beside the preset wins over it
        return {**preset, **base, **given}
    return {**base, **preset, **given}
