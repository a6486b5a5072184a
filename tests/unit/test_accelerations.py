"""Accelerations that cost likeness: off they change no bit; on, each row keeps to itself, and the network runs less."""

from __future__ import annotations

import json
import sys
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from calotype_shared.errors import InvalidRequest, ModelLoadError, SettingsError
from calotype_shared.queue.job_store import Claim
from calotype_shared.schema.enums import JobState, Lane, SamplerType
from calotype_shared.schema.jobs import JobRecord
from calotype_shared.schema.resolve import ResolvedConfig
from calotype_worker.engine import Engine, EngineSettings, GenerationRequest
from calotype_worker.engine.batch_row import Layout
from calotype_worker.engine.step_batch import StepBatch
from calotype_worker.models import Accelerations, StepModel, load_model
from calotype_worker.models.base import RowMemory, Rows
from calotype_worker.models.token_merging import Matches
from calotype_worker.request import Generated
from tests.unit.stub_models import Shelf, batch_of, wanted
from tests.unit.test_engine_golden import TOLERANCE, levels, run_staggered


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    return Shelf(tmp_path_factory.mktemp("accelerations"))


@contextmanager
def running(model: StepModel, **settings: Any) -> Iterator[Engine]:
    engine = Engine(model, EngineSettings(**{"max_rows": 16, **settings}))
    engine.start()
    try:
        yield engine
    finally:
        engine.stop()


def apart(engine: Engine, requests: list[GenerationRequest]) -> list[Generated]:
    """Each request all by itself."""
    return [engine.submit(replace(each, request_id=f"{each.request_id}-alone")).result(120) for each in requests]


def made_at_once(model: StepModel, requests: list[GenerationRequest]) -> np.ndarray:
    with running(model, max_rows=32) as engine:
        futures = [engine.submit(request) for request in requests]
        return np.stack([future.result(120).image for future in futures]).astype(float)


@torch.inference_mode()
def stepped(model: StepModel, requests: list[GenerationRequest]) -> tuple[list[np.ndarray], float]:
    """Images of requests of which another joins at every second step; and the mean number of rows of a pass."""
    waiting = list(batch_of(model, requests).members)
    rows: list[int] = []
    finished: dict[str, Any] = {}
    batch = batch_of(model, requests[:1])
    batch.leave(batch.members)
    while waiting or batch.members:
        if waiting and len(rows) % 2 == 0:
            batch.join([waiting.pop(0)])
        report = batch.step()
        assert not report.failed
        rows.append(report.rows)
        finished |= {row.request.request_id: latents for row, latents in report.finished}
    decoded = model.decode(torch.stack([finished[request.request_id] for request in requests]))
    return list(decoded), float(np.mean(rows))


def some_rows(model: StepModel, count: int = 3, size: tuple[int, int] = (64, 64), **further: Any) -> Rows:
    texts = [batch_slot.conditioning for batch_slot in batch_of(model, wanted("")[:count]).members]
    generator = torch.Generator().manual_seed(1)
    return Rows(
        latents=torch.randn((count, *model.latent_shape(*size)), generator=generator),
        timesteps=torch.tensor([900.0, 420.0, 37.0])[:count],
        conditioning={name: torch.stack([text[name] for text in texts]) for name in texts[0]},
        **further,
    )


# ---- off


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux"])
def test_what_is_off_leaves_no_trace(shelf: Shelf, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The network is called once, as it was loaded, whatever memories the rows bring; they stay empty."""
    model: Any = shelf.model(name)
    calls = []
    network = model._denoiser

    def counted(*inputs: Any, **named: Any) -> Any:
        calls.append(1)
        return network(*inputs, **named)

    monkeypatch.setattr(model, "_denoiser", counted)
    memories = [RowMemory(step=index) for index in range(3)]
    without = model.predict(some_rows(model))
    assert torch.equal(without, model.predict(some_rows(model, memories=memories)))
    assert len(calls) == 2
    assert not any(memory.kept for memory in memories)
    assert model.accelerations.used_for(wanted(name)[0]) == ()


# ---- what is left out


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux"])
def test_a_full_pass_is_the_network_and_so_is_the_next_of_the_same_inputs(shelf: Shelf, name: str) -> None:
    """What the caches do by hand is what diffusers does, for sizes too that the network must pad.

    And what they remember is what they would compute.
    """
    accelerations = {"first_block_cache": 0.5} if name in ("sd3", "flux") else {"deep_cache": 3}
    cached, exact = shelf.model(name, **accelerations), shelf.model(name)
    for size in [(64, 64), (72, 56)] if "deep_cache" in accelerations else [(64, 64), (96, 64)]:
        memories = [RowMemory() for _ in range(3)]
        rows = some_rows(cached, size=size, memories=memories)
        right = exact.predict(rows)
        assert (cached.predict(rows) - right).abs().max() < 1e-4 * right.abs().max()
        assert all(memory.kept for memory in memories)
        for memory in memories:
            memory.step = 1
        assert (cached.predict(rows) - right).abs().max() < 1e-4 * right.abs().max()
        different = replace(rows, latents=rows.latents * 0.99)
        changed = (cached.predict(different) - exact.predict(different)).abs().max()
        assert changed > 1e-5 * right.abs().max(), "nothing was left out"
        plain = [cached.predict(replace(rows, memories=none)) for none in ((), [None] * 3)]
        assert torch.equal(*plain)


def rows_through(module: torch.nn.Module, seen: list[int]) -> Any:
    """Counts the rows of every call."""
    return module.register_forward_pre_hook(
        lambda _, args, named: seen.append(len(named.get("hidden_states", args[0] if args else None))), with_kwargs=True
    )


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_inner_blocks_run_at_every_third_step_of_each_row(shelf: Shelf, name: str) -> None:
    """Rows that joined at different steps have their turn at different times, and in one pass."""
    model: Any = shelf.model(name, deep_cache=3)
    inner: list[int] = []
    outer: list[int] = []
    hooks = [rows_through(model._denoiser.mid_block, inner), rows_through(model._denoiser.up_blocks[-1], outer)]
    first, second = wanted(name)[1], wanted(name)[3]  # seven steps each; the second is guided: two rows
    batch = batch_of(model, [first])
    batch.step()
    other = batch_of(model, [second])
    batch.join(other.members)
    while batch.members:
        batch.step()
    for hook in hooks:
        hook.remove()
    assert outer == [1, *[3] * 6, 2]
    assert inner == [1, 2, 1, 2, 1, 2]  # steps 0, 3, 6 of either


def test_transformers_run_their_other_blocks_for_rows_that_changed(shelf: Shelf) -> None:
    """Each row by its own change; with a threshold of next to nothing all of them run always."""
    found = {}
    for threshold in (1e-6, 0.3):
        model: Any = shelf.model("sd3", first_block_cache=threshold)
        seen: list[int] = []
        every: list[int] = []
        blocks = model._denoiser.transformer_blocks
        hooks = [rows_through(blocks[0], every), rows_through(blocks[1], seen)]
        batch = batch_of(model, wanted("sd3")[:4])
        while batch.members:
            batch.step()
        for hook in hooks:
            hook.remove()
        found[threshold] = (sum(seen), sum(every), len(set(seen)))
    assert found[1e-6][0] == found[1e-6][1]
    assert found[0.3][0] < 0.9 * found[0.3][1]
    assert found[0.3][2] > 1, "the rows of a pass all decided alike, so nothing was shown"


def test_merged_tokens_are_fewer_and_come_back(shelf: Shelf) -> None:
    """The highest resolution with attention, here 4x4: half of its tokens reach the attention's layers."""
    model: Any = shelf.model("sd", token_merging=0.5)
    tokens: Counter[int] = Counter()
    hooks = [
        module.register_forward_pre_hook(lambda _, inputs: tokens.update([inputs[0].shape[1]]))
        for path, module in model._denoiser.named_modules()
        if path.endswith("attn1.to_q")
    ]
    model.predict(some_rows(model))
    for hook in hooks:
        hook.remove()
    assert tokens[16 - 8] == 3  # one layer down, two up
    assert tokens[16] == 1  # the middle is of the same size here, and left alone


@pytest.mark.parametrize(("height", "width"), [(4, 4), (5, 7), (2, 6)])
def test_tokens_are_merged_with_their_likes(height: int, width: int) -> None:
    """Equal tokens come back as they were; each row has its own matches; nothing is lost at a ratio of 0."""
    generator = torch.Generator().manual_seed(2)
    count = height * width
    kinds = torch.randn((3, 8), generator=generator)
    tokens = torch.stack([kinds[torch.arange(count) // width % 2], kinds[torch.arange(count) % width // 2 % 3]])
    matches = Matches(tokens, height, width, 0.5)
    assert matches.merge(tokens).shape[1] == count - count // 2
    assert torch.allclose(matches.split(matches.merge(tokens))[1], tokens[1], atol=1e-6)
    noise = torch.randn((2, count, 8), generator=generator)
    nothing = Matches(noise, height, width, 0.0)
    assert torch.equal(nothing.split(nothing.merge(noise)), noise)
    together, alone = Matches(noise, height, width, 0.6), Matches(noise[1:], height, width, 0.6)
    assert torch.equal(together.split(together.merge(noise))[1], alone.split(alone.merge(noise[1:]))[0])


# ---- each row keeps to itself


@pytest.mark.parametrize(
    ("name", "accelerations"),
    [
        ("sd", {"deep_cache": 3}),
        ("sd", {"deep_cache": 2, "token_merging": 0.5, "quantized": "int8"}),
        ("sdxl", {"deep_cache": 3}),
        ("sd3", {"first_block_cache": 0.3}),
        ("flux", {"first_block_cache": 0.3}),
    ],
    ids=str,
)
def test_an_image_does_not_depend_on_its_company(shelf: Shelf, name: str, accelerations: dict[str, Any]) -> None:
    """Joining and leaving at any step, beside rows of every kind: the accelerations image is the one made alone."""
    model, requests = shelf.model(name, **accelerations), wanted(name)
    together, mean_rows = stepped(model, requests)
    assert mean_rows > 2, "they did not share passes, so nothing was shown"
    alone = [stepped(model, [request])[0][0] for request in requests]
    differences = {r.request_id: levels(*pair) for r, *pair in zip(requests, together, alone, strict=True)}
    assert max(differences.values()) <= TOLERANCE, differences
    exact, _ = stepped(shelf.model(name), requests)
    changed = [levels(*pair) for pair in zip(exact, alone, strict=True)]
    assert max(changed) > TOLERANCE, "these are the exact images"
    if name == "sd" and set(accelerations) == {"deep_cache"}:
        assert changed[-1] <= TOLERANCE, "a ControlNet's rows go the exact way"
        assert model.accelerations.used_for(requests[-1]) == ()
        assert model.accelerations.used_for(requests[0]) == ("deep_cache:3",)


@pytest.mark.parametrize(
    ("name", "accelerations"), [("sd", {"deep_cache": 3}), ("sd3", {"first_block_cache": 0.3})], ids=str
)
def test_control_a_memory_for_the_whole_batch_is_caught(
    shelf: Shelf, name: str, accelerations: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a cache made for one image at a time would have it: rows see what was kept of others."""
    model, requests, shared = shelf.model(name, **accelerations), wanted(name)[:4], RowMemory()

    def of_all(self: Layout, members: Any) -> list[RowMemory]:
        shared.step = max(row.step for row in members)
        return [shared] * len(self.owners)

    alone = [stepped(model, [request])[0][0] for request in requests]
    monkeypatch.setattr(Layout, "memories", of_all)
    together, _ = stepped(model, requests)
    assert max(levels(*pair) for pair in zip(together, alone, strict=True)) > 5 * TOLERANCE


def test_a_pass_that_failed_half_way_changes_nothing(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    """One request fails after the inner blocks have run; the others are tried again and come out as ever."""
    model: Any = shelf.model("sd", deep_cache=3)
    requests = wanted("sd")[:4]
    with running(model) as engine:
        alone = apart(engine, requests)
        network, join = model._step_cache, StepBatch.join
        members: dict[str, Any] = {}

        def noted(self: StepBatch, new: Any) -> None:
            members.update({row.request.request_id: row for row in new})
            join(self, new)

        def failing(rows: Rows, *inputs: Any, **named: Any) -> Any:
            result = network(rows, *inputs, **named)
            guilty = members.get(requests[2].request_id)  # it may not have joined yet
            if guilty and guilty.step == 3 and any(memory in guilty.memories for memory in rows.memories):
                raise RuntimeError("an unlucky row")
            return result

        monkeypatch.setattr(StepBatch, "join", noted)
        monkeypatch.setattr(model, "_step_cache", failing)
        futures = [engine.submit(request) for request in requests]
        for index, (future, own) in enumerate(zip(futures, alone, strict=True)):
            if index == 2:
                assert "an unlucky row" in str(future.exception(60))
            else:
                assert levels(future.result(120).image, own.image) <= TOLERANCE


@pytest.mark.parametrize(
    ("name", "accelerations"), [("sd", {"deep_cache": 2}), ("flux", {"first_block_cache": 0.3})], ids=str
)
def test_what_was_kept_goes_when_its_slot_leaves(shelf: Shelf, name: str, accelerations: dict[str, Any]) -> None:
    """Finished or cancelled, while it may yet wait for its decode; the others keep theirs."""
    batch = batch_of(shelf.model(name, **accelerations), wanted(name)[:4])  # five, seven, five and seven steps
    batch.step()
    members = list(batch.members)

    def kept(row: Any) -> list[torch.Tensor]:
        return [tensor for memory in row.memories for tensor in memory.kept.values()]

    assert all(kept(row) for row in members)
    watched = {id(row): [weakref.ref(tensor) for tensor in kept(row)] for row in members}
    batch.leave([members[0]])
    assert not kept(members[0])
    assert all(reference() is None for reference in watched[id(members[0])])
    assert all(kept(row) for row in members[1:])
    while batch.members:
        batch.step()
    assert not any(kept(row) for row in members)
    assert all(reference() is None for references in watched.values() for reference in references)


# ---- beside other settings


def test_quantised_weights_are_smaller_and_the_same_bits_in_any_company(shelf: Shelf) -> None:
    """Deterministic mode goes with weights in eight bits: nothing looks from one row to another."""
    quantized, exact = shelf.model("sd", quantized="int8"), shelf.model("sd")
    assert quantized.weight_bytes < 0.95 * exact.weight_bytes
    requests = wanted("sd")[:4]
    for kind in ("int8", "int8-dynamic"):
        with running(shelf.model("sd", quantized=kind), max_rows=4, deterministic=True) as engine:
            together = run_staggered(engine, requests)
            alone = apart(engine, requests)
        assert all(np.array_equal(a.image, b.image) for a, b in zip(together, alone, strict=True))


def test_merging_and_quantised_weights_go_into_a_compiled_graph(shelf: Shelf) -> None:
    """The part of a network that both change, as one graph without a break for any number of rows."""
    model: Any = shelf.model("sd", token_merging=0.5, quantized="int8")
    part = model._denoiser.down_blocks[1].attentions[0]

    def run(hidden: torch.Tensor, text: torch.Tensor) -> Any:
        return part(hidden, encoder_hidden_states=text, return_dict=False)[0]

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(run, backend="eager", fullgraph=True)
    with torch.inference_mode():
        for count in (2, 3):
            inputs = (torch.randn(count, 64, 4, 4), torch.randn(count, 24, 32))
            for tensor in inputs:
                torch._dynamo.mark_dynamic(tensor, 0)
            assert torch.allclose(compiled(*inputs), run(*inputs), atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


# ---- likeness

PROMPTS = [
    f"a {size} {color} {shape} on a {ground} background"
    for size, color, shape, ground in (
        ("large", "red", "circle", "blue"),
        ("large", "green", "star", "white"),
        ("small", "yellow", "heart", "black"),
        ("large", "purple", "square", "green"),
        ("large", "white", "triangle", "red"),
        ("small", "blue", "circle", "yellow"),
        ("small", "orange", "star", "purple"),
        ("large", "pink", "heart", "gray"),
    )
]


@pytest.mark.slow
def test_images_of_the_demo_model_are_near_the_exact_ones() -> None:
    """Mean absolute error in levels, over eight prompts; caching one step for the whole image must miss the bound."""
    requests = [
        GenerationRequest(
            request_id=str(seed),
            prompt=prompt,
            width=128,
            height=128,
            num_inference_steps=12,
            guidance_scale=(1.0, 4.0)[seed % 2],
            seed=seed,
            sampler=SamplerType.EULER,
        )
        for seed, prompt in enumerate(PROMPTS)
    ]

    def made(**accelerations: Any) -> np.ndarray:
        return made_at_once(load_model("demo", accelerations=Accelerations(**accelerations)), requests)  # type: ignore[arg-type]

    exact = made()
    bounds: list[tuple[dict[str, Any], float]] = [
        ({"deep_cache": 2}, 2.0),
        ({"token_merging": 0.5}, 3.0),
        ({"quantized": "int8"}, 0.3),
    ]
    for accelerations, bound in bounds:
        error = np.abs(made(**accelerations) - exact).mean()
        assert 0 < error < bound, (accelerations, error)
    assert np.abs(made(deep_cache=100) - exact).mean() > 4 * max(bound for _, bound in bounds)


# ---- what is delivered, and what is refused


def test_a_lossy_image_says_so(shelf: Shelf) -> None:
    """In its file and beside it; an exact image's files are what they were."""
    from calotype_worker.output.encoder import Encoder
    from calotype_worker.output.image import read_provenance

    model = shelf.model("sd", deep_cache=2, token_merging=0.25)
    config = ResolvedConfig(prompt="p", model="sd", width=64, height=64, num_inference_steps=2, seed=1)
    record = JobRecord(
        id="j", state=JobState.RUNNING, lane=Lane.BULK, config=config, digest="", created_at=0.0, queued_at=0.0
    )
    claim = Claim(job_id="j", attempt=1, token="t", record=record)
    encoder = Encoder(cards={"sd": model.card}, version="1")
    for own, said in ((model, ["deep_cache:2", "token_merging:0.25"]), (shelf.model("sd"), None)):
        with running(own) as engine:
            generated = engine.submit(GenerationRequest.from_config(config, request_id="r")).result(120)
        files, _ = encoder.encode(claim, 0, generated)
        image, beside = (file.data or b"" for file in files)
        assert read_provenance(image).get("accelerations") == said
        assert json.loads(beside).get("accelerations") == said


def test_settings_out_of_range_are_named() -> None:
    from calotype_worker.settings import WorkerSettings

    beyond: list[tuple[str, Any]] = [("deep_cache", 0), ("first_block_cache", 1.5), ("token_merging", 0.9)]
    for field, value in beyond:
        with pytest.raises(InvalidRequest, match=rf"{field}={value}.*use .* \(off\) to"):
            Accelerations(**{field: value})
        with pytest.raises(SettingsError, match=f"CALOTYPE_WORKER_{field.upper()}={value}"):
            WorkerSettings.load(**{field: value})
    with pytest.raises(SettingsError, match="CALOTYPE_WORKER_QUANTIZED='int4'"):
        WorkerSettings.load(quantized="int4")


@pytest.mark.parametrize(
    ("accelerations", "settings", "message"),
    [
        ({"deep_cache": 2}, {"deterministic": True}, r"deep_cache=2.*turn off deterministic"),
        ({"token_merging": 0.5}, {"deterministic": True}, r"token_merging=0.5.*turn off deterministic"),
        ({"deep_cache": 2}, {"compile": "default"}, r"deep_cache=2.*turn off compile"),
    ],
    ids=str,
)
def test_what_cannot_go_together_is_refused_at_the_start(
    shelf: Shelf, accelerations: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    """By an engine, and by a worker before it loads anything."""
    from calotype_worker.loading import load_models
    from calotype_worker.settings import WorkerSettings

    with pytest.raises(InvalidRequest, match=message):
        Engine(shelf.model("sd", **accelerations), EngineSettings(**settings))
    with pytest.raises(InvalidRequest, match=message):
        load_models(WorkerSettings.load(model="none=/nowhere", **accelerations, **settings))


@pytest.mark.parametrize(
    ("name", "accelerations", "message"),
    [
        ("sd3", {"deep_cache": 2}, r"'sd3': deep_cache=2 needs a U-Net .* SD3Transformer2DModel; leave it off"),
        ("sd", {"first_block_cache": 0.1}, r"first_block_cache=0.1 needs a transformer .* UNet2DConditionModel"),
        ("flux", {"token_merging": 0.5}, r"token_merging=0.5 needs a U-Net .* FluxTransformer2DModel"),
        ("sd", {"quantized": "float8"}, r"float8 on device 'cpu' .* 8.9 or newer .* or quantized=int8"),
    ],
    ids=str,
)
def test_a_model_that_cannot_is_refused(shelf: Shelf, name: str, accelerations: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelLoadError, match=message):
        load_model(name, source=str(shelf.source(name)), accelerations=Accelerations(**accelerations))


def test_quantising_wants_torchao_and_weights_at_hand(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    from calotype_worker.models import Memory

    source = str(shelf.source("sd"))
    with pytest.raises(ModelLoadError, match=r"offload=sequential.*use offload=model or none"):
        load_model(
            "sd", source=source, accelerations=Accelerations(quantized="int8"), memory=Memory(offload="sequential")
        )
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(ModelLoadError, match=r"needs torchao.*pip install 'calotype\[quantized\]'"):
        load_model("sd", source=source, accelerations=Accelerations(quantized="int8"))
