"""Versions of data in a git repository with DVC: what a revision holds, and a copy of it beside the work tree.

A version is named by a git revision. The ``.dvc`` files of that revision (and ``dvc.lock``) hold the hashes of the
data, which DVC has in its cache or in a remote. The user's work tree is read, and never changed.

``python -m accelerando.data.versions`` does what needs DVC itself in a process of its own: it is slow to import.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib.util
import json
import os
import posixpath
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from accelerando.base.errors import UserError, errors_in_one_line, first_line
from accelerando.base.files import derived, folders_below, whole_folder, write_text

INSTALL = "pip install dvc (with the remote's own part where it needs one: dvc[s3], dvc[gs], dvc[ssh])"
MANIFEST, FILES = "version.json", "files"  # in the folder of a fetched version
PROGRAM = [sys.executable, "-P", "-m", "accelerando.data.versions"]  # with what is done: fetch, status
MOST_TAGS = 5  # that a message names
READERS = 4  # threads that compare hashes


@dataclass(frozen=True)
class Tracked:
    """Data that DVC tracks: its ``path``, the ``file`` that names its hash (x.dvc or dvc.lock), and the hash, which
    ends with .dir for a folder. All paths are relative to the repository. ``legacy``: the hash is DVC 2's, of text with
    other line ends."""

    path: str
    file: str
    md5: str
    legacy: bool = False


@dataclass(frozen=True)
class Version:
    """What ``commit`` of a ``repository`` holds at ``paths``: the data ``tracked`` by DVC, and files in git as
    ``blobs`` (path, hash)."""

    repository: Path
    revision: str
    commit: str
    paths: tuple[str, ...]
    tracked: tuple[Tracked, ...]
    blobs: tuple[tuple[str, str], ...]

    @property
    def key(self) -> str:
        """A digest of the data, the same in every revision that holds it."""
        found = [*((one.path, one.md5) for one in self.tracked), *self.blobs]
        return hashlib.sha256(json.dumps(sorted(found)).encode()).hexdigest()[:16]

    @property
    def title(self) -> str:
        """Revision and commit."""
        return f"{self.revision} (commit {self.commit[:12]})" if self.commit else "no commit"

    @property
    def text(self) -> str:
        """The version in a line: revision, commit, and the hashes of its first parts."""
        parts = [f"{one.file} md5 {one.md5}" for one in self.tracked[:3]]
        more = [f"{len(self.tracked) - 3} more"] if len(self.tracked) > 3 else []
        return f"{self.revision} ({'; '.join([f'commit {self.commit[:12]}', *parts, *more])})"

    def record(self) -> dict[str, Any]:
        """The version for a JSON file."""
        tracked = [{"path": one.path, "file": one.file, "md5": one.md5} for one in self.tracked]
        return {"repository": str(self.repository), "revision": self.revision, "commit": self.commit,
                "tracked": tracked, "digest": self.key}  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- git


def git(repository: Path, *words: str) -> str:
    """The output of a git command.

    Raises:
        UserError: git is not installed, or the command fails.
    """
    try:
        done = subprocess.run(["git", "-C", str(repository), *words], capture_output=True, check=True)
    except FileNotFoundError:
        raise UserError("git is not installed, and --dataset_version names a git revision") from None
    except subprocess.CalledProcessError as error:
        reason = error.stderr.decode(errors="replace").strip().splitlines()
        raise UserError(f"{repository}: git {words[0]}: {reason[-1] if reason else 'failed'}") from None
    return done.stdout.decode(errors="surrogateescape")


def repository_of(path: Path) -> Path | None:
    """The git repository that holds ``path``, which need not exist; None: none does."""
    path = path.absolute()
    folder = next(place for place in (path, *path.parents) if place.is_dir())
    try:
        return Path(git(folder, "rev-parse", "--show-toplevel").rstrip("\n"))
    except UserError:
        return None


def path_in(repository: Path, path: Path) -> str | None:
    """``path`` relative to the repository, with slashes; None: it lies outside. A link at its end is not followed."""
    place = path.absolute()
    place = place.parent.resolve() / place.name
    return place.relative_to(repository).as_posix() if place.is_relative_to(repository) else None


def commit_of(repository: Path, revision: str) -> str:
    """The commit that a revision (tag, branch, hash, HEAD~2) names.

    Raises:
        UserError: there is no such revision; the message names the tags that are most like it, or the newest.
    """
    with contextlib.suppress(UserError):
        return git(repository, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}").strip()
    tags = git(repository, "tag", "--sort=-creatordate").split()
    close = difflib.get_close_matches(revision, tags, n=3, cutoff=0.5)
    if close:
        hint = f"did you mean {' or '.join(close)}?"
    elif tags:
        hint = f"the newest tags are {', '.join(tags[:MOST_TAGS])}"
    else:
        hint = "the repository has no tags; name a branch or a commit, or git fetch --tags"
    raise UserError(f"--dataset_version {revision}: no such revision in {repository}; {hint}")


# ---------------------------------------------------------------------------------------------------------- versions


def check_repository(repository: Path) -> None:
    """UserError unless DVC is set up at the top of the repository."""
    if not (repository / ".dvc").is_dir():
        raise UserError(
            f"{repository}: not a DVC repository (no .dvc folder at the top of it); --data_repo names another one, and "
            "`dvc init` and `dvc add` make one"
        )


def is_installed() -> bool:
    """Whether DVC is installed."""
    return importlib.util.find_spec("dvc") is not None


def check_dvc() -> None:
    """UserError unless DVC is installed."""
    if not is_installed():
        raise UserError(f"--dataset_version needs DVC: {INSTALL}")


def version_at(repository: Path, revision: str, paths: Sequence[str]) -> Version:
    """What a revision holds at ``paths``, relative to the repository.

    Raises:
        UserError: no such revision, or nothing is tracked at one of the paths.
    """
    commit = commit_of(repository, revision)
    everything = git(repository, "ls-tree", "-r", "-z", commit).split("\0")
    entries = [(entry.split("\t", 1)[1], entry.split()[2]) for entry in everything if "\t" in entry]
    files = {path: blob for path, blob in entries if is_dvc_file(path)}
    tracked = [one for path in files for one in tracked_by(path, git(repository, "show", f"{commit}:{path}"))]
    blobs = [(path, blob) for path, blob in entries if path not in files and PurePosixPath(path).name != ".gitignore"]
    return part_of(Version(repository, revision, commit, (), tuple(tracked), tuple(blobs)), paths)


def part_of(version: Version, paths: Sequence[str]) -> Version:
    """The part of a version at ``paths``, those inside others left out.

    Raises:
        UserError: nothing is tracked at one of them.
    """
    paths = [path for path in dict.fromkeys(paths) if not any(path != other and is_in(path, other) for other in paths)]
    for path in paths:
        if not is_tracked(version, path):
            known = [one.path for one in version.tracked]
            close = difflib.get_close_matches(path, known, n=1) or known[:1]
            hint = f"it tracks {close[0]}" if close else "it tracks no data"
            raise UserError(
                f"{path}: neither DVC nor git tracks it in {version.revision} of {version.repository} ({hint}); "
                f"`dvc add {path}` and a commit make a version of it"
            )
    tracked = [one for one in version.tracked if any(is_in(one.path, path) or is_in(path, one.path) for path in paths)]
    blobs = [(name, blob) for name, blob in version.blobs if any(is_in(name, path) for path in paths)]
    return replace(
        version, paths=tuple(paths), tracked=tuple(sorted(tracked, key=lambda one: one.path)),
        blobs=tuple(sorted(blobs)),
    )  # fmt: skip


def is_tracked(version: Version, path: str) -> bool:
    """Whether DVC or git tracks what lies at ``path``."""
    by_dvc = any(is_in(path, one.path) or is_in(one.path, path) for one in version.tracked)
    return by_dvc or any(is_in(name, path) for name, _ in version.blobs)


def is_in(path: str, folder: str) -> bool:
    """Whether ``path`` is ``folder`` or lies in it; "." is the whole repository."""
    return folder == "." or path == folder or path.startswith(f"{folder}/")


def is_dvc_file(path: str) -> bool:
    """Whether a file in git names data of DVC."""
    name = PurePosixPath(path).name
    return name == "dvc.lock" or (name.endswith(".dvc") and name != ".dvc")


def tracked_by(file: str, text: str) -> list[Tracked]:
    """The data that a .dvc file, or a dvc.lock, names.

    Raises:
        UserError: it is no YAML of this form.
    """
    import yaml

    try:
        content = yaml.safe_load(text) or {}
        if PurePosixPath(file).name == "dvc.lock":
            outs = [out for stage in content.get("stages", {}).values() for out in stage.get("outs", [])]
            folder = posixpath.dirname(file)
        else:
            outs, folder = content.get("outs", []), posixpath.join(posixpath.dirname(file), content.get("wdir", ""))
        return [tracked_out(file, folder, out) for out in outs]
    except (yaml.YAMLError, AttributeError, TypeError, KeyError) as error:
        raise UserError(f"{file}: not a file that DVC wrote ({first_line(error)})") from None


def tracked_out(file: str, folder: str, out: dict[str, Any]) -> Tracked:
    """One of the ``outs`` of a .dvc file."""
    path = posixpath.normpath(posixpath.join(folder, str(out["path"])))
    md5 = out.get("md5")
    if md5 is None:  # kept in a cloud that has versions of its own
        return Tracked(path, file, hashlib.md5(json.dumps(out, sort_keys=True).encode()).hexdigest(), legacy=True)
    return Tracked(path, file, str(md5), legacy=out.get("hash") != "md5")


# --------------------------------------------------------------------------------------------------------- work tree


def version_in_place(repository: Path, paths: Sequence[str]) -> tuple[Version, bool]:
    """(what the work tree holds at those of ``paths`` that are tracked, whether a commit holds the same).

    Raises:
        UserError: the data is not what its .dvc files say.
    """
    commit = revision = ""
    with contextlib.suppress(UserError):  # there is no commit yet
        commit = git(repository, "rev-parse", "--verify", "--quiet", "HEAD").strip()
        revision = git(repository, "describe", "--tags", "--always").strip()
    listed = git(repository, "ls-files", "-z").split("\0")
    new = git(repository, "ls-files", "-z", "--others", "--exclude-standard").split("\0")
    files = [path for path in (*listed, *new) if path and is_dvc_file(path) and (repository / path).is_file()]
    tracked = [one for path in files for one in tracked_by(path, (repository / path).read_text(encoding="utf-8"))]
    blobs = [(path, "") for path in listed if path and path not in files]
    here = Version(repository, revision, commit, (), tuple(tracked), tuple(blobs))
    here = part_of(here, [path for path in paths if is_tracked(here, path)])
    check_clean(here)
    with contextlib.suppress(UserError):
        committed = version_at(repository, commit, here.paths)
        unchanged = here.paths and not git(repository, "status", "--porcelain", "--", *here.paths)
        if committed.tracked == here.tracked and unchanged:
            return replace(here, blobs=committed.blobs), True
    return replace(here, blobs=()), False


def check_clean(version: Version) -> None:
    """UserError where data in the work tree is not what its .dvc file says. Without DVC nothing is compared."""
    if not version.tracked or not is_installed():
        return
    plain = {one.file for one in version.tracked}
    targets = sorted(plain) if all(file.endswith(".dvc") for file in plain) else []
    words = [*PROGRAM, "status", str(version.repository), *targets]
    done = subprocess.run(words, capture_output=True, text=True)
    try:
        found = json.loads(done.stdout)
    except ValueError:
        reason = done.stderr.strip().splitlines()
        raise UserError(f"{version.repository}: DVC's status: {reason[-1] if reason else 'failed'}") from None
    wanted = {one.path for one in version.tracked}
    for changes in found.values():
        for change in changes if isinstance(changes, list) else []:
            for path, state in change.get("changed outs", {}).items() if isinstance(change, dict) else ():
                if path in wanted:
                    raise UserError(different(version, path, state))


def different(version: Version, path: str, state: str) -> str:
    """The line for data that is not what its .dvc file says."""
    file = next(one.file for one in version.tracked if one.path == path)
    if state == "deleted":
        return (f"{path}: is not there, but {file} names it: `dvc pull {path}` brings it, or --dataset_version "
                f"{version.revision} trains on a copy")  # fmt: skip
    return (f"{path}: is not the data that {file} names: `dvc add {path}` and a commit make a version of it, `dvc "
            f"checkout {path}` puts the old one back, and --dataset_version {version.revision} trains on a copy of "
            "that")  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- fetching


def place_of(version: Version, cache: Path) -> Path:
    """Where the version is fetched to; below it are the paths as in the repository."""
    return cache / "versions" / version.key / FILES


def is_fetched(version: Version, cache: Path) -> bool:
    """Whether the version lies in the cache, with all its files."""
    try:
        read_fetched(place_of(version, cache).parent)
    except (OSError, ValueError, KeyError):
        return False
    return True


def read_fetched(folder: Path) -> dict[str, Any]:
    """The manifest of a fetched version. ValueError: files are missing, or have other sizes than when fetched."""
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    if not (folder / FILES).is_dir() or manifest["listing"] != listing(folder / FILES):
        raise ValueError("its files are not those that were fetched")
    return manifest


def listing(folder: Path) -> dict[str, Any]:
    """How many files a folder has, how large, and a digest of their names and sizes."""
    found, size, total = 0, 0, hashlib.sha256()
    for place, _, names in folders_below(folder):
        for name in names:
            path = place / name
            size += path.stat().st_size
            found += 1
            total.update(f"{path.relative_to(folder).as_posix()}|{path.stat().st_size}\n".encode(errors="replace"))
    return {"files": found, "bytes": size, "digest": total.hexdigest()}


def fetch_command(version: Version, cache: Path) -> list[str]:
    """The command that fetches a version into the cache, with one line for an error and exit code 2."""
    asked = (str(cache), str(version.repository), version.revision, version.commit, *version.paths)
    return [*PROGRAM, "fetch", *asked]


def fetch(version: Version, cache: Path) -> Path:
    """The folder with the version's data, fetched from DVC's cache and remote unless it is there, and compared with the
    hashes.

    Raises:
        UserError: no remote, one that cannot be reached, a file that it does not have, or one with another content.
    """

    def make(target: Path) -> None:
        with whole_folder(target) as draft:
            (draft / FILES).mkdir(parents=True)
            download(version, draft / FILES)
            check_hashes(version, draft / FILES)
            manifest = {**version.record(), "listing": listing(draft / FILES)}
            write_text(draft / MANIFEST, json.dumps(manifest, indent=1) + "\n")

    place = place_of(version, cache)
    derived(place.parent, read_fetched, make)
    return place


def download(version: Version, folder: Path) -> None:
    """Copies the paths of a version into ``folder``."""
    from dvc.fs import download as download_path
    from dvc.repo import Repo

    with Repo.open(str(version.repository), rev=version.commit, subrepos=True, uninitialized=True) as repo:
        for path in version.paths:
            target = folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            print(f"Fetching {path} of {version.revision}", flush=True)
            try:
                download_path(repo.dvcfs, path, str(target))
            except KeyboardInterrupt:
                raise
            except Exception as error:  # DVC passes on those of every kind of remote
                raise UserError(why_not_fetched(version, path, error)) from None


def why_not_fetched(version: Version, path: str, error: Exception) -> str:
    """The line for data that could not be fetched: whether it is for the remote or for a file in it."""
    from dvc.repo import Repo

    name, reason = "", " ".join(str(error).split()) or type(error).__name__
    with Repo(str(version.repository)) as repo:
        name = repo.config["core"].get("remote") or ""
        what = f"{path} of {version.revision}"
        if not name:
            return (f"{what}: is not in DVC's cache, and {version.repository} has no remote to fetch it from: `dvc "
                    "remote add --default NAME URL`")  # fmt: skip
        address = repo.config["remote"].get(name, {}).get("url", "")
        try:
            remote = repo.cloud.get_remote(name)
            there = remote.fs.exists(remote.path)
        except Exception as cause:
            return f"the remote {name} ({address}) cannot be reached: {first_line(cause)}"
    if not there:
        return f"the remote {name} ({address}) cannot be reached: there is nothing at that place"
    if isinstance(error, FileNotFoundError) or "missing" in type(error).__name__.lower():
        return (f"{what}: the remote {name} ({address}) does not have all of it ({reason}): `dvc push` where the data "
                "is")  # fmt: skip
    return f"{what}: cannot be fetched from the remote {name} ({address}): {reason}"


def check_hashes(version: Version, folder: Path) -> None:
    """UserError where what was fetched is not what the .dvc files name. Of a folder of which only a part was asked for,
    and of data hashed by DVC 2, nothing is compared."""
    from accelerando.base.log import with_progress

    wanted = {one.path: one for one in version.tracked if not one.legacy and (folder / one.path).exists()}
    whole = [one for one in wanted.values() if any(is_in(one.path, path) for path in version.paths)]
    for one in with_progress(whole, len(whole), "comparing hashes", "parts"):
        place = folder / one.path
        found = folder_md5(place) if one.md5.endswith(".dir") else file_md5(place)
        if found != one.md5:
            raise UserError(
                f"{one.path} of {version.revision}: what was fetched has the md5 {found}, but {one.file} names "
                f"{one.md5}: the remote, or DVC's cache, is damaged there"
            )


def file_md5(path: Path) -> str:
    """The md5 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def folder_md5(folder: Path) -> str:
    """The hash that DVC has for a folder: of a JSON list of its files' names and hashes."""
    from accelerando.base.processes import map_ahead

    files = [place / name for place, _, names in folders_below(folder) for name in names]
    entries = [
        {"md5": md5, "relpath": path.relative_to(folder).as_posix()}
        for path, md5 in map_ahead(file_md5, files, READERS, 4 * READERS)
    ]
    entries.sort(key=lambda entry: entry["relpath"])
    return hashlib.md5(json.dumps(entries, sort_keys=True).encode()).hexdigest() + ".dir"


def main() -> None:
    what, *words = sys.argv[1:]
    if what == "status":
        from dvc.repo import Repo

        repository, *targets = words
        os.chdir(repository)
        with contextlib.redirect_stdout(sys.stderr), Repo() as repo:
            found = repo.status(targets=targets or None)
        print(json.dumps(found))
        return
    cache, repository, revision, commit, *paths = words
    version = replace(version_at(Path(repository), commit, paths), revision=revision)
    place = fetch(version, Path(cache))
    listed = read_fetched(place.parent)["listing"]
    print(f"{listed['files']:,} files, {listed['bytes'] / 1e6:,.1f} MB, in {place}")


if __name__ == "__main__":
    with errors_in_one_line():
        main()
