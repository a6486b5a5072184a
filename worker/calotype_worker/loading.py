"""`load_models`: the models that a worker's settings name, with what is registered for them."""

from __future__ import annotations

from pathlib import Path

from calotype_worker.models import Accelerations, Adapters, AnyModel, Memory, load_model
from calotype_worker.settings import WorkerSettings


def load_models(options: WorkerSettings) -> list[AnyModel]:
    """Every model of a worker, with what was registered for it. Raises ModelLoadError, InvalidRequest."""
    memory = Memory(
        attention_slicing=options.attention_slicing,
        vae_slicing=options.vae_slicing,
        vae_tiling=options.vae_tiling,
        offload=options.offload,
        budget=options.memory_budget,
    )
    accelerations = Accelerations(
        deep_cache=options.deep_cache,
        first_block_cache=options.first_block_cache,
        token_merging=options.token_merging,
        quantized=options.quantized,
    )
    accelerations.check(deterministic=options.deterministic, compiled=options.compile != "off")
    models = []
    for name, source in options.sources.items():
        adapters = Adapters(
            loras={lora: Path(file) for lora, file in options.registered("lora", name).items()},
            embeddings={token: Path(file) for token, file in options.registered("embedding", name).items()},
            controls=options.registered("control", name),
            lora_capacity=options.lora_capacity,
        )
        models.append(
            load_model(
                name,
                source=source,
                device=options.device,
                dtype=options.dtype,
                adapters=adapters,
                memory=memory,
                accelerations=accelerations,
                as_pipeline=options.run_as == "pipeline",
                merging=not options.deterministic,
                variant=options.variant,
            )
        )
    return models
