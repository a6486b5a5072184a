"""`calotype model check SOURCE`: what a source is and whether it will work, from headers and small files alone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from calotype_shared.errors import ModelLoadError
from calotype_worker.models.folder import Layout, Part, read_config
from calotype_worker.models.header import Header, Stored, named, read_header, refuse_quantized
from calotype_worker.models.lora_file import check_tensors, is_lora
from calotype_worker.models.notes import read_notes
from calotype_worker.models.parts import reason
from calotype_worker.models.registry import FAMILIES
from calotype_worker.models.single_file import kind_of
from calotype_worker.models.source import Located, locate
from calotype_worker.models.text_check import check_text
from calotype_worker.sampling.samplers import FLOW_SAMPLERS, sampler_of, samplers_following

_NAME = "checked"  # of the model in messages, which are cut to what follows it
# Names that loaders convert; headers are compared without them.
_PREFIX = re.compile(r"^(text_model|model)\.")
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


@dataclass(kw_only=True)
class Report:
    """What was found. `problems` are reasons why a worker would refuse the source; empty: it will load."""

    source: str
    what: str = ""
    runs: str = ""  # how
    version: str = ""
    parts: list[dict[str, Any]] = field(default_factory=list)
    samplers: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)  # what only loading will tell

    @property
    def gib(self) -> float:
        return float(sum(part["gib"] for part in self.parts))


def check_source(source: str, *, variant: str | None = None, as_pipeline: bool = False) -> Report:
    """Check a folder, a hub repository or a checkpoint file without reading a weight. Problems are in the report."""
    report = Report(source=source)
    try:
        by_steps = () if as_pipeline else tuple(FAMILIES)
        located = locate(_NAME, source, by_steps=by_steps, variant=variant, download=False)
        _collect(report, lambda: read_notes(_NAME, located.path))
        if located.single_file and is_lora(header := read_header(_model(), located.path)):
            _check_lora(report, located.path, header)
        elif located.single_file:
            _check_file(report, located.path)
        elif located.layout is None:
            report.what = "a modular pipeline"
            report.runs = "by its own blocks"
            report.unchecked.append("its parts")
        else:
            _check_folder(report, located, located.layout, by_steps)
    except ModelLoadError as error:
        report.problems.append(_said(error))
    return report


def _check_lora(report: Report, file: Path, header: Header) -> None:
    report.what = "a LoRA, for --lora"
    report.parts.append(_described(file.name, "LoRA", list(header.tensors.values())))
    report.unchecked.append("whether a model has its layers; a worker checks this at start")
    _collect(report, lambda: check_tensors(f"{_model()}: {file.name!r}", header))


def _check_file(report: Report, file: Path) -> None:
    kind, class_name, header = kind_of(_NAME, file)
    report.what = f"a {kind} checkpoint ({class_name})"
    report.runs = "in step batches"
    report.parts.append(_described(file.name, class_name, list(header.tensors.values())))
    beside = file.with_suffix("")
    if not (beside / "model_index.json").is_file():
        report.unchecked.append(
            f"configs and tokenizers: there is no {beside.name}/ beside it, so they come from the hub"
        )
    _collect(report, lambda: refuse_quantized(_model(), file, header))


def _check_folder(report: Report, located: Located, layout: Layout, by_steps: tuple[str, ...]) -> None:
    class_name = located.named_class or layout.class_name
    stepped = class_name in by_steps and located.named_class is None
    report.what = f"a {class_name}"
    report.runs = "in step batches" if stepped else "by its own __call__, network calls merged"
    report.version = located.snapshot.version if located.snapshot else ""
    others: dict[str, Any] = {}
    for part in layout.parts:
        if part.weights:
            _collect(report, lambda part=part: _check_weights(report, located, layout, part))
        elif part.kind is not None:
            _collect(report, lambda part=part: others.update({part.name: _small(layout, part)}))
    encoders = {part.name: _empty(layout, part) for part in layout.parts if part.name.startswith("text_encoder")}
    _collect(report, lambda: check_text(_NAME, _Parts({**others, **encoders}), required=stepped))
    scheduler = others.get("scheduler")
    if stepped and scheduler is not None:
        flow = FAMILIES[class_name][0] in ("sd3", "flux")
        own = sampler_of(scheduler, FLOW_SAMPLERS) if flow else None
        report.samplers = [own.value] if own else [] if flow else [kind.value for kind in samplers_following(scheduler)]
        if not report.samplers:
            report.problems.append(
                f"its scheduler {type(scheduler).__name__} has noise levels that no sampler of this family follows; "
                "use --run-as pipeline"
            )


def _check_weights(report: Report, located: Located, layout: Layout, part: Part) -> None:
    """Compare the tensors that a part's config wants with those of its files."""
    present = [file for file in part.weights if (layout.folder / file).is_file()]
    stored: dict[str, Stored] = {}
    for file in present:
        header = read_header(_model(), layout.folder / file)
        stored |= header.tensors
    report.parts.append(_described(part.name, part.class_name, list(stored.values()), variant=part.variant))
    if len(present) < len(part.weights):
        report.unchecked.append(f"{part.name}/: its weights are not here yet")
        return
    model = _empty(layout, part)
    if model is None:
        report.unchecked.append(f"{part.name}/: its tensors")
        return
    wanted = {_plain(key): value for key, value in model.state_dict().items()}
    found = {_plain(key): (key, own) for key, own in stored.items()}
    tied = {_plain(key) for key in getattr(model, "all_tied_weights_keys", None) or ()}
    missing = sorted(wanted.keys() - found.keys() - tied)
    shapes = sorted(
        found[key][0] for key in wanted.keys() & found.keys() if _values(wanted[key].shape) != found[key][1].values
    )
    unexpected = []
    if part.library == "diffusers":  # whose names are the same in files and in memory
        unexpected = sorted(found[key][0] for key in found.keys() - wanted.keys())
    problems = {
        "lacks": missing,
        "has other shapes than its config's:": shapes,
        "has tensors that its config has no place for:": unexpected,
    }
    for problem, keys in problems.items():
        if keys:
            report.problems.append(f"{part.name}/ {problem} {named(keys)}")


def _plain(key: str) -> str:
    words = [_OLD_ATTENTION.get(word, word) for word in _PREFIX.sub("", key).split(".")]
    return ".".join(words)


def _values(shape: torch.Size) -> int:
    return Stored(dtype="", shape=tuple(shape)).values


def _empty(layout: Layout, part: Part) -> torch.nn.Module | None:
    """The part made from its config without memory for its weights; None: its class needs more than a config."""
    try:
        config = read_config(_model(), layout.folder / part.name / "config.json")
        with torch.device("meta"):
            if hasattr(part.kind, "config_class"):
                made: torch.nn.Module = part.kind(part.kind.config_class.from_dict(config))
            else:
                made = part.kind.from_config(config)
    except ModelLoadError:
        raise
    except Exception:
        return None
    return made


def _small(layout: Layout, part: Part) -> Any:
    """A tokenizer, scheduler or processor, which is small enough to be loaded."""
    try:
        return part.kind.from_pretrained(layout.folder / part.name)
    except Exception as error:
        raise ModelLoadError(f"{part.name}/ could not be loaded: {reason(error)}; download it again") from error


@dataclass(frozen=True)
class _Parts:
    """What `check_text` reads of a pipeline."""

    components: Mapping[str, Any]


def _described(name: str, class_name: str, stored: list[Stored], *, variant: str | None = None) -> dict[str, Any]:
    sizes = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4}
    dtypes = sorted({own.dtype for own in stored if own.values > 1})
    return {
        "part": name,
        "class": class_name,
        "variant": variant or "",
        "dtype": ", ".join(dtypes) or "?",
        "parameters": sum(own.values for own in stored),
        "gib": sum(own.values * sizes.get(own.dtype, 1) for own in stored) / 2**30,
    }


def _collect(report: Report, check: Any) -> None:
    try:
        check()
    except ModelLoadError as error:
        report.problems.append(_said(error))


def _model() -> str:
    return f"model {_NAME!r}"


def _said(error: ModelLoadError) -> str:
    """The message without the name that the model does not have yet."""
    return str(error).removeprefix(_model()).removeprefix(": ")
