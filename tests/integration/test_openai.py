"""The real `openai` package against a running gateway, worker, Valkey and S3: only its address is changed."""

from __future__ import annotations

import base64
import io
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import openai
import pytest
from PIL import Image

from calotype.api_keys import Scope
from calotype.embedded import EmbeddedServers
from calotype_shared.storage.images import normalize_image
from tests.faults.harness import Forge
from tests.integration.conftest import until
from tests.integration.gateway import Gateway, serving
from tests.models import sample_image

QUICK = {"num_inference_steps": 3, "guidance_scale": 1.0}


@pytest.fixture(scope="module")
def gateway(
    servers: EmbeddedServers, forge: Forge, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Gateway]:
    folder = tmp_path_factory.mktemp("openai")
    with serving(
        servers, forge, folder, f"tiny={tiny_model}", auth="keys", aliases={"gpt-image-1.5": "tiny"}
    ) as gateway:
        yield gateway


@pytest.fixture(scope="module")
def client(gateway: Gateway) -> Iterator[openai.OpenAI]:
    token, _ = gateway.app.state.services.keys.create(name="sdk", tenant="acme", scopes=list(Scope))
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=token, max_retries=0, timeout=60) as client:
        yield client


def opened(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def test_generate(client: openai.OpenAI) -> None:
    """Two images in base64, with our own parameters beside theirs; the seed makes them again."""
    answer = client.images.generate(
        model="tiny", prompt="a cat", n=2, size="64x96", extra_body={**QUICK, "seed": 5, "sampler": "euler_a"}
    )
    images = [opened(base64.b64decode(item.b64_json or "")) for item in answer.data or []]
    assert [shown.shape for shown in images] == [(96, 64, 3)] * 2
    assert [item.seed for item in answer.data or []] == [5, 6]  # type: ignore[attr-defined]
    again = client.images.generate(
        model="tiny", prompt="a cat", size="64x96", extra_body={**QUICK, "seed": 6, "sampler": "euler_a"}
    )
    shown = opened(base64.b64decode((again.data or [])[0].b64_json or ""))
    assert np.abs(shown.astype(int) - images[1]).max() <= 1


def test_generate_as_a_link(client: openai.OpenAI) -> None:
    """`response_format` of their older models; other file formats."""
    answer = client.images.generate(
        model="tiny", prompt="a cat", response_format="url", output_format="webp", quality="low", extra_body=QUICK
    )
    data = httpx2.get((answer.data or [])[0].url or "").content
    assert Image.open(io.BytesIO(data)).format == "WEBP"
    assert answer.output_format == "webp"


def test_generate_streaming(client: openai.OpenAI) -> None:
    """Previews arrive as partial images, the last event is the whole one."""
    stream = client.images.generate(
        model="tiny",
        prompt="a cat",
        stream=True,
        partial_images=2,
        extra_body={"num_inference_steps": 500, "sampler": "ddim", "guidance_scale": 1.0},
    )
    events = list(stream)
    assert [event.type for event in events][-1] == "image_generation.completed"
    partial = [event for event in events if event.type == "image_generation.partial_image"]
    assert 1 <= len(partial) <= 2
    assert [event.partial_image_index for event in partial] == list(range(len(partial)))
    assert all(opened(base64.b64decode(event.b64_json)).shape[2] == 3 for event in events)


def test_who_stops_listening_stops_the_job(client: openai.OpenAI, gateway: Gateway) -> None:
    """A closed stream, and a request that timed out, leave no work behind."""
    long = {"num_inference_steps": 900, "sampler": "ddim", "guidance_scale": 1.0, "num_images": 4}
    stream = client.images.generate(model="tiny", prompt="long", stream=True, partial_images=3, extra_body=long)
    next(iter(stream))
    stream.close()
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.5).images.generate(model="tiny", prompt="long", extra_body=long)
    until(lambda: [job.state.value for job in gateway.client.jobs(limit=2)] == ["cancelled"] * 2)


def test_a_keyed_request_survives_its_connection(client: openai.OpenAI) -> None:
    """Repeated with its key it gives the image of the first try."""
    keyed: dict[str, Any] = {
        "prompt": "keyed",
        "extra_body": {"num_inference_steps": 900, "guidance_scale": 1.0, "sampler": "ddim"},
        "extra_headers": {"Idempotency-Key": "once"},
    }
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.3).images.generate(model="tiny", **keyed)
    [item] = client.with_options(timeout=120).images.generate(model="tiny", **keyed).data or []
    assert opened(base64.b64decode(item.b64_json or "")).shape == (64, 64, 3)
    streamed = {**keyed, "extra_headers": {"Idempotency-Key": "streamed"}, "stream": True, "partial_images": 3}
    stream = client.images.generate(model="tiny", **streamed)
    next(iter(stream))
    stream.close()
    *_, last = client.with_options(timeout=120).images.generate(model="tiny", **streamed)
    assert last.type == "image_generation.completed"


@pytest.mark.parametrize("fields", [{}, {"model": "gpt-image-1.5"}, {"model": "tiny"}])
def test_which_model_is_meant(client: openai.OpenAI, fields: dict[str, Any]) -> None:
    """The only one where none is named, an alias, its own name; with parameters of theirs that mean nothing here."""
    theirs = {"safety_identifier": "u1", "frame_count": 1, "output_compression": 50, "background": "opaque"}
    answer = client.images.generate(prompt="a cat", extra_body={**QUICK, **theirs, "quality": "max"}, **fields)
    assert len(answer.data or []) == 1


def test_edit(client: openai.OpenAI) -> None:
    """Where their mask is transparent is painted anew, the rest is kept to the level."""
    source = io.BytesIO()
    Image.fromarray(sample_image(4)).save(source, "PNG")
    mask = Image.new("RGBA", (64, 64), (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (32, 0, 64, 64))
    masked = io.BytesIO()
    mask.save(masked, "PNG")
    answer = client.images.edit(
        model="tiny",
        image=("source.png", source.getvalue(), "image/png"),
        mask=("mask.png", masked.getvalue(), "image/png"),
        prompt="a dog",
        extra_body={**QUICK, "seed": 1},
    )
    shown = opened(base64.b64decode((answer.data or [])[0].b64_json or ""))
    assert np.array_equal(shown[:, :32], sample_image(4)[:, :32])
    assert not np.array_equal(shown[:, 32:], sample_image(4)[:, 32:])
    whole = client.images.edit(
        model="tiny", image=source.getvalue(), prompt="a dog", extra_body={**QUICK, "strength": 0.0}
    )
    assert np.array_equal(opened(base64.b64decode((whole.data or [])[0].b64_json or "")), sample_image(4))


def test_an_edit_of_several_images_names_who_takes_them(client: openai.OpenAI) -> None:
    source = io.BytesIO()
    Image.fromarray(sample_image(4)).save(source, "PNG")
    with pytest.raises(openai.BadRequestError, match="several: none is served"):
        client.images.edit(model="tiny", image=[source.getvalue(), source.getvalue()], prompt="a dog")


def test_models(client: openai.OpenAI) -> None:
    """Listed, and one by one."""
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "calotype"
    with pytest.raises(openai.NotFoundError) as missing:
        client.models.retrieve("gpt-image-1")
    assert missing.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("fields", "kind", "param", "said"),
    [
        ({"size": "60x64"}, openai.BadRequestError, "width", "use 56 or 64"),
        ({"size": "large"}, openai.BadRequestError, "size", "WIDTHxHEIGHT"),
        ({"background": "transparent"}, openai.BadRequestError, "background", "auto or opaque"),
        ({"output_compression": 500}, openai.BadRequestError, "output_compression", "0 to 100"),
        ({"n": 11}, openai.BadRequestError, "n", "use 1 to 10"),
        ({"model": "dall-e-3"}, openai.NotFoundError, "model", "no worker has announced this model"),
        ({"extra_body": {"color": "red"}}, openai.BadRequestError, "color", "remove it"),
        ({"prompt": "x" * 5000}, openai.BadRequestError, "prompt", "shorten it"),
    ],
)
def test_errors_are_theirs(client: openai.OpenAI, fields: dict[str, Any], kind: type, param: str, said: str) -> None:
    """The SDK's own exceptions, with the field and the remedy."""
    with pytest.raises(kind) as refused:
        client.images.generate(**{"model": "tiny", "prompt": "a cat", **fields})
    error: Any = refused.value
    assert error.param == param
    assert said in error.message


def test_errors_of_keys(client: openai.OpenAI, gateway: Gateway) -> None:
    """No key, and one that may not."""
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="sk-wrong").models.list()
    reader, _ = gateway.app.state.services.keys.create(name="r", scopes=[Scope.JOBS_READ])
    with pytest.raises(openai.PermissionDeniedError):
        client.with_options(api_key=reader).images.generate(model="tiny", prompt="a cat")
    few, _ = gateway.app.state.services.keys.create(name="few", requests_per_minute=1)
    client.with_options(api_key=few).models.list()
    with pytest.raises(openai.RateLimitError):
        client.with_options(api_key=few).models.list()


def test_the_whole_batch_round_trip(client: openai.OpenAI) -> None:
    """File, batch, polling, output and error files, as their guide does it."""
    lines = [
        {
            "custom_id": f"image-{i}",
            "method": "POST",
            "url": "/v1/images/generations",
            "body": {"model": "tiny", "prompt": f"cat {i}", "size": "64x64", **QUICK, "seed": i},
        }
        for i in range(20)
    ]
    lines[7]["body"] = {"model": "tiny", "prompt": "cat", "size": "63x64"}
    lines[8]["url"] = "/v1/chat/completions"
    manifest = "\n".join(json.dumps(line) for line in lines).encode()
    file = client.files.create(file=("lines.jsonl", manifest), purpose="batch")
    assert (file.bytes, file.purpose, file.filename) == (len(manifest), "batch", "lines.jsonl")
    assert [listed.id for listed in client.files.list()] == [file.id]
    assert client.files.content(file.id).read() == manifest

    batch = client.batches.create(
        input_file_id=file.id,
        endpoint="/v1/images/generations",
        completion_window="24h",
        metadata={"night": "1"},
    )
    assert (batch.object, batch.endpoint, batch.input_file_id) == ("batch", "/v1/images/generations", file.id)
    assert batch.expires_at == batch.created_at + 86_400
    deadline = time.monotonic() + 60
    while batch.status not in ("completed", "failed", "expired", "cancelled"):
        assert time.monotonic() < deadline
        time.sleep(0.2)
        batch = client.batches.retrieve(batch.id)
    assert (batch.status, batch.metadata) == ("completed", {"night": "1"})
    assert batch.request_counts is not None
    assert batch.request_counts.model_dump() == {"total": 20, "completed": 18, "failed": 2}

    output = [json.loads(line) for line in client.files.content(batch.output_file_id or "").text.splitlines()]
    by_id = {line["custom_id"]: line for line in output}
    assert len(by_id) == 18
    answer = by_id["image-3"]["response"]
    assert (answer["status_code"], by_id["image-3"]["error"]) == (200, None)
    [item] = answer["body"]["data"]
    assert item["seed"] == 3
    assert opened(httpx2.get(item["url"]).content).shape == (64, 64, 3)
    failed = [json.loads(line) for line in client.files.content(batch.error_file_id or "").text.splitlines()]
    assert {line["custom_id"] for line in failed} == {"image-7", "image-8"}
    assert all(line["error"]["code"] == "invalid_request" for line in failed)
    assert client.files.retrieve(batch.output_file_id or "").purpose == "batch_output"
    assert [listed.id for listed in client.batches.list(limit=5)] == [batch.id]
    assert client.files.delete(file.id).deleted
    with pytest.raises(openai.NotFoundError, match=file.id):
        client.files.retrieve(file.id)


def test_cancelling_a_batch(client: openai.OpenAI, gateway: Gateway) -> None:
    """Nothing new starts; and nobody else's batch can be seen."""
    body = {"model": "tiny", "prompt": "x", "num_inference_steps": 900, "sampler": "ddim"}
    line = {"method": "POST", "url": "/v1/images/generations", "body": body}
    manifest = "\n".join(json.dumps({**line, "custom_id": str(i)}) for i in range(50)).encode()
    file = client.files.create(file=("lines.jsonl", manifest), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/images/generations", completion_window="24h")
    until(lambda: client.batches.retrieve(batch.id).status == "in_progress")
    assert client.batches.cancel(batch.id).status in ("cancelling", "cancelled")  # a dispatcher may be that fast
    until(lambda: client.batches.retrieve(batch.id).status == "cancelled")
    counts = client.batches.retrieve(batch.id).request_counts
    assert counts is not None
    assert (counts.total, counts.completed) == (50, 0)
    other, _ = gateway.app.state.services.keys.create(name="other", tenant="other")
    stranger = client.with_options(api_key=other)
    for ask, unknown in (
        (lambda: stranger.batches.retrieve(batch.id), f"batch '{batch.id}' does not exist"),
        (lambda: stranger.batches.cancel(batch.id), f"batch '{batch.id}' does not exist"),
        (lambda: stranger.files.content(file.id), file.id),
        (lambda: stranger.files.content(f"file-{batch.id}-errors"), f"batch '{batch.id}' does not exist"),
        (lambda: stranger.files.delete(file.id), file.id),
    ):
        with pytest.raises(openai.NotFoundError, match=unknown):
            ask()
    reported = set()  # the same of another's as of none
    for batch_id in (batch.id, "batch_none"):
        with pytest.raises(openai.NotFoundError) as refused:
            client.with_options(api_key=other).batches.retrieve(batch_id)
        reported.add(refused.value.message.replace(batch_id, "…"))
    assert len(reported) == 1, reported


def test_several_images_of_an_edit_are_references(client: openai.OpenAI, gateway: Gateway) -> None:
    """For a model that takes them. Nobody serves it here, so the job is looked at in the queue."""
    card = gateway.client.models()["tiny"].model_copy(update={"name": "editor", "features": frozenset({"edit"})})
    gateway.client._store.announce_model(card)
    files = []
    for seed in (1, 2):
        buffer = io.BytesIO()
        Image.fromarray(sample_image(seed)).save(buffer, "PNG")
        files.append(buffer.getvalue())
    keyed = {"Idempotency-Key": "references"}
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=5).images.edit(model="editor", image=files, prompt="a dog", extra_headers=keyed)
    [job] = gateway.client.jobs(limit=1)
    assert job.config.images == tuple(normalize_image(file)[0] for file in files)
    assert job.config.init_image is None
    gateway.client.cancel(job.id)
