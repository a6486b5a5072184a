"""Stable Cascade and Kandinsky 3."""

from __future__ import annotations

from typing import Any

import torch

from tests import family_models
from tests.models import byte_tokenizer
from tests.unit.pipelines import parts, text_encoders
from tests.unit.pipelines.parts import noisy


def stable_cascade() -> Any:
    from diffusers import DDPMWuerstchenScheduler, StableCascadeCombinedPipeline
    from diffusers.models import StableCascadeUNet
    from diffusers.pipelines.deprecated.wuerstchen.modeling_paella_vq_model import PaellaVQModel

    torch.manual_seed(0)
    attention = ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock")
    shared: dict[str, Any] = {"conditioning_dim": 32, "clip_text_pooled_in_channels": parts.WIDTH}
    prior = StableCascadeUNet(
        **shared,
        block_out_channels=(32, 32),
        num_attention_heads=(2, 2),
        down_num_layers_per_block=(1, 1),
        up_num_layers_per_block=(1, 1),
        clip_image_in_channels=768,
        clip_text_in_channels=parts.WIDTH,
        switch_level=(False,),
    )
    decoder = StableCascadeUNet(
        **shared,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        num_attention_heads=(-1, 2),
        down_num_layers_per_block=(1, 1),
        up_num_layers_per_block=(1, 1),
        down_blocks_repeat_mappers=(1, 1),
        up_blocks_repeat_mappers=(1, 1),
        block_types_per_layer=(attention[:2], attention),
        switch_level=None,
        dropout=(0.1, 0.1),
    )
    return noisy(
        StableCascadeCombinedPipeline(
            text_encoder=text_encoders.clip(projection=True),
            tokenizer=byte_tokenizer(),
            decoder=decoder,
            scheduler=DDPMWuerstchenScheduler(),
            vqgan=PaellaVQModel(bottleneck_blocks=1, num_vq_embeddings=2),
            prior_text_encoder=text_encoders.clip(projection=True),
            prior_tokenizer=byte_tokenizer(),
            prior_prior=prior,
            prior_scheduler=DDPMWuerstchenScheduler(),
            prior_feature_extractor=None,
            prior_image_encoder=None,
        )
    )


def kandinsky3() -> Any:
    from diffusers import DDPMScheduler, Kandinsky3Pipeline, Kandinsky3UNet, VQModel

    torch.manual_seed(0)
    unet = Kandinsky3UNet(
        in_channels=4,
        time_embedding_dim=8,
        groups=2,
        attention_head_dim=8,
        layers_per_block=2,
        block_out_channels=(32, 64),
        cross_attention_dim=8,
        encoder_hid_dim=parts.WIDTH,
    )
    movq = VQModel(
        block_out_channels=(32, 32, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3 + ("AttnDownEncoderBlock2D",),
        up_block_types=("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        norm_type="spatial",
        num_vq_embeddings=12,
        vq_embed_dim=4,
    )
    return noisy(
        Kandinsky3Pipeline(
            unet=unet,
            movq=movq,
            scheduler=DDPMScheduler(
                beta_start=0.00085,
                beta_end=0.012,
                steps_offset=1,
                beta_schedule="squaredcos_cap_v2",
                clip_sample=True,
                thresholding=False,
            ),
            text_encoder=text_encoders.t5(),
            tokenizer=family_models.t5_tokenizer(),
        )
    )
