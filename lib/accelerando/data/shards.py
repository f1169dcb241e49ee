"""WebDataset shards (tar files of images and captions) with random access through an index of their members' offsets.

A sample consists of consecutive members with the same key: ``abc.jpg``, ``abc.txt`` and perhaps ``abc.json``, which may
also hold the caption. The index of a shard is made once and cached. Reading then takes one ``pread`` per member (or one
request per sample, if remote shards are not cached), so order, resume and exact evaluation work as with single files.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import tarfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, ClassVar

import numpy as np

from accelerando.base.errors import UserError, first_line
from accelerando.base.files import derived, expand_braces, folders_below, open_whole, visible_files
from accelerando.base.log import log
from accelerando.data.digest import digest, ends_of, file_stamps
from accelerando.data.order import LARGE, LargeOrder

if TYPE_CHECKING:
    from accelerando.data.order import Order
    from accelerando.data.remote import FileCache, RangeReader, RemoteFile

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")  # of several in a sample, the first in this order is taken
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
UNPACK = "compressed: unpack it (gunzip), since samples are read from any place of it"
SPLITS = {"train", "val", "validation", "test"}
VERSION = 2  # of the index
FACTS = np.dtype([("pairs", "<i8"), ("digest", "S32")])  # of a shard, the digest that of its index
CAPTION_IN_JSON = (0, 0)  # start and size of a text that is the "caption" of the sample's JSON
PLACES = [(f"{part}_{field}", "<u8") for part in ("image", "text", "json") for field in ("start", "size")]
INDEX = np.dtype([*PLACES, ("content", "<u8")])  # content: a digest of the ends of the sample's files
SHARDS_AT_ONCE = 4  # an epoch shuffles the shards, then the samples within groups of this many shards
OPEN_FILES = 64


def list_shards(source: str) -> list[Path]:
    """The local shards that ``source`` names, sorted: a folder and those below it, a tar file, or a brace or glob
    pattern.

    Raises:
        UserError: nothing was found, or something that is no tar file.
    """
    found: list[Path] = []
    for pattern in expand_braces(source):
        path = Path(pattern)
        if path.is_dir() and path.suffix.lower() != ".tar":
            found += _shards_below(path)
        elif any(sign in pattern for sign in "*?[") and not path.exists():
            found += map(Path, glob.glob(pattern, recursive=True))  # noqa: PTH207  (Path.glob refuses absolute patterns)
        elif path.exists():
            found.append(path)
        else:
            raise UserError(f"{pattern}: no such shard or folder")
    for path in found:
        if not path.is_file():
            kind = "a folder; pack it as a tar file, or move it away" if path.is_dir() else "not an ordinary file"
            raise UserError(f"{path}: is {kind}")
    if not found:
        packed = Path(source).is_dir() and next(visible_files(Path(source), COMPRESSED), None)
        hint = "tools/make_shards.py packs images and captions into shards"
        raise UserError(f"{source}: no shards (*.tar) in it; {f'{packed} is {UNPACK}' if packed else hint}")
    return sorted(found)


def has_shards(folder: Path) -> bool:
    """True if there are shards in ``folder`` or below it."""
    return next(visible_files(folder, (".tar", *COMPRESSED)), None) is not None


def _shards_below(folder: Path) -> list[Path]:
    found = []
    for place, folders, files in folders_below(folder):
        found += [place / name for name in (*folders, *files) if name.endswith(".tar") and not name.startswith(".")]
        folders[:] = [name for name in folders if not name.endswith(".tar") and not name.startswith(".")]
    splits = {path.relative_to(folder).parts[0] for path in found} & SPLITS
    if len(splits) > 1:
        raise UserError(f"{folder}: holds {' and '.join(sorted(splits))}: name one of them")
    return found


def identity_of(shard: Path | RemoteFile) -> str:
    """A text that changes when a shard does: its path, size and modification time, or its URL, size and version."""
    if isinstance(shard, Path):
        stat = shard.stat()
        return f"{VERSION}|{shard.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"
    return f"{VERSION}|{shard.url}|{shard.size}|{shard.version}"


def index_file(path: Path, cache: Path, remote: RemoteFile | None = None) -> Path:
    """The .npy file in ``cache`` that keeps the index of a shard in its present state; ``path`` names a remote one."""
    identity = identity_of(path if remote is None else remote)
    return cache / f"{path.stem}-{hashlib.sha256(identity.encode()).hexdigest()[:20]}.npy"


def index_shard(
    path: Path, cache: Path, remote: tuple[RemoteFile, FileCache | RangeReader] | None = None
) -> np.ndarray:
    """Offsets and sizes of the samples of a shard, memory-mapped [n] of ``INDEX``; made if it is not in ``cache``.

    A ``remote`` shard, of which ``path`` is the name, is downloaded (or read remotely) only if it has no index yet.

    Raises:
        UserError: the tar is corrupted or truncated, or a sample lacks its image or its caption.
    """
    target = index_file(path, cache, remote[0] if remote else None)

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
    sample: dict[str, tuple[int, int]] = {}  # suffix -> start, size
    content = hashlib.blake2b(digest_size=8)
    current = None
    without_image = 0

    def close() -> None:
        nonlocal without_image
        if not sample:
            return
        parts = {"text": sample.get("txt") or sample.get("cls"), "json": sample.get("json")}
        parts["image"] = next((sample[suffix] for suffix in IMAGE_SUFFIXES if suffix in sample), None)
        # Only the JSON of a sample that lacks something is read: the caption may be in it, or why there is no image.
        about = {}
        if parts["json"] and not (parts["image"] and parts["text"]):
            about = _json_of(file, *parts["json"])
        if not parts["image"] and about.get("status") not in (None, "success"):
            without_image += 1
            return
        if not parts["text"] and not isinstance(about.get("caption"), str):
            parts["text"] = None
        elif not parts["text"]:
            parts["text"] = CAPTION_IN_JSON
        for part, name in (("image", "image (.jpg, .png or .webp)"), ("text", "caption (.txt, or caption in a .json)")):
            if parts[part] is None:
                raise UserError(
                    f"{shown}: sample {current!r} has no {name}: each needs both; "
                    "pack it again with tools/make_shards.py"
                )
        places = [number for part in ("image", "text", "json") for number in parts[part] or (0, 0)]
        rows.append((*places, int.from_bytes(content.digest(), "little")))

    magic = file.read(6)
    if magic.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")):
        raise UserError(f"{shown}: is {UNPACK}")
    file.seek(0)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            reached = 0
            for member in tar:
                # A size may be negative or beyond the file; tarfile would go round in circles.
                wrong = member.isfile() and not 0 <= member.size <= size - member.offset_data
                if wrong or member.offset_data <= reached:
                    raise tarfile.ReadError(f"truncated, or the size of {member.name!r:.80} is wrong")
                reached = member.offset_data
                if not member.isfile():
                    continue
                folder, slash, name = member.name.rpartition("/")
                stem, _, suffix = name.partition(".")
                suffix = suffix.lower()
                if suffix not in (*IMAGE_SUFFIXES, "txt", "cls", "json"):
                    continue
                if member.issparse():
                    raise tarfile.ReadError(f"{member.name!r:.80} is stored with holes")
                if folder + slash + stem != current or suffix in sample:
                    close()
                    sample, current = {}, folder + slash + stem
                    content = hashlib.blake2b(digest_size=8)
                sample[suffix] = (member.offset_data, member.size)
                content.update(ends_of(file, member.offset_data, member.size))  # beside the headers, which are read too
            close()
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(512) != bytes(512):  # the end marker of a tar
                raise tarfile.ReadError("truncated: no end marker")
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{shown}: {error.strerror or error}") from None
    except Exception as error:  # tarfile passes on errors of numbers, texts and memory
        raise UserError(
            f"{shown}: a corrupted or truncated tar ({first_line(error)}): fetch or pack it again"
        ) from None
    if without_image:
        log.info("%s: %d samples without an image, which was not downloaded, are left out", shown, without_image)
    return np.array(rows, dtype=INDEX) if rows else np.zeros(0, INDEX)


def _json_of(file: IO[bytes], start: int, size: int) -> dict[str, Any]:
    """The object at a place of a tar file, empty if there is none; the position in the file is kept."""
    before = file.tell()
    file.seek(start)
    try:
        content = json.loads(file.read(size))
    except (ValueError, RecursionError):
        content = None
    file.seek(before)
    return content if isinstance(content, dict) else {}


def part_of(entry: np.ndarray, part: str) -> tuple[int, int]:
    """Start and size, in bytes, of a part (image, text or json) from a sample's entry in the index."""
    return int(entry[f"{part}_start"]), int(entry[f"{part}_size"])


class ShardPairs:
    """The samples of many shards, numbered shard by shard in the order of their names.

    ``shards`` are local paths, or remote files that ``remote`` caches or reads in parts.
    """

    unit: ClassVar[str] = "pairs"

    def __init__(
        self, shards: list[Path] | list[RemoteFile], cache: Path, remote: FileCache | RangeReader | None = None
    ) -> None:
        self.shards, self.cache, self.remote = shards, cache / "shards", remote
        facts = self._facts(cache / "shard_sets")
        self.starts = np.concatenate([[0], np.cumsum(facts["pairs"])])
        self._digests = facts["digest"]
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
        """See :class:`data.digest.Digested`: of the shards' names, and place, size and ends of what is in them."""
        names = [Path(self.name(shard)).name for shard in range(len(self.shards))]
        total = [f"{name} {one.decode()}" for name, one in zip(names, self._digests, strict=True)]
        return {"shards": digest(" ".join(total))}

    def image_numbers(self) -> np.ndarray:
        """See :class:`data.pairs.PairSource`: every sample has an image of its own."""
        return np.arange(len(self))

    def image_facts(self) -> str:
        """See :class:`data.pairs.PairSource`."""
        if self.remote is None:
            return file_stamps(Path("/"), [str(shard.resolve()) for shard in self.shards])
        return digest("\n".join(f"{shard.url}|{shard.size}|{shard.version}" for shard in self.shards))

    def read(self, row: int) -> tuple[bytes, bytes]:
        """The image file and the caption of a row, as stored."""
        shard, entry = self._entry(row)
        in_json = part_of(entry, "text") == CAPTION_IN_JSON
        image, text = self._read(shard, [part_of(entry, "image"), part_of(entry, "json" if in_json else "text")])
        return image, json.loads(text)["caption"].encode(errors="replace") if in_json else text

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
        except (ValueError, RecursionError) as error:
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

    def epoch_order(self, seed: int, epoch: int) -> Order:
        """The order of rows in an epoch, int64 [n]: shards are shuffled, then the samples of a few shards at a time."""
        rng = np.random.default_rng([seed, epoch])
        shards = rng.permutation(len(self.shards))
        groups = [shards[start : start + SHARDS_AT_ONCE] for start in range(0, len(shards), SHARDS_AT_ONCE)]

        def rows_of(group: np.ndarray) -> np.ndarray:
            return np.concatenate([np.arange(self.starts[shard], self.starts[shard + 1]) for shard in group])

        if len(self) <= LARGE:
            return np.concatenate([rng.permutation(rows_of(group)) for group in groups])
        ends = np.cumsum(np.diff(self.starts)[shards])
        return LargeOrder(
            np.concatenate([[0], ends[SHARDS_AT_ONCE - 1 : -1 : SHARDS_AT_ONCE], ends[-1:]]),
            lambda number: np.random.default_rng([seed, epoch, 6, number]).permutation(rows_of(groups[number])),
        )

    def prefetch(self, parts: Iterable[np.ndarray]) -> None:
        """Starts to fetch remote shards of rows in advance, in this order."""
        if self.remote is not None:
            self.remote.prefetch(self._files_of(parts))

    def _files_of(self, parts: Iterable[np.ndarray]) -> Iterator[RemoteFile]:
        """The remote shards of rows, each once, as they are first needed."""
        seen: set[int] = set()
        for rows in parts:
            if len(seen) == len(self.shards):
                return
            for shard in dict.fromkeys((np.searchsorted(self.starts, rows, side="right") - 1).tolist()):
                if shard not in seen:
                    seen.add(shard)
                    yield self.shards[shard]

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

    def _facts(self, folder: Path) -> np.ndarray:
        """``FACTS`` of every shard in its present state, [shards]: from a file in ``folder``, else from the indexes.

        Each process needs them when it starts, and to open and read 20,000 indexes takes more than ten seconds.
        """
        from accelerando.base.log import progress_bar

        identities = "\n".join(map(identity_of, self.shards))
        key = hashlib.sha256(identities.encode("utf-8", "surrogateescape")).hexdigest()[:32]

        def make(target: Path) -> None:
            facts = np.zeros(len(self.shards), FACTS)
            with progress_bar(len(self.shards), 0, " shards", "indexing") as bar:
                for number in range(len(self.shards)):
                    index = self._open_index(number)
                    facts[number] = len(index), digest(index)
                    self._forget_all()
                    bar.update()
            with open_whole(target, "wb") as file:
                np.save(file, facts)

        def read(target: Path) -> np.ndarray:
            facts = np.load(target, allow_pickle=False)
            if facts.dtype != FACTS or len(facts) != len(self.shards):
                raise ValueError("not the facts of these shards")
            return facts

        return derived(folder / f"{key}.npy", read, make)

    def _index(self, shard: int) -> np.ndarray:
        indexes = self.__dict__.setdefault("_indexes", {})
        if shard not in indexes:
            while len(indexes) >= OPEN_FILES:  # each holds a file descriptor
                indexes.pop(next(iter(indexes)))
            index = self._open_index(shard)
            if len(index) != self.starts[shard + 1] - self.starts[shard]:
                raise UserError(f"{self.name(shard)}: the file changed while it was in use: start again")
            indexes[shard] = index
        return indexes[shard]

    def _open_index(self, shard: int) -> np.ndarray:
        file = self.shards[shard]
        if self.remote is None:
            return index_shard(file, self.cache)
        return index_shard(Path(Path(file.url).name), self.cache, (file, self.remote))

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
