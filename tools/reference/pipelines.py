"""The page of models: every pipeline class of the installed diffusers, and what Calotype does with it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from tools.reference.markdown import code, generated, table
from tools.reference.results import provenance, read

_INTRODUCTION = """
Calotype serves every class of [diffusers](https://github.com/huggingface/diffusers) that can be loaded from safetensors
weights and whose inputs a job can give. [How](explanation/step-batching.md): each request runs the pipeline's own code,
and the network calls of all requests are merged. The families marked *step engine* have faster code of their own.

When a worker starts, it finds out which networks of its model can be merged, verifies it, and says so in one log line
and in `calotype models --verbose`. The table says what was found with tiny random networks:

- **batched**: four different requests at once equaled plain diffusers one by one, with their denoiser calls merged;
- **alone**: they were equal, but the denoiser's calls are not merged, for the reason given;
- **served, not measured**: nothing excludes it, but no tiny network of the class could be made or run here. The worker
  decides at start in the same way;
- **no**: the worker refuses it at start, for the reason given.

The images of such networks are noise, so there is no gallery: trained weights are not part of this repository. How
folders, checkpoints and adapters are read: [real models](how-to/real-models.md).
"""


def page() -> str:
    result = read("every_pipeline")
    rows = [(name, *_state(name, kind, result["classes"].get(name))) for name, kind in sorted(_classes().items())]
    counts = Counter(state for _, state, _, _ in rows)
    total = ", ".join(f"{count} {state}" for state, count in counts.most_common())
    return "\n".join(
        [
            generated("Models", "diffusers and `benchmarks/results/every_pipeline.json`"),
            _INTRODUCTION.strip() + "\n",
            f"Of {len(rows)} classes in diffusers {result['diffusers']}: {total}.\n",
            table(("class", "served", "takes and makes", "why, or which networks"), [_row(*row) for row in rows]),
            "Measured with the tiny components of diffusers' own tests: " + provenance(result) + "\n",
        ]
    )


def _row(name: str, state: str, features: str, reason: str) -> tuple[str, str, str, str]:
    return code(name), state, features, reason


def _classes() -> Mapping[str, Any]:
    """Pipeline classes that diffusers exports, by name."""
    import diffusers  # noqa: PLC0415 - takes seconds

    bases = (diffusers.DiffusionPipeline, diffusers.ModularPipeline)
    found = {}
    for name in dir(diffusers):
        kind = getattr(diffusers, name)
        if not isinstance(kind, type) or kind in bases or not name.endswith("Pipeline"):
            continue
        if issubclass(kind, bases) or "dummy" in kind.__module__:
            found[name] = kind
    return found


def _state(name: str, kind: Any, measured: Mapping[str, Any] | None) -> tuple[str, str, str]:
    """In a word, its features, and a reason."""
    from calotype_worker.models.registry import FAMILIES  # noqa: PLC0415

    measured = measured or {"state": "not tried"}
    features = ", ".join(str(found).replace("_", " ") for found in measured.get("features", ()))
    refusal = str(measured.get("reason", "")).partition("model 'tiny': ")[2].partition(";")[0]
    packages = _missing(kind)
    if name in FAMILIES:
        found = "batched, step engine", features, ""
    elif "Onnx" in name:
        found = "no", "", "runs by ONNX, not torch"
    elif packages:
        found = "no", "", f"needs {packages}, which Calotype does not install"
    elif measured["state"] == "equal":
        alone = [network for network in measured["networks"] if not network["merged"]]
        reason = "; ".join(f"{network['network']}: {network['reason'] or 'alone'}" for network in alone)
        found = ("alone" if any(map(_denoises, alone)) else "batched"), features, reason
    elif measured["state"] == "refused" and "which jobs cannot give" in refusal:
        found = "no", "", refusal
    else:
        found = "served, not measured", features, ""
    return found


def _denoises(network: Mapping[str, Any]) -> bool:
    return any(word in network["network"] for word in ("transformer", "unet", "prior", "decoder"))


def _missing(kind: Any) -> str:
    """Packages that diffusers wants for the class and that are not installed."""
    if "dummy" not in kind.__module__:
        return ""
    backends: list[str] = getattr(kind, "_backends", [])
    return ", ".join(backend for backend in backends if backend not in ("torch", "transformers"))
