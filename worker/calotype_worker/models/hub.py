"""Models from the Hugging Face Hub: first the list of files and the small ones, then only what will be loaded."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calotype_shared.errors import ModelLoadError
from calotype_worker.models.folder import INDEX, MODULAR_INDEX, is_small, names_in
from calotype_worker.models.parts import reason

log = logging.getLogger(__name__)

_ID = re.compile(r"^(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^@\s]+))?$")
TIMEOUT_SECONDS = 10.0  # of the first answer


@dataclass(frozen=True, kw_only=True)
class Repository:
    repo: str
    revision: str | None  # a branch, tag or commit; None: main

    def __str__(self) -> str:
        return self.repo if self.revision is None else f"{self.repo}@{self.revision}"


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A repository at one commit, in the hub's cache. `names` are all of its files, downloaded or not."""

    repository: Repository
    folder: Path
    commit: str
    names: frozenset[str]
    offline: bool

    @property
    def version(self) -> str:
        return f"{self.repository.repo}@{self.commit[:12]}"

    def download(self, name: str, files: Collection[str]) -> None:
        """Get these files.

        Raises:
            ModelLoadError: the hub does not give them.
        """
        missing = [file for file in files if not (self.folder / file).is_file()]
        if not missing:
            return
        if self.offline:
            raise ModelLoadError(
                f"model {name!r}: {self.repository} is not in the hub's cache as a whole: {missing[0]} is missing, and "
                "the hub is not used (HF_HUB_OFFLINE); download it on a machine with the network"
            )
        _download(name, self.repository, self.commit, missing)


def parse_id(location: str) -> Repository | None:
    """`owner/name` or `owner/name@revision`; None: it is neither."""
    found = _ID.match(location)
    return Repository(repo=found["repo"], revision=found["revision"]) if found else None


def find(name: str, repository: Repository) -> Snapshot:
    """A repository's commit, its list of files, and its small files in the cache. A cached commit serves without a hub.

    Raises:
        ModelLoadError: it does not exist, is not open to this user, or is not cached and the hub out of reach.
    """
    from huggingface_hub import HfApi, constants  # noqa: PLC0415 - a second

    if constants.HF_HUB_OFFLINE:
        return _cached(name, repository, "HF_HUB_OFFLINE is set")
    try:
        info = _asked(
            name,
            repository,
            lambda: HfApi().model_info(repository.repo, revision=repository.revision, timeout=TIMEOUT_SECONDS),
        )
    except _OutOfReach as error:
        log.warning("hub out of reach", extra={"model": name, "reason": str(error)})
        return _cached(name, repository, str(error))
    names = frozenset(sibling.rfilename for sibling in info.siblings or ())
    folder = _download(
        name, repository, str(info.sha), [file for file in names if is_small(file) and file.count("/") < 2]
    )
    return Snapshot(repository=repository, folder=folder, commit=str(info.sha), names=names, offline=False)


class _OutOfReach(Exception):
    """No answer of the hub; the message says why."""


def _asked(name: str, repository: Repository, ask: Callable[[], Any]) -> Any:
    """The result of a call to the hub, with its refusals as ModelLoadError and no answer as _OutOfReach."""
    from huggingface_hub import errors  # noqa: PLC0415

    what = f"model {name!r}: {repository}"
    try:
        return ask()
    except errors.GatedRepoError as error:
        raise ModelLoadError(
            f"{what} is gated on the hub: accept its conditions on its page, and set HF_TOKEN to your token"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelLoadError(f"{what}: the repository has no such revision; check what follows '@'") from error
    except errors.RepositoryNotFoundError as error:
        raise ModelLoadError(
            f"{what} is neither a folder here nor a repository on the hub that you may read; check the name, and set "
            "HF_TOKEN if it is private"
        ) from error
    except errors.HFValidationError as error:
        raise ModelLoadError(f"{what} is not a name of a repository: {reason(error)}; check it") from error
    except errors.HfHubHTTPError as error:
        raise _OutOfReach(f"the hub answered: {reason(error)}") from error
    except Exception as error:  # of httpx, which has no base that is exported for all of them
        kind = "did not answer in time" if "Timeout" in type(error).__name__ else "is not within reach"
        raise _OutOfReach(f"the hub {kind} ({type(error).__name__}: {reason(error)})") from error


def _cached(name: str, repository: Repository, why: str) -> Snapshot:
    from huggingface_hub import snapshot_download  # noqa: PLC0415

    try:
        folder = Path(
            snapshot_download(
                repository.repo,
                revision=repository.revision,
                local_files_only=True,
                allow_patterns=[INDEX, MODULAR_INDEX],  # whether the rest is there is checked by part
            )
        )
    except Exception as error:  # LocalEntryNotFoundError and its relatives
        raise ModelLoadError(
            f"model {name!r}: {repository} is neither a folder here nor in the hub's cache, and {why}; check the path "
            "or the network, or download it first: hf download " + repository.repo
        ) from error
    return Snapshot(repository=repository, folder=folder, commit=folder.name, names=names_in(folder), offline=True)


def _download(name: str, repository: Repository, commit: str, files: Collection[str]) -> Path:
    from huggingface_hub import snapshot_download  # noqa: PLC0415

    try:
        return Path(
            _asked(
                name,
                repository,
                lambda: snapshot_download(
                    repository.repo, revision=commit, allow_patterns=sorted(files), etag_timeout=TIMEOUT_SECONDS
                ),
            )
        )
    except _OutOfReach as error:
        raise ModelLoadError(
            f"model {name!r}: {repository} could not be downloaded: {error}; try again, what is complete is kept"
        ) from error
