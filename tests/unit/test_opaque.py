"""Video and 3D: whole pipelines behind the engine's interface, and the files that come of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from calotype_shared.errors import GenerationFailed, InvalidRequest
from calotype_shared.schema.config import OutputFormat, SamplerType
from calotype_worker.models.base import OpaqueModel
from calotype_worker.models.opaque import AnimateDiff, ShapE, opaque_card
from calotype_worker.output.mesh import encode_ply, read_provenance
from calotype_worker.output.video import encode_gif, encode_mp4, read_gif, read_mp4
from calotype_worker.request import ControlInput, Generated, GenerationRequest, Mesh
from tests.models import sample_image
from tests.opaque_models import MOTION_FRAMES, OBJECT_SIDE, write_tiny_animatediff, write_tiny_shap_e

# Few rays and a coarse grid: what is tested is the way there, not the quality.
COARSE: dict[str, Any] = {"mesh_grid": 20, "ray_samples": (4, 4)}
PROVENANCE = {"config": {"prompt": 'a "snow\u00adman" ☃\n' + "very, " * 600, "seed": 3}, "steps_taken": 7}


def load(adapter: Callable[..., Any], folder: Path, **options: Any) -> Any:
    """As the registry does: a folder through `from_pretrained`, and its card."""
    import diffusers

    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    card = opaque_card("tiny", pipeline, {}, "sha256:1")
    return adapter(pipeline, card=card, device=torch.device("cpu"), dtype=torch.float32, **options)


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> AnimateDiff:
    model: AnimateDiff = load(AnimateDiff, write_tiny_animatediff(tmp_path_factory.mktemp("video")))
    return model


@pytest.fixture(scope="module")
def solid(tmp_path_factory: pytest.TempPathFactory) -> ShapE:
    model: ShapE = load(ShapE, write_tiny_shap_e(tmp_path_factory.mktemp("solid")), **COARSE)
    return model


def clip(request_id: str = "a", **changes: Any) -> GenerationRequest:
    values: dict[str, Any] = {
        "prompt": "a red cube",
        "width": 64,
        "height": 64,
        "num_inference_steps": 3,
        "guidance_scale": 5.0,
        "seed": 1,
        "sampler": SamplerType.DDIM,
        "num_frames": 3,
    }
    return GenerationRequest(request_id=request_id, **{**values, **changes})


def thing(request_id: str = "a", **changes: Any) -> GenerationRequest:
    values: dict[str, Any] = {
        "prompt": "a red cube",
        "width": OBJECT_SIDE,
        "height": OBJECT_SIDE,
        "num_inference_steps": 3,
        "guidance_scale": 3.0,
        "seed": 1,
        "sampler": SamplerType.HEUN,
    }
    return GenerationRequest(request_id=request_id, **{**values, **changes})


def made(model: OpaqueModel, *requests: GenerationRequest) -> list[Generated]:
    """A run that nobody cancels."""
    results = [result for result in model.run(requests, lambda _: frozenset()) if result is not None]
    assert [result.request_id for result in results] == [request.request_id for request in requests]
    return results


def levels(one: np.ndarray | None, other: np.ndarray | None) -> int:
    """The largest difference, in levels of 255."""
    assert one is not None
    assert other is not None
    assert one.shape == other.shape
    return int(np.abs(one.astype(int) - other).max())


class Cancelling:
    """A watch under which the given requests are cancelled from a step on. Keeps what it was told."""

    def __init__(self, step: int, ids: Sequence[str]) -> None:
        self.step, self.ids, self.told = step, frozenset(ids), list[int]()

    def __call__(self, steps_done: int) -> frozenset[str]:
        self.told.append(steps_done)
        return self.ids if steps_done >= self.step else frozenset()


# ---- video


@pytest.mark.parametrize("sampler", SamplerType)
def test_a_video_is_the_same_in_company(video: AnimateDiff, sampler: SamplerType) -> None:
    """Every sampler that the card offers: a batch equals each request alone; another seed or prompt does not."""
    assert sampler.value in video.card.samplers
    first = clip("a", sampler=sampler)
    second = clip("b", sampler=sampler, prompt="dog", negative_prompt="cat", seed=2)
    assert video.batch_key(first) == video.batch_key(second)
    together = made(video, first, second)
    alone = [made(video, request)[0] for request in (first, second)]
    assert max(levels(one.frames, other.frames) for one, other in zip(together, alone, strict=True)) <= 1
    assert together[0].steps_taken == video.total_steps(first)
    for other in (clip(sampler=sampler, seed=3), clip(sampler=sampler, prompt="house")):
        assert levels(alone[0].frames, made(video, other)[0].frames) > 50


def test_a_video_is_the_plain_pipelines(video: AnimateDiff, tmp_path: Path) -> None:
    """Golden: the same frames as diffusers' own pipeline, with its decoding. Another guidance scale is far off."""
    import diffusers

    plain = diffusers.AnimateDiffPipeline.from_pretrained(write_tiny_animatediff(tmp_path / "plain"))
    request = clip(negative_prompt="cat", num_frames=4, width=72)
    wanted = plain(
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        generator=torch.Generator().manual_seed(request.seed),
        width=request.width,
        height=request.height,
        num_frames=4,
        num_inference_steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale,
        output_type="np",
    ).frames[0]
    wanted = (wanted * 255).round().astype(np.uint8)
    result = made(video, request)[0]
    assert result.frames is not None
    assert result.frames.shape == (4, 64, 72, 3)
    assert result.frames.dtype == np.uint8
    assert levels(result.frames, wanted) <= 1
    assert levels(result.image, wanted[2]) <= 1  # the middle frame
    unguided = clip(negative_prompt="cat", num_frames=4, width=72, guidance_scale=1.0)
    assert levels(made(video, unguided)[0].frames, wanted) > 50


def test_frames_move_and_know_of_each_other(video: AnimateDiff) -> None:
    """Frames differ, and the first depends on how many follow: the motion modules look along time."""
    short = made(video, clip(num_frames=2))[0].frames
    assert short is not None
    assert levels(short[0], short[1]) > 50
    longer = made(video, clip(num_frames=None))[0].frames
    assert longer is not None
    assert len(longer) == MOTION_FRAMES  # 16, but for the shorter motion modules
    assert levels(longer[0], short[0]) > 10


def test_a_run_leaves_nothing_for_the_next(video: AnimateDiff) -> None:
    """The same bytes again after a run with another sampler, and after one that was cut short."""
    request = clip(sampler=SamplerType.UNIPC)
    before = made(video, request)[0].frames
    made(video, clip(sampler=SamplerType.EULER_A, num_inference_steps=5))
    video.run([clip()], Cancelling(1, ["a"]))
    assert levels(made(video, request)[0].frames, before) == 0


def test_cancelled_videos_are_left_out(video: AnimateDiff) -> None:
    """One of two: the other is what it would have been. Both: the run ends at once."""
    one = Cancelling(2, ["b"])
    kept, gone = video.run([clip("a"), clip("b", seed=2)], one)
    assert gone is None
    assert kept is not None
    assert levels(kept.frames, made(video, clip("a"))[0].frames) <= 1
    assert one.told[:4] == [0, 1, 2, 3]
    both = Cancelling(1, ["a", "b"])
    assert video.run([clip("a"), clip("b")], both) == [None, None]
    assert both.told == [0, 1]
    early = Cancelling(0, ["a"])
    assert video.run([clip("a")], early) == [None]
    assert early.told == [0]


def test_the_second_copy_of_the_motion_modules_is_dropped(video: AnimateDiff) -> None:
    """The U-Net holds their weights; the adapter that they came in would take the memory twice."""
    pipeline = video._pipeline
    assert pipeline.motion_adapter is None
    assert video.weight_bytes == sum(
        p.numel() * 4 for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder) for p in part.parameters()
    )


# ---- what cannot be done


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("init_image", {"init_image": sample_image(1)}),
        ("loras", {"loras": (("style", 1.0),)}),
        ("controls", {"controls": (ControlInput(name="edges", image=sample_image(1)),)}),
        ("refiner", {"refiner": "other"}),
        ("preview_every", {"preview_every": 2}),
        ("num_frames", {"num_frames": MOTION_FRAMES + 1}),
        ("prompt", {"prompt": "a cube " * 20}),
        ("negative_prompt", {"negative_prompt": "a cube " * 20}),
        ("num_inference_steps", {"num_inference_steps": 60, "sampler": SamplerType.LCM}),
    ],
)
def test_a_video_model_refuses_what_it_would_ignore(video: AnimateDiff, field: str, changes: dict[str, Any]) -> None:
    """Each before anything runs, naming the field."""
    with pytest.raises(InvalidRequest) as refused:
        video.batch_key(clip(**changes))
    assert refused.value.field == field


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("sampler", {"sampler": SamplerType.DDIM}),
        ("height", {"height": 64}),
        ("num_frames", {"num_frames": 4}),
        ("negative_prompt", {"negative_prompt": "dull"}),
    ],
)
def test_an_object_model_refuses_what_it_would_ignore(solid: ShapE, field: str, changes: dict[str, Any]) -> None:
    """Its sampler is its own, its views are square, and its guidance knows no other prompt than none."""
    with pytest.raises(InvalidRequest) as refused:
        solid.batch_key(thing(**changes))
    assert refused.value.field == field


def test_what_must_be_shared(video: AnimateDiff, solid: ShapE) -> None:
    """Seeds and prompts are free, and all guidance scales that mean none are one; the rest splits a batch."""
    assert video.batch_key(clip()) == video.batch_key(clip(seed=9, prompt="dog", negative_prompt="cat"))
    assert video.batch_key(clip(guidance_scale=1.0)) == video.batch_key(clip(guidance_scale=0.0))
    for changes in ({"num_frames": 4}, {"width": 72}, {"guidance_scale": 4.0}, {"sampler": SamplerType.DDPM}):
        assert video.batch_key(clip()) != video.batch_key(clip(**changes))
    assert solid.batch_key(thing()) == solid.batch_key(thing(seed=9, prompt="dog", width=64, height=64))
    assert solid.batch_key(thing()) != solid.batch_key(thing(num_inference_steps=4))


def test_cards(video: AnimateDiff, solid: ShapE) -> None:
    """What producers are told, with the operator's notes; and both are what the engine takes them for."""
    assert isinstance(video, OpaqueModel)
    assert isinstance(solid, OpaqueModel)
    assert (video.card.family, set(video.card.features)) == ("animatediff", {"text_to_video"})
    assert (video.card.output_formats, video.card.native_sizes) == (("gif", "mp4"), ((64, 64),))
    assert video.card.samplers[0] == "ddim"  # the one it came with
    assert (solid.card.family, set(solid.card.features)) == ("shap_e", {"text_to_3d"})
    assert (solid.card.output_formats, solid.card.samplers) == (("ply", "gif"), ("heun",))
    notes = {"native_sizes": [[96, 96]], "description": "lumps"}
    noted = opaque_card("lumps", solid._pipeline, notes, "sha256:2")
    assert (noted.native_sizes, noted.description, noted.max_pixels) == (((96, 96),), "lumps", 96 * 96)


# ---- 3D


def test_objects_are_the_same_in_company(solid: ShapE) -> None:
    """A batch equals each object alone, mesh and turntable; another seed or prompt is another object."""
    first, second = thing("a"), thing("b", prompt="dog", seed=2)
    together = made(solid, first, second)
    alone = made(solid, second)[0]
    assert levels(together[1].frames, alone.frames) <= 1
    assert np.abs(surface(together[1]).vertices - surface(alone).vertices).max() < 1e-4
    assert levels(surface(together[1]).colors, surface(alone).colors) <= 1
    assert levels(together[0].frames, alone.frames) > 50
    assert alone.steps_taken == solid.total_steps(second) == 5  # Heun: 2 · 3 - 1
    for other in (thing("b", prompt="dog", seed=1), thing("b", prompt="house", seed=2)):
        assert surface(made(solid, other)[0]).vertices.shape != surface(alone).vertices.shape


def test_an_object_is_the_plain_pipelines(solid: ShapE) -> None:
    """Golden: latents of diffusers' own pipeline, rendered by its renderer. The run leaves torch's generator alone."""
    from diffusers.pipelines.shap_e.camera import create_pan_cameras

    request = thing()
    torch.manual_seed(99)
    expected_draw = torch.rand(1)
    torch.manual_seed(99)
    result = made(solid, request)[0]
    assert torch.equal(torch.rand(1), expected_draw)
    pipeline = solid._pipeline
    pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
    latents = pipeline(
        request.prompt,
        generator=torch.Generator().manual_seed(request.seed),
        num_inference_steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale,
        output_type="latent",
    ).images
    views = pipeline.shap_e_renderer.decode_to_image(
        latents, "cpu", size=OBJECT_SIDE, n_coarse_samples=4, n_fine_samples=4
    )
    wanted = (views.clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    assert result.frames is not None
    assert result.frames.shape == (19, OBJECT_SIDE, OBJECT_SIDE, 3)
    assert levels(result.frames, wanted[:-1]) == 0
    cameras = create_pan_cameras(OBJECT_SIDE)
    assert torch.allclose(cameras.origin[0], cameras.origin[-1], atol=1e-6)  # the view left out is the first again
    assert levels(wanted[0], wanted[10]) > 50
    assert levels(result.image, wanted[0]) == 0


def test_a_mesh_is_closed_and_colored(solid: ShapE) -> None:
    """Every edge has two triangles, one on each side; faces look outwards; colors are those of the network."""
    mesh = surface(made(solid, thing())[0])
    edges = Counter((int(a), int(b)) for face in mesh.faces for a, b in pairwise([*face, face[0]]))
    assert set(edges.values()) == {1}
    assert all((b, a) in edges for a, b in edges)
    corners = mesh.vertices[mesh.faces]  # (F, 3, 3)
    volume = np.einsum("fi,fi->f", corners[:, 0], np.cross(corners[:, 1], corners[:, 2])).sum() / 6
    assert 0.05 < volume < 8
    assert np.abs(mesh.vertices).max() < 1
    assert mesh.colors.shape == mesh.vertices.shape
    renderer = solid._renderer
    seen = renderer.mlp(
        position=torch.from_numpy(mesh.vertices)[None], direction=None, ts=None, nerf_level="fine", rendering_mode="stf"
    ).channels[0]
    assert levels(mesh.colors, (seen * 255).round().detach().numpy()) <= 1
    assert np.ptp(mesh.colors, axis=0).min() > 50


def test_only_what_will_be_written_is_made(solid: ShapE) -> None:
    """Rendering a turn takes far longer than a mesh; a mesh's own image shows the object."""
    whole = made(solid, thing())[0]
    mesh = made(solid, thing(output_format=OutputFormat.PLY))[0]
    assert mesh.frames is None
    assert np.array_equal(surface(mesh).vertices, surface(whole).vertices)
    shown = (mesh.image < 250).any(axis=2)
    assert 0.02 < shown.mean() < 0.9
    turn = made(solid, thing(output_format=OutputFormat.GIF))[0]
    assert turn.mesh is None
    assert turn.frames is not None
    assert whole.frames is not None
    assert np.array_equal(turn.frames, whole.frames)


def test_an_object_without_a_surface_has_no_mesh(tmp_path: Path) -> None:
    """It still turns, all background; only writing it as a mesh fails, and says why."""
    empty: ShapE = load(ShapE, write_tiny_shap_e(tmp_path / "empty", solid=False), **COARSE)
    result = made(empty, thing())[0]
    assert result.mesh is None
    assert result.frames is not None
    assert (result.frames == 255).all()
    with pytest.raises(GenerationFailed, match="no surface"):
        encode_ply(result.mesh, {})


def test_cancelled_objects_are_left_out(solid: ShapE) -> None:
    """One of two is not rendered; both end the run within a step, and the next run is what it was."""
    one = Cancelling(2, ["b"])
    kept, gone = solid.run([thing("a"), thing("b", seed=2)], one)
    assert gone is None
    assert kept is not None
    assert one.told[:6] == [0, 1, 2, 3, 4, 5]
    both = Cancelling(2, ["a", "b"])
    assert solid.run([thing("a"), thing("b")], both) == [None, None]
    assert both.told == [0, 1, 2]
    again = made(solid, thing("a"))[0]
    assert levels(again.frames, kept.frames) <= 1
    assert levels(again.frames, made(solid, thing("a"))[0].frames) == 0


def surface(result: Generated) -> Mesh:
    assert result.mesh is not None
    return result.mesh


# ---- files


def moving(width: int, height: int, frames: int = 6) -> np.ndarray:
    """A smooth image that drifts: uint8 (F, H, W, 3)."""
    return np.stack([np.roll(sample_image(5, width, height), 2 * index, axis=1) for index in range(frames)])


def test_a_gif_keeps_frames_pace_and_provenance() -> None:
    """Colors within what 256 of them allow, the whole time as asked, the JSON whole."""
    frames = moving(48, 40)
    data = encode_gif(frames, 12.0, PROVENANCE)
    found = read_gif(data)
    assert found.frames.shape == frames.shape
    assert found.seconds == pytest.approx(6 / 12, abs=0.01)
    assert found.provenance == PROVENANCE
    assert np.abs(found.frames.astype(int) - frames).mean() < 8
    assert np.abs(found.frames.astype(int).mean(axis=(1, 2)) - frames.mean(axis=(1, 2))).max() < 2
    assert np.abs(np.roll(found.frames, 1, axis=0).astype(int) - frames).mean() > 12  # in another order: far off
    assert encode_gif(frames, 12.0, PROVENANCE) == data


@pytest.mark.parametrize(("width", "height"), [(48, 40), (47, 39)])
def test_an_mp4_keeps_frames_pace_and_provenance(width: int, height: int) -> None:
    """Also with odd sides, which are made even."""
    frames = moving(width, height)
    found = read_mp4(encode_mp4(frames, 12.5, PROVENANCE))
    assert found.frames.shape == (6, 40, 48, 3)
    assert found.seconds == pytest.approx(6 / 12.5)
    assert found.provenance == PROVENANCE
    cut = found.frames[:, :height, :width].astype(int)
    assert np.abs(cut - frames).mean() < 8
    assert np.abs(np.roll(cut, 1, axis=0) - frames).mean() > 12


@pytest.mark.parametrize("color", [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (200, 120, 40)])
def test_an_mp4_keeps_colors(color: tuple[int, int, int]) -> None:
    """The conversion and what the file says of it agree: a wrong matrix shifts red and green by tens of levels."""
    frames = np.broadcast_to(np.array(color, np.uint8), (3, 32, 32, 3))
    assert np.abs(read_mp4(encode_mp4(frames, 8.0, {})).frames.astype(int) - frames).max() <= 3


def test_an_mp4_is_what_browsers_play() -> None:
    """H.264 with 4:2:0 chroma, and its colors described."""
    import io

    import av

    with av.open(io.BytesIO(encode_mp4(moving(48, 40), 8.0, {})), "r") as container:
        context = container.streams.video[0].codec_context
        assert (context.name, context.pix_fmt) == ("h264", "yuv420p")
        assert (int(context.colorspace), int(context.color_range)) == (1, 1)


def test_other_files_have_no_provenance() -> None:
    """A comment of another program is not an error."""
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(sample_image(1)).quantize(16).save(buffer, "GIF", comment=b"made with care")
    assert read_gif(buffer.getvalue()).provenance == {}


@pytest.mark.parametrize("encode", [encode_gif, encode_mp4])
def test_what_is_no_video_is_refused(encode: Callable[..., bytes]) -> None:
    """No frames, a single image, other numbers than bytes, no pace."""
    for frames, fps in ((moving(8, 8)[:0], 8.0), (moving(8, 8)[0], 8.0), (moving(8, 8) / 255, 8.0), (moving(8, 8), 0)):
        with pytest.raises(ValueError, match="should be"):
            encode(frames, fps, {})


def test_a_ply_comes_back_as_it_was() -> None:
    """Read by a parser that follows the header alone."""
    random = np.random.default_rng(1)
    mesh = Mesh(
        vertices=random.standard_normal((7, 3)).astype(np.float32),
        faces=random.integers(0, 7, (5, 3)),
        colors=random.integers(0, 256, (7, 3), dtype=np.uint8),
    )
    data = encode_ply(mesh, PROVENANCE)
    elements, comments = parse_ply(data)
    vertices, faces = elements["vertex"], elements["face"]
    assert np.array_equal([[v["x"], v["y"], v["z"]] for v in vertices], mesh.vertices)
    assert np.array_equal([[v["red"], v["green"], v["blue"]] for v in vertices], mesh.colors)
    assert np.array_equal([face["vertex_indices"] for face in faces], mesh.faces)
    assert read_provenance(data) == PROVENANCE
    assert max(map(len, comments)) < 256  # readers with small buffers
    assert read_provenance(encode_ply(mesh, {})) == {}


def parse_ply(data: bytes) -> tuple[dict[str, list[dict[str, Any]]], list[str]]:
    """Elements by name, and the comments, of a binary little-endian PLY. Reads types from the header."""
    types = {"float": "<f4", "int": "<i4", "uchar": "u1"}
    header, body = data.split(b"end_header\n", 1)
    lines = header.decode("ascii").splitlines()
    assert lines[:2] == ["ply", "format binary_little_endian 1.0"]
    layout: list[tuple[str, int, list[list[str]]]] = []
    comments = []
    for line in lines[2:]:
        words = line.split(" ")
        if words[0] == "comment":
            comments.append(line)
        elif words[0] == "element":
            layout.append((words[1], int(words[2]), []))
        else:
            layout[-1][2].append(words[1:])
    position = 0

    def take(kind: str, count: int = 1) -> Any:
        nonlocal position
        values = np.frombuffer(body, types[kind], count, position)
        position += values.nbytes
        return values

    found: dict[str, list[dict[str, Any]]] = {}
    for name, count, properties in layout:
        found[name] = [
            {
                words[-1]: take(words[2], int(take(words[1])[0])) if words[0] == "list" else take(words[0])[0]
                for words in properties
            }
            for _ in range(count)
        ]
    assert position == len(body)
    return found, comments
