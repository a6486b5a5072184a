"""Which pipeline classes of diffusers run merged, which alone, and which not at all.

    python benchmarks/every_pipeline.py DIFFUSERS/tests [--only NAME]

DIFFUSERS is a checkout of diffusers, whose own tests build tiny components of most classes. Each is filled with noise,
saved, loaded as a worker does, and asked for four different requests at once; their results must equal those of plain
diffusers, one by one. Tokenizers and encoders that those tests take from the hub are replaced by ours. Classes
that cannot be tried in this way are tried with the tiny components of our own tests, where we have some.

What it finds is in `results/every_pipeline.json`, from which `docs/models.md` is made. It continues an interrupted run.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import inspect
import json
import os
import signal
import sys
import tempfile
import types
import unittest.mock
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
warnings.simplefilter("ignore")

import diffusers  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from workload import surroundings  # noqa: E402

from calotype_worker.models import load_model  # noqa: E402
from calotype_worker.models.pipeline.model import PipelineModel  # noqa: E402
from tests import family_models  # noqa: E402
from tests.models import byte_tokenizer  # noqa: E402
from tests.unit.pipelines import driver, parts, text_encoders  # noqa: E402
from tests.unit.pipelines.test_pipelines import CASES  # noqa: E402

_SECONDS = 180  # for a class
_TOLERANCE = 5e-4  # of results in 0..1
_NUDGE = 5e-7  # relative: a few times the rounding of float32
_TOKENIZERS = (
    *("AutoTokenizer", "BertTokenizer", "CLIPTokenizer", "GemmaTokenizer", "LlamaTokenizer", "PreTrainedTokenizerFast"),
    *("Qwen2Tokenizer", "T5Tokenizer", "XLMRobertaTokenizer"),
)
_FIXED = frozenset(  # by the requests
    {"num_inference_steps", "guidance_scale", "prompt", "negative_prompt", "output_type", "generator", "return_dict",
     "strength", "height", "width", "num_frames"}
)  # fmt: skip


class OutOfTimeError(BaseException):
    """Not an Exception: those of a class are caught where they occur."""


def use_local_parts() -> None:
    """Answer for parts from the hub with our own."""
    t5 = transformers.T5Config(
        vocab_size=len(family_models.t5_tokenizer()),
        d_model=32,
        d_kv=8,
        d_ff=37,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
    )

    def tokenizer(kind: type, name: str) -> Any:
        if "CLIP" in kind.__name__ or "clip" in name or "stable-diffusion" in name:
            found = byte_tokenizer()
            found.model_max_length = 77
            return found
        if "T5" in kind.__name__ or "t5" in name:
            found = family_models.t5_tokenizer()
            found.model_max_length = 64
            return found
        return parts.qwen_tokenizer()

    answers = {
        "T5EncoderModel": lambda: transformers.T5EncoderModel(t5),
        "UMT5EncoderModel": text_encoders.umt5,
        "Gemma3ForConditionalGeneration": text_encoders.gemma3,
        "LlamaForCausalLM": lambda: text_encoders.llama(layers=2, head=True),
        "AutoConfig": lambda: t5,
        "Qwen2VLProcessor": parts.qwen_processor,
        "Qwen3VLProcessor": parts.qwen_processor,
        "AutoProcessor": parts.qwen_processor,
        "CLIPImageProcessor": parts.image_processor,
        "AutoFeatureExtractor": parts.image_processor,
    }
    for name, make in answers.items():
        _answer(getattr(transformers, name), lambda kind, source, make=make: make())
    for name in _TOKENIZERS:
        _answer(getattr(transformers, name), tokenizer)


def _answer(owner: Any, make: Any) -> None:
    original = getattr(owner, "from_pretrained", None)

    def from_pretrained(cls: type, source: Any, *args: Any, **kwargs: Any) -> Any:
        if Path(str(source)).exists():
            return original.__func__(cls, source, *args, **kwargs)  # type: ignore[union-attr]
        return make(cls, str(source).lower())

    if inspect.ismethod(original):
        owner.from_pretrained = classmethod(from_pretrained)


def test_classes(root: Path, only: str) -> Iterator[Any]:
    package = types.ModuleType("their_tests")
    package.__path__ = [str(root)]
    sys.modules["their_tests"] = package
    for file in sorted((root / "pipelines").rglob("test_*.py")):
        if "get_dummy_components" not in file.read_text():
            continue
        name = ".".join(("their_tests", *file.relative_to(root).with_suffix("").parts))
        try:
            module = importlib.import_module(name)
        except BaseException as error:
            print(f"{file.name}: {_short(error)}", flush=True)
            continue
        for kind in vars(module).values():
            if inspect.isclass(kind) and kind.__module__ == name and hasattr(kind, "get_dummy_components"):
                tested = getattr(kind, "pipeline_class", None)
                if isinstance(tested, type) and only in tested.__name__:
                    yield kind


def tried(test: Any) -> dict[str, Any]:
    """What becomes of one class."""
    inspected = object.__new__(test)
    torch.manual_seed(0)
    try:
        pipeline = parts.noisy(_enlarged(test.pipeline_class(**inspected.get_dummy_components())))
    except Exception as error:
        return {"state": "not built", "reason": _short(error)}
    size = _fit_defaults(test.pipeline_class, inspected)
    try:
        model = _loaded(pipeline, size)
    except Exception as error:
        return {"state": "refused", "reason": _short(error)}
    return _measured(model)


def tried_ours(case: Any) -> dict[str, Any]:
    """The same for one of our own tests' pipelines."""
    with ExitStack() as patched:
        for constant, value in case.small.items():
            patched.enter_context(unittest.mock.patch(constant, value))
        return _measured(driver.load(case.build(), side=case.side), parameters=case.parameters)


def _measured(model: PipelineModel, **common: Any) -> dict[str, Any]:
    features = {"features": sorted(model.card.features), "formats": list(model.card.output_formats)}
    try:
        requests = driver.four(model, **common)
        plain = [model.plain(request) for request in requests]
    except Exception as error:
        return {"state": "plain diffusers fails", "reason": _short(error), **features}
    driver.together(model, requests)
    runs = driver.together(model, requests)
    if errors := [run.error for run in runs if run.error is not None]:
        return {"state": "fails", "reason": _short(errors[0]), **features}
    worst = max(driver.difference(run.result, expected) for run, expected in zip(runs, plain, strict=True))
    sensitivity = _sensitivity(model, requests, plain) if worst > _TOLERANCE else 0.0
    return {
        "state": "equal" if worst <= max(_TOLERANCE, sensitivity) else "differs",
        "difference": worst,
        "sensitivity": sensitivity,
        "networks": [network.model_dump() for network in model.card.networks],
        **features,
    }


def _sensitivity(model: PipelineModel, requests: list[Any], plain: list[Any]) -> float:
    """How far plain diffusers moves when its weights change in the seventh digit, as merged rounding does: of three."""
    generator = torch.Generator().manual_seed(0)
    return max(_moved(model, requests, plain, generator) for _ in range(3))


def _moved(model: PipelineModel, requests: list[Any], plain: list[Any], generator: torch.Generator) -> float:
    kept = []
    with torch.no_grad():
        for network in model.modules.values():
            for weights in network.parameters():
                if weights.is_floating_point():
                    kept.append((weights, weights.clone()))
                    weights.mul_(1 + _NUDGE * torch.randn(weights.shape, generator=generator))
        moved = max(
            driver.difference(model.plain(request), before) for request, before in zip(requests, plain, strict=True)
        )
        for weights, before in kept:
            weights.copy_(before)
    return moved


def _loaded(pipeline: Any, size: list[int] | None) -> PipelineModel:
    """From a folder, unless our parts cannot be saved."""
    notes = {} if size is None else {"native_sizes": [size]}
    pipeline.set_progress_bar_config(disable=True)
    with tempfile.TemporaryDirectory() as folder:
        try:
            pipeline.save_pretrained(folder)
        except Exception:
            return driver.load(pipeline, side=None if size is None else size[0])
        (Path(folder) / "calotype.json").write_text(json.dumps(notes))
        model = load_model("tiny", source=folder, device="cpu", dtype="float32", as_pipeline=True)
    assert isinstance(model, PipelineModel)
    return model


def _enlarged(pipeline: Any) -> Any:
    """Our tokenizers know more tokens than some of their encoders."""
    parts_of = list(pipeline.components.values())
    tokens = max((len(part) for part in parts_of if isinstance(part, transformers.PreTrainedTokenizerBase)), default=0)
    for part in parts_of:
        if isinstance(part, transformers.PreTrainedModel):
            try:
                table = part.get_input_embeddings()
            except NotImplementedError:  # of diffusers' own encoders
                continue
            if isinstance(table, torch.nn.Embedding) and table.num_embeddings < tokens:
                part.resize_token_embeddings(tokens)
    return pipeline


def _fit_defaults(kind: Any, inspected: Any) -> list[int] | None:
    """Set the signature's defaults to what fits their tiny networks. Returns width and height."""
    try:
        takes = inspect.signature(inspected.get_dummy_inputs).parameters
        given = inspected.get_dummy_inputs(*(["cpu"] if "device" in takes else []))
    except Exception:
        return None
    function = inspect.unwrap(kind.__call__)
    names = list(inspect.signature(function).parameters)
    defaults = list(function.__defaults__ or ())
    first = len(names) - len(defaults)
    for name, value in given.items():
        if name in names[first:] and name not in _FIXED and isinstance(value, bool | int | float | str | tuple):
            defaults[names.index(name) - first] = value
    function.__defaults__ = tuple(defaults)
    width, height = given.get("width"), given.get("height")
    return [max(width, 32), max(height, 32)] if isinstance(width, int) and isinstance(height, int) else None


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"


def limited(try_one: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What it returns, within the time for a class."""

    def stop(*_: object) -> None:
        raise OutOfTimeError

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(_SECONDS)
    try:
        return try_one()
    except OutOfTimeError:
        return {"state": "not tried", "reason": f"its tiny components take longer than {_SECONDS} s"}
    except Exception as error:
        return {"state": "fails", "reason": _short(error)}
    finally:
        signal.alarm(0)
        gc.collect()


class Results:
    """The file of results, written after every class."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._classes: dict[str, Any] = json.loads(file.read_text())["classes"] if file.exists() else {}

    def state(self, name: str) -> str | None:
        return self._classes[name]["state"] if name in self._classes else None

    def add(self, name: str, result: Mapping[str, Any]) -> None:
        print(name, result["state"], result.get("reason", result.get("difference")), flush=True)
        self._classes[name] = result
        found = {
            "command": "python benchmarks/every_pipeline.py DIFFUSERS/tests",
            **surroundings("cpu"),
            "diffusers": diffusers.__version__,
            "classes": dict(sorted(self._classes.items())),
        }
        self._file.write_text(json.dumps(found, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tests", type=Path)
    parser.add_argument("--only", default="")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "every_pipeline.json")
    options = parser.parse_args()
    use_local_parts()
    torch.set_num_threads(1)
    results = Results(options.out)
    for test in test_classes(options.tests, options.only):
        name = test.pipeline_class.__name__
        if hasattr(diffusers, name) and (results.state(name) is None or options.only):
            results.add(name, limited(lambda test=test: tried(test)))  # type: ignore[misc]
    for case in CASES.values():
        name = type(case.build()).__name__
        if results.state(name) not in ("equal", "differs") and options.only in name:
            results.add(name, limited(lambda case=case: tried_ours(case)))  # type: ignore[misc]


if __name__ == "__main__":
    main()
