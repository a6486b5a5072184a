"""Tiny folders of a video and a 3D pipeline, built from config like those of `models.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.models import PROMPT_TOKENS, byte_tokenizer, tiny_pipeline

MOTION_FRAMES = 12  # the longest video of the tiny motion modules
OBJECT_SIDE = 32  # pixels: the smallest that Shap-E's renderer takes


def tiny_animatediff(*, seed: int = 0) -> Any:
    """An `AnimateDiffPipeline` around the tiny Stable Diffusion: 64x64 pixels, up to 12 frames."""
    from diffusers import AnimateDiffPipeline, DDIMScheduler, MotionAdapter

    parts = tiny_pipeline(seed=seed)
    motion = MotionAdapter(
        block_out_channels=(32, 64),
        motion_layers_per_block=1,
        motion_norm_num_groups=8,
        motion_num_attention_heads=4,
        motion_max_seq_length=MOTION_FRAMES,
        use_motion_mid_block=False,
    )
    return AnimateDiffPipeline(
        vae=parts.vae,
        text_encoder=parts.text_encoder,
        tokenizer=parts.tokenizer,
        unet=parts.unet,
        motion_adapter=motion,
        scheduler=DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="linear", clip_sample=False, steps_offset=1
        ),
    )


def write_tiny_animatediff(folder: Path, *, seed: int = 0) -> Path:
    """Save a tiny video pipeline as a diffusers folder with safetensors weights, and return the folder."""
    tiny_animatediff(seed=seed).save_pretrained(folder, safe_serialization=True)
    return folder


def tiny_shap_e(*, seed: int = 0, solid: bool = True) -> Any:
    """A `ShapEPipeline` whose objects are colored lumps that the prior's latents bend; none without `solid`.

    Latents are the renderer's weights. Random ones give noise in space; here each stands for a bias plus a little of
    the latents: hidden units are ±x, ±y and ±z, their sum is a distance from the centre.
    """
    from diffusers import HeunDiscreteScheduler, PriorTransformer, ShapEPipeline
    from diffusers.pipelines.shap_e import ShapERenderer
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    torch.manual_seed(seed)
    tokenizer = byte_tokenizer()
    features, hidden, inputs = 16, 8, 93  # 93: a position, and sines and cosines of it in 15 octaves
    text_encoder = CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=PROMPT_TOKENS,
            projection_dim=32,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    prior = PriorTransformer(
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        embedding_dim=features,
        num_embeddings=hidden,
        embedding_proj_dim=32,
        clip_embed_dim=2 * features,  # a mean and a variance, which Shap-E drops
        time_embed_dim=64,
        additional_embeddings=0,
        time_embed_act_fn="gelu",
        norm_in_type="layer",
        encoder_hid_proj_type=None,
        added_emb_type=None,
    )
    renderer = ShapERenderer(
        param_names=("nerstf.mlp.0.weight",),
        param_shapes=((hidden, inputs),),
        d_latent=features,
        d_hidden=hidden,
        n_hidden_layers=2,
        insert_direction_at=1,
    )
    with torch.no_grad():
        prior.proj_to_clip_embeddings.weight.mul_(3)  # a prior that predicts next to nothing would hide errors
        _shape(renderer, solid=solid)
    return ShapEPipeline(
        prior=prior,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        scheduler=HeunDiscreteScheduler(
            beta_schedule="exp",
            num_train_timesteps=1024,
            prediction_type="sample",
            use_karras_sigmas=True,
            clip_sample=True,
            clip_sample_range=1.0,
        ),
        shap_e_renderer=renderer,
    )


def write_tiny_shap_e(folder: Path, *, seed: int = 0, solid: bool = True) -> Path:
    """Save a tiny 3D pipeline as a diffusers folder with safetensors weights, and return the folder."""
    tiny_shap_e(seed=seed, solid=solid).save_pretrained(folder, safe_serialization=True)
    return folder


def _shape(renderer: Any, *, solid: bool) -> None:
    """Weights by which the renderer's network sees a lump around the centre."""
    projection = renderer.params_proj.projections["nerstf__mlp__0__weight"]
    bias = projection.proj.bias.zero_().view(8, 93)
    for unit in range(6):
        bias[unit, unit // 2] = 4.0 if unit % 2 else -4.0
    projection.norm.weight.zero_()
    projection.norm.bias.zero_()
    projection.norm.weight[[*range(9), *range(48, 54)]] = 0.15  # the position and its two lowest octaves: no roughness
    first, second, last = renderer.mlp.mlp
    first.bias.zero_()
    second.weight.zero_()
    second.weight[:, :8] = torch.eye(8)
    second.bias.zero_()
    # Outputs: signed distance, coarse and fine density, and colors of the surface and of both densities.
    last.weight.zero_()
    last.bias.zero_()
    for row, scale in ((0, 1.0), (1, 20.0), (2, 20.0)):
        last.weight[row, :6] = -scale
        last.bias[row] = (2.5 if solid else -1.0) * scale
    colors = torch.randn((3, 8))
    for row in (3, 6, 9):
        last.weight[row : row + 3] = colors
    renderer.mesh_decoder.cases, renderer.mesh_decoder.masks = marching_cubes()


def marching_cubes() -> tuple[torch.Tensor, torch.Tensor]:
    """Triangles for each of the 256 ways that a cube's corners can be inside (Lorensen & Cline 1987).

    Edges (256, 5, 3), and which of them count (256, 5). A published Shap-E has them among its weights.

    Corner number x + 2y + 4z; edges along x, y and z in turn, each four in the order of their first corners. On every
    side of the cube, each run of inside corners is cut off by a segment; segments join to loops, loops are fanned.
    """
    edges = [(c, c | axis) for axis in (1, 2, 4) for c in range(8) if not c & axis]
    number = {frozenset(edge): index for index, edge in enumerate(edges)}
    sides = []  # four corners each, counter-clockwise from outside
    for axis, first, second in ((1, 2, 4), (2, 4, 1), (4, 1, 2)):
        around = (0, first, first | second, second)
        sides += [[c | axis for c in around], list(reversed(around))]
    cases, masks = torch.zeros((256, 5, 3), dtype=torch.long), torch.zeros((256, 5), dtype=torch.bool)
    for case in range(256):
        following = {}
        for side in sides:
            inside = [bool(case >> corner & 1) for corner in side]
            crossed = [number[frozenset((side[i], side[(i + 1) % 4]))] for i in range(4)]
            for entry in (i for i in range(4) if not inside[i] and inside[(i + 1) % 4]):
                leave = next(i % 4 for i in range(entry + 1, entry + 5) if not inside[(i + 1) % 4])
                following[crossed[leave]] = crossed[entry]
        triangles = []
        while following:
            start, step = following.popitem()
            loop = [start]
            while step != start:
                loop.append(step)
                step = following.pop(step)
            triangles += [(loop[0], loop[i + 1], loop[i]) for i in range(1, len(loop) - 1)]
        assert len(triangles) <= 5
        for index, triangle in enumerate(triangles):
            cases[case, index], masks[case, index] = torch.tensor(triangle), True
    return cases, masks
