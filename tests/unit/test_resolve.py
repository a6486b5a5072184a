"""`resolve`: what is filled in, what no card allows, and what a `ResolvedConfig` promises."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from calotype_shared.errors import InvalidRequest, UnknownModel
from calotype_shared.schema.config import MAX_SEED, GenerationConfig
from calotype_shared.schema.enums import Feature, OutputFormat, SamplerType
from calotype_shared.schema.model_card import ModelCard
from calotype_shared.schema.resolve import FILLED, ResolvedConfig, resolve

IMAGE, MASK = "a" * 64, "b" * 64


def card(name: str = "demo", **fields: Any) -> ModelCard:
    values: dict[str, Any] = {
        "name": name,
        "family": "sd",
        "version": "1",
        "size_multiple": 16,
        "native_sizes": ((128, 128), (160, 96)),
        "max_pixels": 256 * 256,
        "max_prompt_tokens": 32,
        "samplers": tuple(SamplerType),
        "features": frozenset(Feature) - {Feature.TEXT_TO_VIDEO, Feature.TEXT_TO_3D},
        "loras": ("neon",),
        "controls": ("outline",),
    }
    return ModelCard(**{**values, **fields})


VIDEO = card("video", features=frozenset({Feature.TEXT_TO_VIDEO}), samplers=("ddim",), output_formats=("gif", "mp4"))
PLAIN = frozenset({Feature.TEXT_TO_IMAGE})


def resolved(*cards: ModelCard, prompt: str = "x", **fields: Any) -> ResolvedConfig:
    cards = cards or (card(),)
    config = GenerationConfig.parse({"prompt": prompt, "model": cards[0].name, **fields})
    return resolve(config, {each.name: each for each in cards})


def test_a_missing_seed_is_drawn_and_kept() -> None:
    """Two submissions differ, and each can be made again from what is stored."""
    drawn = [resolved() for _ in range(8)]
    assert len({config.seed for config in drawn}) == 8
    assert resolve(drawn[0], {"demo": card()}) == drawn[0]
    config = GenerationConfig(prompt="x")
    assert resolve(config, {"demo": card()}, draw_seed=lambda: 7).seed == 7


def test_open_sizes_become_the_models_own() -> None:
    """One open side follows the other where the model has such a native size."""
    sizes = {(None, None): (128, 128), (160, None): (160, 96), (None, 96): (160, 96), (64, None): (64, 128)}
    for (width, height), expected in sizes.items():
        config = resolved(width=width, height=height)
        assert (config.width, config.height) == expected


def test_sampler_and_format_become_the_models_own_only_where_they_were_left_open() -> None:
    """The default stays where the model has it; what was asked for is never replaced, but refused."""
    config = resolved(VIDEO)
    assert (config.sampler, config.output_format) == (SamplerType.DDIM, OutputFormat.GIF)
    flow = card(samplers=("euler", "heun"))
    assert resolved(flow).sampler is SamplerType.EULER
    with pytest.raises(InvalidRequest, match=r"sampler='ddim': .* available: euler, heun"):
        resolved(flow, sampler="ddim")
    with pytest.raises(InvalidRequest, match=r"output_format='png': .* available: gif, mp4"):
        resolved(VIDEO, output_format="png")
    meant = card(default_sampler="heun")
    assert resolved(meant).sampler is SamplerType.HEUN, "also where it has the default of other models"
    assert resolved(meant, sampler="ddim").sampler is SamplerType.DDIM


def test_a_sampler_that_was_filled_in_is_checked_as_one_that_was_given() -> None:
    """LCM runs at most 50 steps, also where it is the model's own."""
    with pytest.raises(InvalidRequest, match=r"num_inference_steps=80: .* at most 50"):
        resolved(card(samplers=("lcm",)), num_inference_steps=80)


def test_strength_follows_the_source() -> None:
    """Part of the source stays where none is masked; without a source nothing stays."""
    assert resolved(init_image=IMAGE).strength == 0.75
    assert resolved(init_image=IMAGE, mask_image=MASK).strength == 1.0
    assert resolved(init_image=IMAGE, strength=0.0).strength == 0.0
    assert resolved().strength == 1.0


def test_nothing_is_left_open() -> None:
    """Every field that `resolve` fills in has a value, and a config without one is not a `ResolvedConfig`."""
    config = resolved()
    assert all(getattr(config, name) is not None for name in FILLED)
    complete: dict[str, Any] = {"prompt": "x", "width": 64, "height": 64, "seed": 1}
    assert ResolvedConfig.parse(complete).strength == 1.0
    for name in ("width", "height", "seed"):
        with pytest.raises(InvalidRequest, match=f"{name}=None: field required"):
            ResolvedConfig.parse({key: value for key, value in complete.items() if key != name})
    with pytest.raises(InvalidRequest, match="strength=None"):
        ResolvedConfig.parse({**complete, "init_image": IMAGE})
    with pytest.raises(ValidationError, match="frozen"):
        config.seed = 2  # type: ignore[misc]


def test_a_resolved_config_may_be_submitted_again() -> None:
    """Its JSON is a config's, with or without a source image, and means the same."""
    for fields in ({}, {"init_image": IMAGE}, {"init_image": IMAGE, "strength": 1.0}):
        first = resolved(**fields)
        again = GenerationConfig.parse(first.model_dump(mode="json"))
        assert resolve(again, {"demo": card()}) == first
        assert again.canonical_json() == first.canonical_json()
        assert ResolvedConfig.model_validate_json(first.canonical_json()) == first
    assert resolved().model_dump()["strength"] is None


@pytest.mark.parametrize(
    ("cards", "fields", "said"),
    [
        ([card()], {"width": 136}, r"width=136: must be a multiple of 16 .* use 128 or 144"),
        ([card()], {"width": 256, "height": 512}, r"height=512: 256x512 is .* native sizes are 128x128, 160x96"),
        ([card()], {"seed": MAX_SEED, "num_images": 2}, "seed=9007199254740991: image 2 would use a seed above"),
        ([card(max_steps=4)], {"num_inference_steps": 5}, "num_inference_steps=5: .* at most 4 steps; use at most 4"),
        ([card()], {"loras": [{"name": "sketch"}]}, "loras='sketch': .* available: neon"),
        ([card()], {"controls": [{"name": "depth", "image": IMAGE}]}, "controls='depth': .* available: outline"),
        ([card(features=PLAIN)], {"init_image": IMAGE}, "init_image='image_to_image': .* does not support this"),
        ([card(features=PLAIN)], {"init_image": IMAGE, "mask_image": MASK}, "mask_image='inpainting'"),
        ([card(features=PLAIN)], {"preview_every": 1}, "preview_every='preview'"),
        ([card()], {"num_frames": 8}, "num_frames='text_to_video'"),
        ([card()], {"fps": 8}, "fps='text_to_video'"),
        ([VIDEO], {"audio_seconds": 8}, "audio_seconds='text_to_audio'"),
        ([card(features={Feature.INPAINTING})], {}, "model='demo': .* does not support text_to_image"),
        ([card()], {"prompt": "a (red:99) cat"}, r"prompt=.* weight 99 is out of range"),
        ([card(features=PLAIN)], {"negative_prompt": "a (red:1.3) cat"}, "negative_prompt=.* is a prompt weight"),
        ([card()], {"prompt": "a cat <lora:ink:1>"}, "prompt=.*'<lora:ink:1>' has no effect in a prompt; .* loras"),
        ([VIDEO], {"width": 64, "refiner": {"model": "demo"}}, "model='demo': is not a known model"),
        ([VIDEO, card()], {"refiner": {"model": "demo"}}, "refiner='refiner': model 'video' does not support this"),
        ([card(), VIDEO], {"refiner": {"model": "video"}}, "refiner='video': .* cannot be used as a refiner"),
        ([card(), card("two", samplers=("euler",))], {"refiner": {"model": "two"}}, "sampler='ddim': .* model 'two'"),
        ([card(), card("two", max_pixels=99)], {"refiner": {"model": "two"}}, "width=128: .* model 'two'"),
        (
            [card(), card("two", features=PLAIN)],
            {"refiner": {"model": "two"}, "prompt": "a (red:1.3) cat"},
            "is a prompt weight",
        ),
        ([card(), card("two", samplers=("euler",))], {"ensemble": ["two"]}, "sampler='ddim': .* model 'two'"),
        ([card(), card("two", loras=())], {"ensemble": ["two"], "loras": [{"name": "neon"}]}, "model 'two'.* none"),
        (
            [card(), card("two", features=PLAIN)],
            {"ensemble": ["two"], "prompt": "a (red:1.3) cat"},
            "is a prompt weight",
        ),
        ([card()], {"ensemble": ["two"]}, "model='two': is not a known model; use one of: demo"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_what_cannot_be_made_is_refused(cards: list[ModelCard], fields: dict[str, Any], said: str) -> None:
    """By any of the config's models: the first, one of an ensemble, a refiner. With field, value and remedy."""
    with pytest.raises(InvalidRequest, match=said) as caught:
        resolved(*cards, **fields)
    assert caught.value.remedy
    assert isinstance(caught.value, UnknownModel) == ("not a known model" in said)


def test_what_can_be_made_is_not_refused() -> None:
    """The opposite of the cases above, so that a card which refuses everything would show."""
    resolved(
        card(),
        card("two"),
        card("three"),
        prompt="a (red:1.3) cat",
        init_image=IMAGE,
        loras=[{"name": "neon"}],
        controls=[{"name": "outline", "image": MASK}],
        preview_every=1,
        seed=MAX_SEED - 1,
        num_images=2,
        ensemble=["two"],
        refiner={"model": "three"},
    )
    resolved(VIDEO, num_frames=8, fps=8)
