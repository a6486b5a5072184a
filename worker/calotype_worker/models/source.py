"""`locate`: what a model's source is: a folder, a hub repository or a checkpoint file, and which files it loads."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from calotype_shared.errors import ModelLoadError
from calotype_worker.models import hub
from calotype_worker.models.folder import INDEX, MODULAR_INDEX, Layout, read_layout
from calotype_worker.models.pipeline.loading import check_class, class_of, split_source
from calotype_worker.models.single_file import is_single_file
from calotype_worker.models.version import version_of

# Parts that the step families do not read.
UNREAD = ("feature_extractor", "image_encoder")


@dataclass(frozen=True, kw_only=True)
class Located:
    path: Path  # a folder or a checkpoint file
    named_class: str | None  # `CLASS:` before the source
    layout: Layout | None  # None: a checkpoint file, or a modular pipeline
    single_file: bool = False
    snapshot: hub.Snapshot | None = None  # None: it is not from the hub

    def version(self) -> str:
        """The hub's commit, or a hash of the files that are loaded."""
        if self.snapshot is not None:
            return self.snapshot.version
        if self.single_file:
            beside = self.path.with_suffix("")
            small = [
                file for file in beside.glob("*/*.*") if file.suffix in (".json", ".txt", ".model", ".safetensors")
            ]
            return version_of(self.path.parent, [self.path, *small])
        if self.layout is None:
            return version_of(self.path, self.path.rglob("*.safetensors"))
        return version_of(self.path, [self.path / file for file in self.layout.files])


def locate(
    name: str, source: str, *, by_steps: Collection[str], variant: str | None = None, download: bool = True
) -> Located:
    """Find a source and read what it consists of. Of a hub repository, only what will be loaded is downloaded.

    `by_steps` are the pipeline classes that the engine steps, without the parts in `UNREAD`. With `download` off, no
    weights are downloaded.

    Raises:
        ModelLoadError: it does not exist, its class is not in diffusers, or a part is missing.
    """
    named, location = split_source(source)
    if named is not None:
        check_class(name, named)
        by_steps = ()
    path = Path(location).expanduser()
    if is_single_file(str(path)) or path.is_file():
        return Located(path=path, named_class=named, layout=None, single_file=True)
    if path.is_dir():
        return Located(path=path, named_class=named, layout=_layout(name, path, variant, by_steps))
    repository = None if path.is_absolute() or location.startswith((".", "~")) else hub.parse_id(location)
    if repository is None:
        raise ModelLoadError(f"model {name!r}: folder {location!r} does not exist; check the path after '='")
    snapshot = hub.find(name, repository)
    layout = _layout(name, snapshot.folder, variant, by_steps, names=snapshot.names)
    if download:
        snapshot.download(name, layout.files if layout else [f for f in snapshot.names if not f.endswith(".bin")])
    return Located(path=snapshot.folder, named_class=named, layout=layout, snapshot=snapshot)


def _layout(
    name: str, folder: Path, variant: str | None, by_steps: Collection[str], *, names: Collection[str] | None = None
) -> Layout | None:
    left_out = UNREAD if class_of(name, folder) in by_steps else ()
    if (folder / MODULAR_INDEX).is_file() and not (folder / INDEX).is_file():
        return None
    return read_layout(name, folder, variant=variant, left_out=left_out, names=names)
