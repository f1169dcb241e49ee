"""The data that a training script's settings name: where it lies, which version it is, and a digest of it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from accelerando.base.config import sections
from accelerando.base.errors import UserError
from accelerando.base.files import folders_below
from accelerando.data import versions
from accelerando.data.table_formats import table_suffix

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

# Texts of the section "data" that are no paths, by how they end.
NO_PATHS = ("_column", "_key", "_field", "_name", "_version", "_prefix", "_bucket", "cache_dir")
# Folders of the files that a table names; without them they lie beside the table.
FOLDERS_OF_TABLES = ("image_folder", "media_folder")
Tops = Mapping[str, tuple[Path, str]]  # setting -> what top_of gives


@dataclass
class Sources:
    """The data that is trained on.

    ``digest``: the same for the same data. ``title``: what it is, in a few words. ``version``: of DVC, if there is one.
    ``fetched``: it lies in the cache. ``places``: setting of the script -> path there, for those that differ. ``note``:
    what else there is to know.
    """

    digest: str
    title: str
    version: versions.Version | None = None
    fetched: bool = False
    places: dict[str, str] = field(default_factory=dict)
    note: str = ""


def sources_of(settings: DataclassInstance) -> dict[str, str]:
    """Setting -> path, of the settings that name the script's data; not what lies in a bucket or behind a URL."""
    types = {one.name: str(one.type) for one in dataclasses.fields(settings)}
    found: dict[str, str] = {}
    if getattr(settings, "smoke_test", False):
        return found
    for name, _ in sections(type(settings)).get("data", []):
        value = getattr(settings, name)
        is_text = re.fullmatch(r"str( \| None)?", types[name])
        if is_text and value and not name.endswith(NO_PATHS) and "://" not in value:
            found[name] = value
    return found


def top_of(value: str, settings: DataclassInstance) -> tuple[Path, str]:
    """(the file or folder that holds all of a source, what follows it in the setting): of a pattern with braces its
    folder, and that of a table whose files lie beside it."""
    beside = any(hasattr(settings, folder) and not getattr(settings, folder) for folder in FOLDERS_OF_TABLES)
    if "{" in value or (beside and table_suffix(value)):
        folder = value.partition("{")[0].rpartition("/")[0]
        return Path(folder or "."), "/" + value[len(folder) :].lstrip("/")
    return Path(value), ""


def resolve(
    settings: DataclassInstance, revision: str | None, repository: str | None, cache: Path, output: Path
) -> Sources:
    """The data that the settings name: of a git ``revision`` of a ``repository`` (default: the one that it lies in), or
    as it lies. ``output``: a folder that is written to, and so is no data.

    Raises:
        UserError: it cannot be had in that version; it differs from its .dvc files.
    """
    named = sources_of(settings)
    tops = {name: top_of(value, settings) for name, value in named.items()}
    if revision:
        return at_revision(tops, revision, repository, cache)
    if repository:
        raise UserError("--data_repo has no effect without --dataset_version")
    if not named:
        return Sources("", "no files of data are named")
    here = [Path(named[name]) if holds(top, output) else top for name, (top, _) in tops.items()]
    return in_place(list(dict.fromkeys(here)))


def in_place(places: Sequence[Path]) -> Sources:
    """The data at ``places`` as it lies; if it is under DVC, what its .dvc files name.

    Raises:
        UserError: it differs from its .dvc files.
    """
    home = versions.repository_of(places[0])
    if home and (home / ".dvc").is_dir():
        inside = {path: place for place in places if (path := versions.path_in(home, place)) is not None}
        version, committed = versions.version_in_place(home, list(inside))
        if version.tracked:
            certain = committed and versions.is_installed()
            followed = [inside[path] for path in version.paths]
            others = [place for place in places if not certain or place not in followed]
            digest = digest_of([version.key, *map(digest_of_path, others)]) if others else version.key
            note = "" if committed else "no commit holds this data yet"
            note = note if versions.is_installed() else "not compared with its .dvc files: DVC is not installed"
            return Sources(digest, version.title, version, note=note)
    shown = [f"{place}{'' if place.exists() else ', which is not there'}" for place in places]
    return Sources(digest_of([digest_of_path(place) for place in places]), f"as it lies ({', '.join(shown)})")


def at_revision(tops: Tops, revision: str, named: str | None, cache: Path) -> Sources:
    """The data at ``tops`` as a revision holds it; what lies outside of the repository is taken as it lies."""
    if not tops:
        raise UserError(f"--dataset_version {revision}: the settings name no data in files")
    versions.check_dvc()
    first, _ = next(iter(tops.values()))
    repository = versions.repository_of(Path(named) if named else first)
    if repository is None:
        what = f"--data_repo {named}" if named else f"--dataset_version {revision}: {first}"
        raise UserError(f"{what}: is in no git repository; --data_repo names the one that has the data")
    versions.check_repository(repository)
    paths: dict[str, str] = {}
    for name, (top, _) in tops.items():
        path = versions.path_in(repository, top)
        if path is None and named and not top.is_absolute():  # relative to that repository
            path = versions.path_in(repository, Path(named) / top)
        if path is not None:
            paths[name] = path
    if not paths:
        raise UserError(f"--dataset_version {revision}: {first} is not in {repository}; --data_repo names another one")
    version = versions.version_at(repository, revision, list(paths.values()))
    place = versions.place_of(version, cache)
    places = {name: f"{place / path}{tops[name][1]}" for name, path in paths.items()}
    outside = [top for name, (top, _) in tops.items() if name not in paths]
    note = f"as it lies, outside of the repository: {', '.join(map(str, outside))}" if outside else ""
    digest = digest_of([version.key, *map(digest_of_path, outside)]) if outside else version.key
    return Sources(digest, version.title, version, True, places, note)


def holds(folder: Path, place: Path) -> bool:
    """Whether a folder holds ``place`` or the current folder, and so more than data."""
    folder = folder.resolve()
    return place.resolve().is_relative_to(folder) or Path.cwd().is_relative_to(folder)


def digest_of_path(path: Path, without: Sequence[str] = ()) -> str:
    """A digest of a file, or of a folder's files: their names, sizes and ends, as :mod:`data.digest` takes them; those
    called as in ``without`` do not count."""
    from accelerando.data.digest import digest, file_contents, file_facts

    if path.is_file():
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    if not path.is_dir():
        return "missing"
    names = [
        (place / name).relative_to(path).as_posix()
        for place, _, files in folders_below(path)
        for name in files
        if name not in without
    ]
    sizes, _ = file_facts(path, names)
    return digest("\n".join(names), sizes, file_contents(path, names))


def digest_of(content: object) -> str:
    """A digest of what JSON can hold."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:32]
