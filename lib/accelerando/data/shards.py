"""WebDataset shards (tar files of images and captions) with random access through an index of their members' offsets.

A sample consists of consecutive members with the same key: ``abc.jpg``, ``abc.txt`` and perhaps ``abc.json``. The
index of a shard is made once and cached. Reading then takes one ``pread`` per member (or one request per sample, if
remote shards are not cached), so order, resume and exact evaluation work as with single files.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections import OrderedDict
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, ClassVar

import numpy as np

from accelerando.base.errors import UserError, first_line
from accelerando.base.files import derived, expand_braces, open_whole
from accelerando.data.digest import digest

if TYPE_CHECKING:
    from accelerando.data.remote import FileCache, RangeReader, RemoteFile

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
INDEX = np.dtype([(f"{part}_{field}", "<u8") for part in ("image", "text", "json") for field in ("start", "size")])
SHARDS_AT_ONCE = 4  # an epoch shuffles the shards, then the samples within groups of this many shards
OPEN_FILES = 64


def list_shards(source: str) -> list[Path]:
    """The local shards that ``source`` names, sorted: a folder, a tar file or a brace or glob pattern.

    Raises:
        UserError: nothing was found.
    """
    found: list[Path] = []
    for pattern in expand_braces(source):
        path = Path(pattern)
        if path.is_dir():
            found += path.glob("*.tar")
        elif any(sign in pattern for sign in "*?["):
            found += (path.parent if path.parent.is_dir() else Path()).glob(path.name)
        elif path.is_file():
            found.append(path)
        else:
            raise UserError(f"{pattern}: no such shard or folder")
    if not found:
        raise UserError(
            f"{source}: no shards (*.tar) in it; tools/make_shards.py packs images and captions into shards"
        )
    return sorted(found)


def index_shard(
    path: Path, cache: Path, remote: tuple[RemoteFile, FileCache | RangeReader] | None = None
) -> np.ndarray:
    """Offsets and sizes of the samples of a shard, memory-mapped [n] of ``INDEX``; made if it is not in ``cache``.

    A ``remote`` shard, of which ``path`` is the name, is downloaded (or read remotely) only if it has no index yet.

    Raises:
        UserError: the tar is corrupted or truncated, or a sample lacks its image or its caption.
    """
    if remote is None:
        stat = path.stat()
        identity = f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"
    else:
        identity = f"{remote[0].url}|{remote[0].size}|{remote[0].version}"
    target = cache / f"{path.stem}-{hashlib.sha256(identity.encode()).hexdigest()[:20]}.npy"

    def make(target: Path) -> None:
        if remote is None:
            with open(path, "rb") as file:
                index = _scan(file, path.stat().st_size, str(path))
        else:
            with remote[1].open(remote[0]) as file:
                index = _scan(file, remote[0].size, remote[0].url)
        with open_whole(target, "wb") as file:
            np.save(file, index)

    return derived(target, _read_index, make)


def _read_index(path: Path) -> np.ndarray:
    index = np.load(path, mmap_mode="r" if path.stat().st_size > 200 else None, allow_pickle=False)
    if index.dtype != INDEX:
        raise ValueError("not an index of a shard")
    return index


def _scan(file: IO[bytes], size: int, shown: str) -> np.ndarray:
    rows: list[tuple[int, ...]] = []
    sample: dict[str, tuple[int, int]] = {}
    current = None

    def close() -> None:
        if current is None or not sample:
            return
        for part, name in (("image", "image (.jpg, .png or .webp)"), ("text", "caption (.txt)")):
            if part not in sample:
                raise UserError(
                    f"{shown}: sample {current!r} has no {name}: each needs both; "
                    "pack it again with tools/make_shards.py"
                )
        rows.append(tuple(number for part in ("image", "text", "json") for number in sample.get(part, (0, 0))))

    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                folder, slash, name = member.name.rpartition("/")
                stem, _, suffix = name.partition(".")
                part = _kind_of(suffix.lower())
                if part is None:
                    continue
                if folder + slash + stem != current or part in sample:
                    close()
                    sample, current = {}, folder + slash + stem
                sample[part] = (member.offset_data, member.size)
            close()
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(512) != bytes(512):  # the end marker of a tar
                raise tarfile.ReadError("truncated: no end marker")
    except (tarfile.TarError, EOFError) as error:
        raise UserError(
            f"{shown}: a corrupted or truncated tar ({first_line(error)}): fetch or pack it again"
        ) from None
    except OSError as error:
        raise UserError(f"{shown}: {error.strerror or error}") from None
    if rows and max(row[at] + row[at + 1] for row in rows for at in (0, 2, 4)) > size:
        raise UserError(f"{shown}: a truncated tar (its last sample is incomplete): fetch or pack it again")
    return np.array(rows, dtype=INDEX) if rows else np.zeros(0, INDEX)


def part_of(entry: np.ndarray, part: str) -> tuple[int, int]:
    """Start and size, in bytes, of a part (image, text or json) from a sample's entry in the index."""
    return int(entry[f"{part}_start"]), int(entry[f"{part}_size"])


def _kind_of(suffix: str) -> str | None:
    return "image" if suffix in IMAGE_SUFFIXES else {"txt": "text", "json": "json"}.get(suffix)


class ShardPairs:
    """The samples of many shards, numbered shard by shard in the order of their names.

    ``shards`` are local paths, or remote files that ``remote`` caches or reads in parts.
    """

    unit: ClassVar[str] = "pairs"

    def __init__(
        self, shards: list[Path] | list[RemoteFile], cache: Path, remote: FileCache | RangeReader | None = None
    ) -> None:
        from accelerando.base.log import progress_bar

        self.shards, self.cache, self.remote = shards, cache / "shards", remote
        counts = np.zeros(len(shards), np.int64)
        with progress_bar(len(shards), 0, " shards", "indexing") as bar:
            for number in range(len(shards)):
                counts[number] = len(self._index(number))
                self._forget_all()
                bar.update()
        self.starts = np.concatenate([[0], np.cumsum(counts)])
        if not len(self):
            raise UserError(f"{self.name(0)}: no samples in it (nor in the {len(shards) - 1} other shards)")

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getstate__(self) -> dict[str, object]:
        return {key: value for key, value in vars(self).items() if key not in ("_indexes", "_files")}

    def name(self, shard: int) -> str:
        """The path or URL of a shard."""
        return str(self.shards[shard] if self.remote is None else self.shards[shard].url)

    def digest(self) -> dict[str, str]:
        """See :class:`data.digest.Digested`: of the shards' names, and the place and size of what is in them."""
        total = [f"{Path(self.name(shard)).name} {digest(self._index(shard))}" for shard in range(len(self.shards))]
        self._forget_all()
        return {"shards": digest(" ".join(total))}

    def read(self, row: int) -> tuple[bytes, bytes]:
        """The image file and the caption of a row, as stored."""
        shard, entry = self._entry(row)
        return tuple(self._read(shard, [part_of(entry, "image"), part_of(entry, "text")]))

    def metadata(self, row: int) -> dict[str, Any]:
        """The content of the sample's .json; empty if it has none.

        Raises:
            UserError: it is not a JSON object.
        """
        shard, entry = self._entry(row)
        if not entry["json_size"]:
            return {}
        try:
            content = json.loads(self._read(shard, [part_of(entry, "json")])[0])
        except ValueError as error:
            raise UserError(f"{self.where(row)}: invalid JSON ({first_line(error)})") from None
        if not isinstance(content, dict):
            raise UserError(f"{self.where(row)}: its .json contains a {type(content).__name__}, not an object")
        return content

    def where(self, row: int) -> str:
        """Shard and key of a row, for a message."""
        shard, _ = self._entry(row)
        return f"{self.name(shard)}: {self.members(shard)[row - self.starts[shard]]}"

    def members(self, shard: int) -> list[str]:
        """The names of a shard's images, sample by sample."""
        starts = self._index(shard)["image_start"].tolist()
        with self._open(shard) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            names = {member.offset_data: member.name for member in tar}
        return [names.get(start, "?") for start in starts]

    def epoch_order(self, seed: int, epoch: int) -> np.ndarray:
        """The order of rows in an epoch, int64 [n]: shards are shuffled, then the samples of a few shards at a time."""
        rng = np.random.default_rng([seed, epoch])
        shards = rng.permutation(len(self.shards))
        groups = [shards[start : start + SHARDS_AT_ONCE] for start in range(0, len(shards), SHARDS_AT_ONCE)]
        rows = [
            np.concatenate([np.arange(self.starts[shard], self.starts[shard + 1]) for shard in group])
            for group in groups
        ]
        return np.concatenate([rng.permutation(part) for part in rows])

    def prefetch(self, rows: np.ndarray) -> None:
        """Starts to fetch remote shards of ``rows`` in advance, in this order."""
        if self.remote is not None:
            shards = np.searchsorted(self.starts, rows, side="right") - 1
            _, first = np.unique(shards, return_index=True)
            self.remote.prefetch([self.shards[shards[at]] for at in np.sort(first)])

    def _entry(self, row: int) -> tuple[int, np.ndarray]:
        shard = int(np.searchsorted(self.starts, row, side="right")) - 1
        return shard, self._index(shard)[row - self.starts[shard]]

    def _open(self, shard: int) -> IO[bytes]:
        return open(self.shards[shard], "rb") if self.remote is None else self.remote.open(self.shards[shard])

    def _read(self, shard: int, parts: list[tuple[int, int]]) -> list[bytes]:
        """Some parts (start, size) of a shard, in bytes."""
        if hasattr(self.remote, "read"):
            return self.remote.read(self.shards[shard], parts)
        file = self._file(shard)
        return [os.pread(file, size, start) for start, size in parts]

    def _index(self, shard: int) -> np.ndarray:
        indexes = self.__dict__.setdefault("_indexes", {})
        if shard not in indexes:
            while len(indexes) >= OPEN_FILES:  # each holds a file descriptor
                indexes.pop(next(iter(indexes)))
            file = self.shards[shard]
            indexes[shard] = (
                index_shard(file, self.cache)
                if self.remote is None
                else index_shard(Path(Path(file.url).name), self.cache, (file, self.remote))
            )
        return indexes[shard]

    def _file(self, shard: int) -> int:
        # Each process opens its own files; pread does not move a shared file position.
        files = self.__dict__.setdefault("_files", OrderedDict())
        if shard not in files:
            while len(files) >= OPEN_FILES:
                os.close(files.popitem(last=False)[1])
            path = self.shards[shard] if self.remote is None else self.remote.get(self.shards[shard])
            files[shard] = os.open(path, os.O_RDONLY)
        files.move_to_end(shard)
        return files[shard]

    def _forget_all(self) -> None:
        """Closes the files opened to index the shards, so that workers do not inherit them."""
        self.__dict__.pop("_indexes", None)
        for file in self.__dict__.pop("_files", {}).values():
            os.close(file)
