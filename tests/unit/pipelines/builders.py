"""Tiny pipelines of many classes."""

from __future__ import annotations

import functools
from typing import Any

import torch

from tests import family_models
from tests.family_models import tiny_flux, tiny_sd3, tiny_sdxl
from tests.models import tiny_pipeline
from tests.unit.pipelines import parts
from tests.unit.pipelines.parts import noisy
from tests.video_and_mesh_models import tiny_shap_e


def stable_diffusion() -> Any:
    return noisy(tiny_pipeline())


def flux() -> Any:
    return noisy(tiny_flux())


def _qwen_image(kind: str, **more: Any) -> Any:
    import diffusers

    torch.manual_seed(0)
    transformer = diffusers.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=parts.WIDTH,
        guidance_embeds=False,
        axes_dims_rope=(8, 4, 4),
    )
    pipeline = getattr(diffusers, kind)(
        transformer=transformer,
        vae=parts.qwen_vae(),
        scheduler=parts.flow_euler(),
        text_encoder=parts.qwen_vl(),
        tokenizer=parts.qwen_tokenizer(),
        **more,
    )
    pipeline.default_sample_size = 8
    return noisy(pipeline)


def qwen_image() -> Any:
    return _qwen_image("QwenImagePipeline")


def qwen_image_to_image() -> Any:
    return _qwen_image("QwenImageImg2ImgPipeline")


def qwen_inpaint() -> Any:
    return _qwen_image("QwenImageInpaintPipeline")


def qwen_edit() -> Any:
    return _qwen_image("QwenImageEditPipeline", processor=parts.qwen_processor())


def qwen_edit_plus() -> Any:
    return _qwen_image("QwenImageEditPlusPipeline", processor=parts.qwen_processor())


def qwen_controlnet() -> Any:
    from diffusers import QwenImageControlNetModel

    torch.manual_seed(1)
    controlnet = QwenImageControlNetModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=parts.WIDTH,
        axes_dims_rope=(8, 4, 4),
    )
    return _qwen_image("QwenImageControlNetPipeline", controlnet=controlnet)


def _of_sd(kind: str, **more: Any) -> Any:
    import diffusers

    return noisy(getattr(diffusers, kind)(**tiny_pipeline().components, **more, requires_safety_checker=False))


def sd_image_to_image() -> Any:
    return _of_sd("StableDiffusionImg2ImgPipeline")


def sd_inpaint() -> Any:
    return _of_sd("StableDiffusionInpaintPipeline")


def sd_controlnet() -> Any:
    from diffusers import ControlNetModel

    torch.manual_seed(2)
    unet = tiny_pipeline().unet
    return _of_sd(
        "StableDiffusionControlNetPipeline",
        controlnet=ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 8, 16, 16)),
    )


def sdxl() -> Any:
    return noisy(tiny_sdxl())


def sd3() -> Any:
    return noisy(tiny_sd3())


def _of_flux(kind: str, **more: Any) -> Any:
    import diffusers

    parts_ = {name: part for name, part in tiny_flux().components.items() if part is not None}
    return noisy(getattr(diffusers, kind)(**parts_, **more))


def flux_image_to_image() -> Any:
    return _of_flux("FluxImg2ImgPipeline")


def flux_kontext() -> Any:
    from diffusers.pipelines.flux import pipeline_flux_kontext

    # It resizes references to one of these; a megapixel each otherwise.
    pipeline_flux_kontext.PREFERRED_KONTEXT_RESOLUTIONS = [(64, 64)]
    return _of_flux("FluxKontextPipeline")


def flux_control(seed: int) -> Any:
    from diffusers import FluxControlNetModel

    torch.manual_seed(3 + seed)
    net = FluxControlNetModel(
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=parts.WIDTH,
        pooled_projection_dim=parts.WIDTH,
        axes_dims_rope=[4, 6, 6],
        guidance_embeds=True,
    )
    return parts.filled(net, torch.Generator().manual_seed(seed))


def flux_controlnet() -> Any:
    return _of_flux("FluxControlNetPipeline", controlnet=flux_control(0))


def sdxl_control(seed: int) -> Any:
    from diffusers import ControlNetModel

    torch.manual_seed(3 + seed)
    net = ControlNetModel.from_unet(tiny_sdxl().unet, conditioning_embedding_out_channels=(8, 8, 16, 16))
    return parts.filled(net, torch.Generator().manual_seed(seed))


def _z_image(kind: str) -> Any:
    import diffusers

    torch.manual_seed(0)
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=16,
        dim=48,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=3,
        n_kv_heads=3,
        cap_feat_dim=parts.WIDTH,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if name.endswith("pad_token"):
                torch.nn.init.normal_(parameter)
    return noisy(
        getattr(diffusers, kind)(
            transformer=transformer,
            vae=family_models._vae(16),
            scheduler=parts.flow_euler(),
            text_encoder=parts.qwen3(),
            tokenizer=parts.qwen_tokenizer(),
        )
    )


def z_image() -> Any:
    return _z_image("ZImagePipeline")


def z_image_to_image() -> Any:
    return _z_image("ZImageImg2ImgPipeline")


def flux2_klein() -> Any:
    from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Transformer2DModel

    torch.manual_seed(0)
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * parts.WIDTH,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        mid_block_add_attention=False,
    )
    pipeline = Flux2KleinPipeline(
        transformer=transformer,
        vae=vae,
        scheduler=parts.flow_euler(),
        text_encoder=parts.qwen3(layers=28),
        tokenizer=parts.qwen_tokenizer(),
        is_distilled=False,
    )
    pipeline.default_sample_size = 8
    return noisy(pipeline)


def chroma() -> Any:
    from diffusers import ChromaPipeline, ChromaTransformer2DModel

    torch.manual_seed(0)
    transformer = ChromaTransformer2DModel(
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=parts.WIDTH,
        axes_dims_rope=(4, 6, 6),
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )
    pipeline = ChromaPipeline(
        transformer=transformer,
        vae=family_models._vae(16),
        scheduler=parts.flow_euler(),
        text_encoder=parts.t5(),
        tokenizer=family_models.t5_tokenizer(),
    )
    pipeline.default_sample_size = 8
    return noisy(pipeline)


def pixart_sigma() -> Any:
    from diffusers import DDIMScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel

    torch.manual_seed(0)
    transformer = PixArtTransformer2DModel(
        sample_size=32,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        caption_channels=parts.WIDTH,
        in_channels=4,
        cross_attention_dim=24,
        out_channels=8,
        use_additional_conditions=False,
    )
    return noisy(
        PixArtSigmaPipeline(
            transformer=transformer,
            vae=family_models._vae(4),
            scheduler=DDIMScheduler(),
            text_encoder=parts.t5(),
            tokenizer=family_models.t5_tokenizer(),
        )
    )


def wan() -> Any:
    from diffusers import WanPipeline

    return noisy(
        WanPipeline(
            transformer=parts.wan_transformer(),
            vae=parts.wan_vae(),
            scheduler=parts.flow_euler(shift=7.0),
            text_encoder=parts.umt5(),
            tokenizer=family_models.t5_tokenizer(),
        )
    )


def wan_two_transformers() -> Any:
    from diffusers import WanPipeline

    return noisy(
        WanPipeline(
            transformer=parts.wan_transformer(),
            transformer_2=parts.wan_transformer(1),
            vae=parts.wan_vae(),
            scheduler=parts.flow_euler(shift=7.0),
            text_encoder=parts.umt5(),
            tokenizer=family_models.t5_tokenizer(),
            boundary_ratio=0.875,
        )
    )


def wan_image_to_video() -> Any:
    from diffusers import WanImageToVideoPipeline

    return noisy(
        WanImageToVideoPipeline(
            transformer=parts.wan_transformer(in_channels=12, image_dim=parts.WIDTH),
            vae=parts.wan_vae(),
            scheduler=parts.flow_euler(shift=7.0),
            text_encoder=parts.umt5(),
            tokenizer=family_models.t5_tokenizer(),
            image_encoder=parts.vision(projection=False),
            image_processor=parts.image_processor(),
            transformer_2=None,
        )
    )


def ltx() -> Any:
    from diffusers import AutoencoderKLLTXVideo, LTXPipeline, LTXVideoTransformer3DModel

    torch.manual_seed(0)
    transformer = LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=4,
        attention_head_dim=8,
        cross_attention_dim=32,
        num_layers=1,
        caption_channels=parts.WIDTH,
    )
    vae = AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False, False, False, False, False),
        upsample_residual=(False, False, False, False),
        upsample_factor=(1, 1, 1, 1),
        timestep_conditioning=False,
        patch_size=1,
        patch_size_t=1,
        encoder_causal=True,
        decoder_causal=False,
    )
    vae.use_framewise_encoding = vae.use_framewise_decoding = False
    return noisy(
        LTXPipeline(
            transformer=transformer,
            vae=vae,
            scheduler=parts.flow_euler(),
            text_encoder=parts.t5(),
            tokenizer=family_models.t5_tokenizer(),
        )
    )


def stable_video() -> Any:
    from diffusers import (
        AutoencoderKLTemporalDecoder,
        EulerDiscreteScheduler,
        StableVideoDiffusionPipeline,
        UNetSpatioTemporalConditionModel,
    )

    torch.manual_seed(0)
    unet = UNetSpatioTemporalConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        sample_size=8,
        in_channels=8,
        out_channels=4,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        cross_attention_dim=parts.WIDTH,
        num_attention_heads=8,
        projection_class_embeddings_input_dim=24,
        addition_time_embed_dim=8,
        num_frames=4,
    )
    vae = AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 32, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 4,
        latent_channels=4,
        force_upcast=False,
    )
    return noisy(
        StableVideoDiffusionPipeline(
            unet=unet,
            vae=vae,
            image_encoder=parts.vision(side=224),
            feature_extractor=parts.image_processor(),
            scheduler=EulerDiscreteScheduler(
                prediction_type="v_prediction",
                use_karras_sigmas=True,
                timestep_type="continuous",
                sigma_min=0.002,
                sigma_max=700.0,
            ),
        )
    )


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
            text_encoder=parts.t5(),
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
