"""Pipelines of sound and of 3D objects."""

from __future__ import annotations

import functools
from typing import Any

import torch

from tests.unit.pipelines import parts, text_encoders
from tests.unit.pipelines.parts import noisy
from tests.video_and_mesh_models import tiny_shap_e


def stable_audio() -> Any:
    from diffusers import (
        AutoencoderOobleck,
        EDMDPMSolverMultistepScheduler,
        StableAudioDiTModel,
        StableAudioPipeline,
        StableAudioProjectionModel,
    )

    torch.manual_seed(0)
    transformer = StableAudioDiTModel(
        sample_size=16,
        in_channels=8,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        num_key_value_attention_heads=2,
        out_channels=8,
        cross_attention_dim=parts.WIDTH,
        time_proj_dim=16,
        global_states_input_dim=2 * parts.WIDTH,
        cross_attention_input_dim=parts.WIDTH,
    )
    vae = AutoencoderOobleck(
        encoder_hidden_size=8,
        downsampling_ratios=[2, 4],
        channel_multiples=[1, 2],
        decoder_channels=8,
        decoder_input_channels=8,
        audio_channels=2,
        sampling_rate=256,
    )
    return noisy(
        StableAudioPipeline(
            transformer=transformer,
            vae=vae,
            text_encoder=text_encoders.t5(),
            tokenizer=parts.t5_tokenizer(64),
            projection_model=StableAudioProjectionModel(
                text_encoder_dim=parts.WIDTH, conditioning_dim=parts.WIDTH, min_value=0, max_value=32
            ),
            scheduler=EDMDPMSolverMultistepScheduler(
                solver_order=2, prediction_type="v_prediction", sigma_data=1.0, sigma_schedule="exponential"
            ),
        )
    )


def shap_e(*, solid: bool = True) -> Any:
    """Views of few samples on each ray, and meshes of a coarse grid: those of the defaults take minutes."""
    pipeline = tiny_shap_e(solid=solid)
    renderer = pipeline.shap_e_renderer
    renderer.decode_to_image = functools.partial(renderer.decode_to_image, n_coarse_samples=2, n_fine_samples=4)
    renderer.decode_to_mesh = functools.partial(renderer.decode_to_mesh, grid_size=20)
    return pipeline
