"""The enums of the wire format: samplers, formats, features, lanes, job states."""

from __future__ import annotations

from enum import StrEnum


class SamplerType(StrEnum):
    """Sampling algorithms. diffusers calls these schedulers."""

    DDPM = "ddpm"  # Denoising Diffusion Probabilistic Models, Ho et al. 2020
    DDIM = "ddim"  # Denoising Diffusion Implicit Models, Song et al. 2020
    PNDM = "pndm"  # Pseudo Numerical Methods, Liu et al. 2022
    EULER = "euler"  # Karras et al. 2022, algorithm 2 without churn
    EULER_A = "euler_a"  # Euler with ancestral noise
    HEUN = "heun"  # Karras et al. 2022, second order: 2N - 1 network calls
    DPMPP_2M = "dpmpp_2m"  # DPM-Solver++(2M), Lu et al. 2022
    DPMPP_2M_KARRAS = "dpmpp_2m_karras"  # the same on Karras' noise levels
    DPMPP_2M_SDE = "dpmpp_2m_sde"  # the stochastic form of DPM-Solver++(2M); wants 20 steps or more
    DPMPP_2M_SDE_KARRAS = "dpmpp_2m_sde_karras"  # the same on Karras' noise levels
    DPMPP_3M = "dpmpp_3m"  # third order
    DPMPP_3M_SDE = "dpmpp_3m_sde"  # the stochastic form, third order; wants 20 steps or more
    DPMPP_2S = "dpmpp_2s"  # DPM-Solver++(2S), single step
    DPM2 = "dpm2"  # Karras et al. 2022, DPM-Solver-2: 2N - 1 network calls
    DPM2_A = "dpm2_a"  # the same with ancestral noise
    DEIS = "deis"  # Diffusion Exponential Integrator Sampler, Zhang & Chen 2022
    SA_SOLVER = "sa_solver"  # Stochastic Adams, Xue et al. 2023
    EULER_KARRAS = "euler_karras"  # Euler on Karras' noise levels
    UNIPC = "unipc"  # UniPC, Zhao et al. 2023
    UNIPC_3 = "unipc_3"  # the same, third order; for little guidance
    LCM = "lcm"  # Latent Consistency Models, Luo et al. 2023
    TCD = "tcd"  # Trajectory Consistency Distillation, Zheng et al. 2024, without noise (eta 0)
    MODEL = "model"  # the model's own scheduler, if it is not one of these


class OutputFormat(StrEnum):
    """The kind of file that a job makes."""

    PNG = "png"
    WEBP = "webp"
    JPEG = "jpeg"
    GIF = "gif"  # video
    MP4 = "mp4"  # video
    PLY = "ply"  # 3D mesh with vertex colors
    WAV = "wav"  # sound
    FLAC = "flac"  # sound

    @property
    def content_type(self) -> str:
        """Its media type, as HTTP and storage have it."""
        others = {"mp4": "video/mp4", "ply": "model/ply", "wav": "audio/wav", "flac": "audio/flac"}
        return others.get(self.value, f"image/{self.value}")


class Feature(StrEnum):
    """A capability that a config can need. A model's card lists those that the model supports."""

    TEXT_TO_IMAGE = "text_to_image"
    IMAGE_TO_IMAGE = "image_to_image"
    INPAINTING = "inpainting"
    PROMPT_WEIGHTS = "prompt_weights"
    LORA = "lora"
    CONTROLNET = "controlnet"
    REFINER = "refiner"
    ENSEMBLE = "ensemble"
    PREVIEW = "preview"
    TEXT_TO_VIDEO = "text_to_video"
    TEXT_TO_3D = "text_to_3d"
    TEXT_TO_AUDIO = "text_to_audio"
    EDIT = "edit"  # reference images, to change or to follow
    CONTROL_IMAGE = "control_image"  # for pipelines that always follow one


class Lane(StrEnum):
    """A queue's priority class. Workers always take `interactive` jobs first."""

    INTERACTIVE = "interactive"
    BULK = "bulk"


class JobState(StrEnum):
    """The state of a job; ARCHITECTURE.md lists every transition."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def final(self) -> bool:
        """Whether the job has ended: no transition leaves this state."""
        return self in (JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED)
