"""Checks a release: its distributions, its tag and its part of the changelog.

`release.py dist` checks the distributions, `tag TAG` that tag, version and changelog agree, and `notes TAG` prints that
part of the changelog. `docs/how-to/release.md` says when.
"""

from __future__ import annotations

import hashlib
import re
import sys
import tarfile
import tomllib
import zipfile
from email.parser import BytesParser
from pathlib import Path

from packaging.metadata import Metadata
from packaging.utils import parse_sdist_filename, parse_wheel_filename

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"calotype", "calotype_shared", "calotype_train", "calotype_worker"}
LARGEST = 32_000_000  # bytes; the index takes 100 MB
_HEADING = re.compile(r"^## \[(?P<name>[^\]]+)\](?: - (?P<date>\d{4}-\d\d-\d\d))?$", re.MULTILINE)
_SECRET = re.compile(r"(^|/)(\.env(?!\.example$)|\.git/|\.pypirc|id_rsa|.*\.pem|s3\.json)")


class Wrong(Exception):
    """Something that must not be released."""


def version() -> str:
    project: dict[str, str] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return project["version"]


def changelog(text: str) -> dict[str, tuple[str | None, str]]:
    """Dates and texts by version, newest first. Raises Wrong where it is not as Keep a Changelog has it."""
    found = {}
    headings = list(_HEADING.finditer(text))
    if len(headings) != len(re.findall(r"^## ", text, re.MULTILINE)):
        raise Wrong("CHANGELOG.md: a heading is neither `## [Unreleased]` nor `## [1.2.3] - 2026-01-31`")
    for heading, following in zip(headings, [*headings[1:], None], strict=True):
        name, date = heading["name"], heading["date"]
        if (name == "Unreleased") != (date is None):
            raise Wrong(f"CHANGELOG.md: [{name}] needs a date, and only [Unreleased] has none")
        found[name] = (date, text[heading.end() : following.start() if following else None].strip())
    if "Unreleased" in list(found)[1:]:
        raise Wrong("CHANGELOG.md: [Unreleased] comes first")
    return found


def check_tag(tag: str, *, version: str, text: str) -> None:
    """Raises Wrong unless the tag is the version's, which is the newest of the changelog. `rc` tags need no entry."""
    if tag != f"v{version}":
        raise Wrong(f"the tag {tag} is not v{version}, the version in pyproject.toml; correct one of them")
    released = [name for name in changelog(text) if name != "Unreleased"]
    if "rc" not in version and released[:1] != [version]:
        raise Wrong(f"CHANGELOG.md: the newest entry is not [{version}]; rename [Unreleased], with the date of today")


def notes(tag: str, text: str) -> str:
    """What the changelog says of a tag's version; of a candidate's, what is unreleased."""
    name = "Unreleased" if "rc" in tag else tag.removeprefix("v")
    try:
        return changelog(text)[name][1]
    except KeyError:
        raise Wrong(f"CHANGELOG.md has no entry [{name}]") from None


def check_distributions(folder: Path, *, version: str) -> list[str]:
    """A line for each file. Raises Wrong unless there are one wheel and one sdist, whole and of this version."""
    wheels, sdists = list(folder.glob("*.whl")), list(folder.glob("*.tar.gz"))
    if (len(wheels), len(sdists)) != (1, 1):
        raise Wrong(f"{folder}: {len(wheels)} wheels and {len(sdists)} sdists; build into an empty folder")
    [wheel], [sdist] = wheels, sdists
    found = {wheel: str(parse_wheel_filename(wheel.name)[1]), sdist: str(parse_sdist_filename(sdist.name)[1])}
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        [about] = [name for name in names if name.endswith(".dist-info/METADATA")]
        _check_metadata(archive.read(about), version=version)
    tops = {name.split("/")[0] for name in names}
    if tops != PACKAGES | {about.split("/")[0]}:
        raise Wrong(f"{wheel.name}: holds {sorted(tops)}")
    with tarfile.open(sdist) as archive:
        inside = [name.partition("/")[2] for name in archive.getnames()]
        about_sdist = archive.extractfile(f"{sdist.name.removesuffix('.tar.gz')}/PKG-INFO")
        assert about_sdist
        _check_metadata(about_sdist.read(), version=version)
    missing = {"LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml"} - set(inside)
    if missing:
        raise Wrong(f"{sdist.name}: lacks {sorted(missing)}")
    for file, own in found.items():
        if own != version:
            raise Wrong(f"{file.name}: is of version {own}, not {version}")
        if secret := [name for name in (names if file is wheel else inside) if _SECRET.search(name)]:
            raise Wrong(f"{file.name}: holds {secret}, which may be secret")
        if file.stat().st_size > LARGEST:
            raise Wrong(f"{file.name}: has {file.stat().st_size} bytes, more than {LARGEST}")
    return [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}" for file in sorted(found)]


def _check_metadata(data: bytes, *, version: str) -> None:
    """As the package index checks it: each field valid, and a description that it can render."""
    try:
        metadata = Metadata.from_email(data, validate=True)
    except ExceptionGroup as problems:
        raise Wrong(f"metadata: {'; '.join(map(str, problems.exceptions))}") from problems
    kind = BytesParser().parsebytes(data, headersonly=True)["Description-Content-Type"]
    if kind != "text/markdown" or not metadata.description:
        raise Wrong(f"metadata: the description is {kind}, and not markdown with a text")
    if str(metadata.version) != version:
        raise Wrong(f"metadata: version {metadata.version}, not {version}")


def main(arguments: list[str]) -> int:
    text = (ROOT / "CHANGELOG.md").read_text()
    try:
        match arguments:
            case ["dist"]:
                print("\n".join(check_distributions(ROOT / "dist", version=version())))
            case ["tag", tag]:
                check_tag(tag, version=version(), text=text)
            case ["notes", tag]:
                print(notes(tag, text))
            case _:
                print(__doc__, file=sys.stderr)
                return 2
    except Wrong as wrong:
        print(f"release: {wrong}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
