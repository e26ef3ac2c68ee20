"""Features on disk: content-addressed, row-resumable, locked, checksummed; ``.npy`` and JSON only, no pickle.

``<key>/<first row>-<checksum>.npy`` holds SHARD rows (the last one fewer) and appears by a rename: rows are complete
or absent, the directory listing is the index. ``<key>/meta.json`` says what they are; ``meta`` is all that changes a
feature and nothing else (no batch size, no workers). Lock files stay: removing one is a race on NFS. ``<key>.lock`` is
that of the whole, ``<key>.<start>-<stop>.lock`` of a row range, so that several processes can fill one key.
"""

import fcntl
import hashlib
import io
import json
import logging
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import numpy as np

from fungi_core import paths

SHARD = 256  # rows a file: 0.8 MB at width 768, 4,000 files for a million rows; a kill costs the rows of one file


class StoreMismatch(ValueError):
    """The folder of this key holds other rows than those asked for."""


class StoreCorrupt(ValueError):
    """A file of the store is not what was written there."""


def key(meta: dict) -> str:
    """24 hex digits of the SHA-256 of ``meta`` as canonical JSON; ValueError names a field that JSON cannot hold."""
    for name, value in meta.items():
        try:
            json.dumps(value, sort_keys=True, allow_nan=False)
        except (TypeError, ValueError) as err:
            raise ValueError(f"meta field {name!r}: {err}; accepted: text, finite numbers, None, lists, dicts") from err
    return hashlib.sha256(json.dumps(meta, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:24]


def open_rows(meta: dict, n: int, width: int, root: Path | None = None) -> "Rows":
    """The ``(n, width)`` float32 rows that ``meta`` describes; writes nothing; StoreMismatch names differing fields."""
    record = {"format": 1, "dtype": "float32", "shard": SHARD, "n": int(n), "width": int(width), "meta": meta}
    rows = Rows(Path(root or paths.store_dir()) / key(meta), json.loads(json.dumps(record)))  # tuples become lists
    there = _load_record(file) if (file := rows.path / "meta.json").exists() else rows.record
    if differing := [
        f"{name} ({there.get(name)!r} there, {asked!r} asked)"
        for name, asked in rows.record.items()
        if there.get(name) != asked
    ]:
        raise StoreMismatch(f"{rows.path} holds other rows: {', '.join(differing)}")
    return rows


def entries(root: Path | None = None) -> list[dict]:
    """What the store holds, one dict a key: key, meta, n, width, done (rows on disk), bytes."""
    files = sorted(Path(root or paths.store_dir()).glob("*/meta.json"))
    return [
        {
            "key": rows.key,
            "meta": rows.record["meta"],
            "n": rows.n,
            "width": rows.width,
            "done": rows.n - sum(stop - start for start, stop in rows.missing()),
            "bytes": sum(entry.stat().st_size for entry in os.scandir(rows.path)),
        }
        for rows in (Rows(file.parent, _load_record(file)) for file in files)
    ]


def _load_record(file: Path) -> dict:
    try:
        record = json.loads(file.read_bytes())
        return {**record, "n": int(record["n"]), "width": int(record["width"]), "meta": dict(record["meta"])}
    except (ValueError, TypeError, KeyError) as err:
        raise StoreCorrupt(f"{file} is damaged; delete its folder and extract again") from err


class Rows:
    """One entry of the store, made by `open_rows`; ``path`` is its folder, ``key`` the folder's name."""

    def __init__(self, path: Path, record: dict):
        self.path, self.key, self.record, self.n, self.width = path, path.name, record, record["n"], record["width"]
        self._filling: dict[int, np.ndarray] | None = None  # shards not yet full, NaN where empty; None: not locked
        self._locked = 0, 0  # rows that may be written

    def missing(self, start: int = 0, stop: int | None = None) -> list[tuple[int, int]]:
        """Row ranges ``[start, stop)`` not on disk, in order and disjoint; from the listing alone.

        ``start``, ``stop``: only this part, as for `lock`.
        """
        start, stop = self._whole_shards(start, stop)
        shards = self._shards()
        absent = [first not in shards for first in range(start, stop, SHARD)]
        edges = start + np.flatnonzero(np.diff([False, *absent, False])) * SHARD
        return [(int(first), min(int(last), stop)) for first, last in edges.reshape(-1, 2)]  # (2 gaps,) -> (gaps, 2)

    complete = property(lambda self: not self.missing(), doc="Whether every row is on disk.")

    def write(self, start: int, block: np.ndarray) -> None:
        """Take ``block`` ``(b, width)`` as rows ``start .. start + b``; any b, in any order; needs the lock.

        A shard goes to disk with the last of its rows; shards not full when the lock is released are dropped; rows on
        disk are left alone. ValueError: shape, place, NaN or infinity in float32, and nothing of the block is taken.
        """
        block = np.asarray(block, dtype="<f4")  # what overflows becomes infinite, and is refused below
        if self._filling is None:
            raise RuntimeError(f"{self.path}: rows are written inside `with rows.lock():`")
        if block.ndim != 2 or block.shape[1] != self.width or not 0 <= start <= self.n - len(block):
            raise ValueError(f"{self.path}: {block.shape} at row {start} does not fit in ({self.n}, {self.width})")
        if not self._locked[0] <= start <= self._locked[1] - len(block):
            raise RuntimeError(f"{self.path}: {len(block)} rows at {start} are not among the locked {self._locked}")
        if not (finite := np.isfinite(block).all(axis=1)).all():
            raise ValueError(f"{self.path}: row {start + finite.argmin()} holds NaN or infinity; block not stored")
        for first in range(start - start % SHARD, start + len(block), SHARD):
            low, high = max(first, start), min(first + SHARD, start + len(block))
            shard = self._filling.setdefault(first, np.full((min(SHARD, self.n - first), self.width), np.nan, "<f4"))
            shard[low - first : high - first] = block[low - start : high - start]
            if not np.isnan(shard).any():
                self._save(first, self._filling.pop(first))

    def read(self) -> np.ndarray:
        """All rows, ``(n, width)`` float32, no lock needed; StoreCorrupt names a bad file, LookupError counts gaps."""
        if absent := sum(stop - start for start, stop in self.missing()):
            raise LookupError(f"{self.path}: {absent} of {self.n} rows are missing; run their extraction to its end")
        shards, out = self._shards(), np.empty((self.n, self.width), np.float32)
        for start in range(0, self.n, SHARD):
            data = (self.path / shards[start]).read_bytes()
            if self._name(start, data) != shards[start]:
                raise StoreCorrupt(
                    f"{self.path / shards[start]} is truncated, altered or foreign; repair: "
                    "drop_corrupt() removes such files, and the next extraction recomputes their rows"
                )
            out[start : start + SHARD] = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
        return out

    def drop_corrupt(self) -> list[str]:
        """Remove the shards that `read` refuses, and only those; returns their names. Takes the lock itself."""
        with self.lock():
            bad = [n for start, n in self._shards().items() if self._name(start, (self.path / n).read_bytes()) != n]
            for name in bad:
                (self.path / name).unlink()
        return bad

    @contextmanager
    def lock(self, start: int = 0, stop: int | None = None) -> Iterator[None]:
        """Be the one writer of rows ``start .. stop``, all by default: others who want any of them wait, then ask
        `missing` again; freed by the kernel after a kill. ValueError unless the range is made of whole shards.
        """
        start, stop = self._whole_shards(start, stop)
        if self._filling is not None:
            raise RuntimeError(f"{self.path}: these rows are locked already")  # waiting for oneself never ends
        self.path.parent.mkdir(parents=True, exist_ok=True)
        own = f"{self.key}.lock" if stop - start == self.n else f"{self.key}.{start:09d}-{stop:09d}.lock"
        with ExitStack() as stack:
            files = {own: stack.enter_context(open(self.path.with_name(own), "a+b", buffering=0))}
            # One's own file exclusively, those of overlapping ranges shared. Each makes its own before it looks, so of
            # two processes the later one sees the other's; all lock in one order, so no two wait for each other.
            for name in sorted({own, *self._overlapping(start, stop)}):
                file = files.get(name) or stack.enter_context(open(self.path.with_name(name), "a+b", buffering=0))
                self._flock(file, fcntl.LOCK_EX if name == own else fcntl.LOCK_SH)
                stack.callback(fcntl.flock, file, fcntl.LOCK_UN)  # closing is not enough: forked loaders share the file
            with suppress(OSError):  # naming the holder is a courtesy: a full disk must not forbid drop_corrupt
                files[own].truncate(0)
                files[own].write(f"process {os.getpid()} on {os.uname().nodename}".encode())
            for torn in self.path.glob("*.tmp"):  # left by a killed writer; beside a range others may be writing
                place = re.match(r"\d{9}", torn.name)
                if stop - start == self.n or (place and start <= int(place[0]) < stop):
                    torn.unlink()
            try:
                self._filling, self._locked = {}, (start, stop)
                yield
            finally:
                self._filling, self._locked = None, (0, 0)

    def _flock(self, file, kind: int) -> None:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            logging.getLogger(__name__).warning("%s: waiting for %s to end", self.path, Path(file.name).read_text())
            fcntl.flock(file, kind)

    def _overlapping(self, start: int, stop: int) -> list[str]:
        """Lock files of this key whose rows are among ``start .. stop``."""
        found = {file.name: re.fullmatch(r"\w+(?:\.(\d{9})-(\d{9}))?\.lock", file.name)
                 for file in self.path.parent.glob(f"{self.key}*.lock")}  # fmt: skip
        rows = {name: (int(m[1] or 0), int(m[2] or self.n)) for name, m in found.items() if m}
        return [name for name, (first, last) in rows.items() if first < stop and start < last]

    def _whole_shards(self, start: int, stop: int | None) -> tuple[int, int]:
        stop = self.n if stop is None else stop
        if not 0 <= start <= stop <= self.n or start % SHARD or (stop % SHARD and stop != self.n):
            raise ValueError(f"{self.path}: rows {start} to {stop} of {self.n} are not whole shards of {SHARD} rows")
        return start, stop

    def _shards(self) -> dict[int, str]:
        names = sorted(os.listdir(self.path)) if self.path.is_dir() else []
        return {int(name[:9]): name for name in names if re.fullmatch(r"\d{9}-[0-9a-f]{16}\.npy", name)}

    def _name(self, start: int, data: bytes) -> str:
        salted = f"{self.key} {self.n} {self.width} {start} ".encode() + data  # a sound shard of other rows won't pass
        return f"{start:09d}-{hashlib.sha256(salted).hexdigest()[:16]}.npy"

    def _save(self, start: int, rows: np.ndarray) -> None:
        np.lib.format.write_array(file := io.BytesIO(), rows, allow_pickle=False)
        if not (self.path / "meta.json").exists():
            self._put("meta.json", json.dumps(self.record, indent=1).encode(), start)
        if start not in self._shards():
            self._put(self._name(start, file.getvalue()), file.getvalue(), start)

    def _put(self, name: str, data: bytes, start: int) -> None:
        torn = self.path / f"{start:09d}.tmp"  # by row: writers of different ranges may both write meta.json
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with open(torn, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())  # else a power cut can leave the final name on an empty file
            os.replace(torn, self.path / name)
        except OSError as err:  # the same errno gives the same subclass of OSError
            torn.unlink(missing_ok=True)
            raise OSError(err.errno, f"cannot write features into {self.path}: {err.strerror}") from err
