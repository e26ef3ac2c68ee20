"""Features on disk: content-addressed, resumable by row, locked, checksummed; no pickle.

``<key>/<first row>-<checksum>.npy`` holds SHARD rows (the last one fewer) and appears by a rename:
rows are complete or absent, and the directory listing is the index. ``<key>/meta.json`` says what
they are; ``meta`` holds all that changes a feature and nothing else. Lock files stay: removing one
is a race on network file systems.
"""

import fcntl
import hashlib
import io
import json
import logging
import os
import re
import secrets
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import numpy as np

SHARD = 256  # rows a file: 0.8 MB at width 768; a kill costs the rows of one file


class StoreMismatch(ValueError):
    """Say that the folder of this key holds other rows than those asked for."""


class StoreCorrupt(ValueError):
    """Say that a file of the store is not what was written there."""


def key(meta: dict) -> str:
    """Return 24 hex digits of the SHA-256 of ``meta`` as canonical JSON.

    Raises ValueError that names a field which JSON cannot hold.
    """
    for name, value in meta.items():
        try:
            json.dumps(value, sort_keys=True, allow_nan=False)
        except (TypeError, ValueError) as error:
            accepted = "text, finite numbers, None, lists, dicts"
            raise ValueError(f"meta field {name!r}: {error}; accepted: {accepted}") from error
    text = json.dumps(meta, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def open_entry(meta: dict, n: int, width: int, root: Path | None = None) -> "Entry":
    """Open the entry of the (n, width) float32 rows that ``meta`` describes; nothing is written.

    ``root``: by default the folder that FUNGI_STORE names, else ``data/store`` below the working
    folder. Raises StoreMismatch, naming the differing fields, where other rows lie there.
    """
    name = key(meta)  # it says which field JSON cannot hold
    record = {"format": 1, "dtype": "float32", "shard": SHARD, "n": int(n), "width": int(width)}
    record = json.loads(json.dumps(record | {"meta": meta}))  # tuples become lists
    root = root or os.environ.get("FUNGI_STORE", "").strip() or "data/store"
    entry = Entry(Path(root).expanduser() / name, record)
    file = entry.path / "meta.json"
    there = load_record(file) if file.exists() else record
    differing = [
        f"{name} ({there.get(name)!r} there, {asked!r} asked)"
        for name, asked in record.items()
        if there.get(name) != asked
    ]
    if differing:
        raise StoreMismatch(f"{entry.path} holds other rows: {', '.join(differing)}")
    return entry


def load_record(file: Path) -> dict:
    """Read a meta.json; raises StoreCorrupt for anything else."""
    try:
        record = json.loads(file.read_bytes())
        sizes = {name: int(record[name]) for name in ("n", "width")}
        return record | sizes | {"meta": dict(record["meta"])}
    except (ValueError, TypeError, KeyError) as error:
        raise StoreCorrupt(f"{file} is damaged; delete its folder and extract again") from error


class Entry:
    """Hold one entry of the store: its folder ``path``, named ``key``, and the rows' shape."""

    def __init__(self, path: Path, record: dict):
        self.path, self.key, self.record = path, path.name, record
        self.n, self.width = record["n"], record["width"]
        # Shards not yet full, NaN where empty; None: not locked.
        self._filling: dict[int, np.ndarray] | None = None
        self._range = 0, self.n  # the rows that the lock is for

    def missing(self, start: int = 0, stop: int | None = None) -> list[tuple[int, int]]:
        """Return the row ranges [low, high) of start..stop that are not on disk, see `gaps`."""
        return gaps([self], start, stop)

    @property
    def complete(self) -> bool:
        """Say whether every row is on disk."""
        return not self.missing()

    def write(self, start: int, block: np.ndarray) -> None:
        """Take ``block`` (b, width) as rows start..start + b; any b, in any order; needs the lock.

        A shard goes to disk with the last of its rows; shards not full when the lock is released
        are dropped; rows on disk are left alone. Raises ValueError for a wrong shape or place, NaN
        or infinity; then nothing of the block is taken.
        """
        block = np.asarray(block, dtype="<f4")  # an overflow becomes infinite, and is refused below
        if self._filling is None:
            raise RuntimeError(f"{self.path}: rows are written inside `with entry.lock():`")
        stop, (low, high) = start + len(block), self._range
        if block.shape[1:] != (self.width,) or not low <= start <= stop <= high:
            room = f"{self.n, self.width}, locked {low} to {high}"
            raise ValueError(f"{self.path}: {block.shape} at row {start} does not fit in {room}")
        finite = np.isfinite(block).all(axis=1)
        if not finite.all():
            bad = start + finite.argmin()
            raise ValueError(f"{self.path}: row {bad} holds NaN or infinity; block not stored")
        for first in range(start - start % SHARD, stop, SHARD):
            low, high = max(first, start), min(first + SHARD, stop)
            empty = np.full((min(SHARD, self.n - first), self.width), np.nan, "<f4")
            shard = self._filling.setdefault(first, empty)
            shard[low - first : high - first] = block[low - start : high - start]
            if not np.isnan(shard).any():
                self._save(first, self._filling.pop(first))

    def read(self) -> np.ndarray:
        """Return all rows, (n, width) float32, as `files` yields them."""
        out = np.empty((self.n, self.width), np.float32)
        for i, rows in enumerate(self.files()):
            out[i * SHARD : (i + 1) * SHARD] = rows
        return out

    def files(self, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
        """Yield rows start..stop (whole shards; default: all), shard by shard; needs no lock.

        Raises StoreCorrupt naming a bad file, LookupError counting missing rows.
        """
        start, stop = self._part(start, stop)
        if absent := sum(high - low for low, high in self.missing(start, stop)):
            lack = f"{absent} of {self.n} rows are missing"
            raise LookupError(f"{self.path}: {lack}; finish their extraction")
        shards = self._shards()
        for first in range(start, stop, SHARD):
            file = self.path / shards[first]
            data = file.read_bytes()
            if self._name(first, data) != shards[first]:
                state = f"{file} is truncated, altered or foreign"
                raise StoreCorrupt(f"{state}; drop_corrupt() removes it for the next extraction")
            yield np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)

    def corrupt(self) -> list[str]:
        """Return the names of the shards that `read` refuses; reads every one, changes nothing."""
        return [
            name
            for start, name in self._shards().items()
            if self._name(start, (self.path / name).read_bytes()) != name
        ]

    def drop_corrupt(self) -> list[str]:
        """Remove the shards that `read` refuses, under the lock; return their names."""
        with self.lock():
            bad = self.corrupt()
            for name in bad:
                (self.path / name).unlink()
        return bad

    @contextmanager
    def lock(self, start: int = 0, stop: int | None = None) -> Iterator[None]:
        """Be the one writer of rows start..stop (whole shards; default: all).

        Others wait, then ask `missing` again; the kernel frees the lock after a kill. Writers of
        other ranges work beside this one; a writer of all rows waits for every one of them. Ranges
        that overlap are safe but compute their common rows twice.
        """
        start, stop = self._part(start, stop)
        if self._filling is not None:  # waiting for oneself never ends
            raise RuntimeError(f"{self.path}: these rows are locked already")
        whole = (start, stop) == (0, self.n)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as locks:
            locks.enter_context(self._flock(".lock", fcntl.LOCK_EX if whole else fcntl.LOCK_SH))
            if not whole:
                locks.enter_context(self._flock(f".{start}-{stop}.lock", fcntl.LOCK_EX))
            # Left by a killed writer; another range's may be in the making.
            for torn in self.path.glob("*.tmp"):
                if whole or torn.name[:9].isdigit() and start <= int(torn.name[:9]) < stop:
                    torn.unlink(missing_ok=True)
            try:
                self._filling, self._range = {}, (start, stop)
                yield
            finally:
                self._filling, self._range = None, (0, self.n)

    @contextmanager
    def _flock(self, suffix: str, kind: int) -> Iterator[None]:
        with open(self.path.with_suffix(suffix), "a+b", buffering=0) as file:
            try:
                fcntl.flock(file, kind | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = Path(file.name).read_text()
                logging.getLogger(__name__).warning("%s: waiting for %s to end", self.path, holder)
                fcntl.flock(file, kind)
            # Naming the holder is a courtesy: a full disk must not forbid drop_corrupt.
            with suppress(OSError):
                file.truncate(0)
                file.write(f"process {os.getpid()} on {os.uname().nodename}".encode())
            try:
                yield
            finally:  # closing is not enough: forked data loaders share the open file
                fcntl.flock(file, fcntl.LOCK_UN)

    def _part(self, start: int, stop: int | None) -> tuple[int, int]:
        stop = self.n if stop is None else stop
        odd = [row for row in (start, stop) if row % SHARD and row != self.n]
        if odd or not 0 <= start <= stop <= self.n:
            whole = f"no whole files of {SHARD} rows in 0 to {self.n}"
            raise ValueError(f"{self.path}: rows {start} to {stop} are {whole}")
        return start, stop

    def _shards(self) -> dict[int, str]:
        names = sorted(os.listdir(self.path)) if self.path.is_dir() else []
        shards = [name for name in names if re.fullmatch(r"\d{9}-[0-9a-f]{16}\.npy", name)]
        return {int(name[:9]): name for name in shards}

    def _name(self, start: int, data: bytes) -> str:
        # Salted, so that a sound shard of other rows does not pass.
        salted = f"{self.key} {self.n} {self.width} {start} ".encode() + data
        return f"{start:09d}-{hashlib.sha256(salted).hexdigest()[:16]}.npy"

    def _save(self, start: int, rows: np.ndarray) -> None:
        np.lib.format.write_array(file := io.BytesIO(), rows, allow_pickle=False)
        if not (self.path / "meta.json").exists():
            self._put("meta.json", json.dumps(self.record, indent=1).encode())
        if start not in self._shards():
            self._put(self._name(start, file.getvalue()), file.getvalue())

    def _put(self, name: str, data: bytes) -> None:
        # A name of its own: two ranges write one meta.json at a time.
        torn = self.path / f"{name}.{secrets.token_hex(4)}.tmp"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with open(torn, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())  # else a power cut can leave the name on an empty file
            os.replace(torn, self.path / name)
        except OSError as error:  # the same errno gives the same subclass of OSError
            torn.unlink(missing_ok=True)
            reason = f"cannot write features into {self.path}: {error.strerror}"
            raise OSError(error.errno, reason) from error


def gaps(
    entries: Sequence[Entry], start: int = 0, stop: int | None = None
) -> list[tuple[int, int]]:
    """Return the row ranges [low, high) of start..stop that any entry of as many rows lacks.

    The range is whole shards (default: all), and so are the gaps: a resumed run must have the
    batches of an undisturbed one, so the same bytes. The answer comes from the listings alone.
    """
    if not entries:
        return []
    start, stop = entries[0]._part(start, stop)
    there = set.intersection(*(set(entry._shards()) for entry in entries))
    absent = [first not in there for first in range(start, stop, SHARD)]
    edges = start + np.flatnonzero(np.diff([False, *absent, False])) * SHARD
    return [(low, min(high, stop)) for low, high in edges.reshape(-1, 2).tolist()]
