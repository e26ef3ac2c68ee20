"""Features on disk: content-addressed, row-resumable, locked, checksummed; ``.npy`` and JSON only,
no pickle.

``<key>/<first row>-<checksum>.npy`` holds SHARD rows (the last one fewer) and appears by a rename:
rows are complete or absent, the directory listing is the index. ``<key>/meta.json`` says what they
are; ``meta`` is all that changes a feature and nothing else (no batch size, no workers). Lock files
stay: removing one is a race on NFS.

    python -m fungi_core.store list | check | repair     # repair removes what check names; extraction recomputes it
"""

import argparse
import fcntl
import hashlib
import io
import json
import logging
import os
import re
import secrets
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import numpy as np

from companion import paths

# rows a file: 0.8 MB at width 768, 4,000 files for a million rows; a kill costs the rows of one
# file
SHARD = 256


class StoreMismatch(ValueError):
    """The folder of this key holds other rows than those asked for."""


class StoreCorrupt(ValueError):
    """A file of the store is not what was written there."""


def key(meta: dict) -> str:
    """24 hex digits of the SHA-256 of ``meta`` as canonical JSON; ValueError names a field that
    JSON cannot hold.
    """
    for name, value in meta.items():
        try:
            json.dumps(value, sort_keys=True, allow_nan=False)
        except (TypeError, ValueError) as err:
            raise ValueError(
                f"meta field {name!r}: {err}; accepted: text, finite numbers, None, lists, dicts"
            ) from err
    return hashlib.sha256(
        json.dumps(meta, sort_keys=True, separators=(",", ":")).encode()
    ).hexdigest()[:24]


def open_rows(meta: dict, n: int, width: int, root: Path | None = None) -> "Rows":
    """The ``(n, width)`` float32 rows that ``meta`` describes; writes nothing; StoreMismatch names
    differing fields.
    """
    record = {
        "format": 1,
        "dtype": "float32",
        "shard": SHARD,
        "n": int(n),
        "width": int(width),
        "meta": meta,
    }
    rows = Rows(
        Path(root or paths.store_dir()) / key(meta), json.loads(json.dumps(record))
    )  # tuples become lists
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


def check(root: Path | None = None, repair: bool = False) -> tuple[int, list[Path]]:
    """Read every file of the store: how many entries there are, and the files that are not what was
    written there.

    ``repair`` removes them, and only them, under each entry's lock; the next extraction recomputes
    their rows.
    """
    bad, files = [], sorted(Path(root or paths.store_dir()).glob("*/meta.json"))
    for file in files:
        try:
            rows = Rows(file.parent, _load_record(file))
            sound = key(rows.record["meta"]) == rows.key
        except StoreCorrupt:
            sound = False
        if not sound:  # whose rows these are is not known, so neither is whether they are right
            rows = Rows(file.parent, {"n": 0, "width": 0})
        names = rows.drop_corrupt() if repair else rows.corrupt()
        bad += [rows.path / name for name in names]
        if not sound:
            bad.append(file)
            if repair:
                file.unlink()
    return len(files), bad


def _load_record(file: Path) -> dict:
    try:
        record = json.loads(file.read_bytes())
        return {
            **record,
            "n": int(record["n"]),
            "width": int(record["width"]),
            "meta": dict(record["meta"]),
        }
    except (ValueError, TypeError, KeyError) as err:
        raise StoreCorrupt(f"{file} is damaged; delete its folder and extract again") from err


class Rows:
    """One entry of the store, made by `open_rows`; ``path`` is its folder, ``key`` the folder's
    name.
    """

    def __init__(self, path: Path, record: dict):
        self.path, self.key, self.record, self.n, self.width = (
            path,
            path.name,
            record,
            record["n"],
            record["width"],
        )
        self._filling: dict[int, np.ndarray] | None = (
            None  # shards not yet full, NaN where empty; None: not locked
        )
        self._range = 0, self.n  # the rows that the lock is for

    def missing(self, start: int = 0, stop: int | None = None) -> list[tuple[int, int]]:
        """Row ranges ``[low, high)`` of ``start .. stop`` (whole shards; default: all) that are not
        on disk, in order and disjoint; from the listing alone.
        """
        start, stop = self._part(start, stop)
        shards = self._shards()
        absent = [first not in shards for first in range(start, stop, SHARD)]
        edges = start + np.flatnonzero(np.diff([False, *absent, False])) * SHARD
        return [
            (int(low), min(int(high), stop)) for low, high in edges.reshape(-1, 2)
        ]  # (2 gaps,) -> (gaps, 2)

    complete = property(lambda self: not self.missing(), doc="Whether every row is on disk.")

    def write(self, start: int, block: np.ndarray) -> None:
        """Take ``block`` ``(b, width)`` as rows ``start .. start + b``; any b, in any order; needs
        the lock.

        A shard goes to disk with the last of its rows; shards not full when the lock is released
        are dropped; rows on disk are left alone. ValueError: shape, place, NaN or infinity in
        float32, and nothing of the block is taken.
        """
        block = np.asarray(
            block, dtype="<f4"
        )  # what overflows becomes infinite, and is refused below
        if self._filling is None:
            raise RuntimeError(f"{self.path}: rows are written inside `with rows.lock():`")
        if block.ndim != 2 or block.shape[1] != self.width or not 0 <= start <= self.n - len(block):
            raise ValueError(
                f"{self.path}: {block.shape} at row {start} does not fit in ({self.n}, {self.width})"
            )
        low, high = self._range
        if not low <= start <= start + len(block) <= high:
            asked = f"{start} to {start + len(block)}"
            raise ValueError(f"{self.path}: rows {asked} are not in the locked {low} to {high}")
        if not (finite := np.isfinite(block).all(axis=1)).all():
            raise ValueError(
                f"{self.path}: row {start + finite.argmin()} holds NaN or infinity; block not stored"
            )
        for first in range(start - start % SHARD, start + len(block), SHARD):
            low, high = max(first, start), min(first + SHARD, start + len(block))
            shard = self._filling.setdefault(
                first, np.full((min(SHARD, self.n - first), self.width), np.nan, "<f4")
            )
            shard[low - first : high - first] = block[low - start : high - start]
            if not np.isnan(shard).any():
                self._save(first, self._filling.pop(first))

    def read(self) -> np.ndarray:
        """All rows, ``(n, width)`` float32, no lock needed; StoreCorrupt names a bad file,
        LookupError counts gaps.
        """
        if absent := sum(stop - start for start, stop in self.missing()):
            raise LookupError(
                f"{self.path}: {absent} of {self.n} rows are missing; run their extraction to its end"
            )
        shards, out = self._shards(), np.empty((self.n, self.width), np.float32)
        for start in range(0, self.n, SHARD):
            data = (self.path / shards[start]).read_bytes()
            if self._name(start, data) != shards[start]:
                raise StoreCorrupt(
                    f"{self.path / shards[start]} is truncated, altered or foreign; repair: "
                    "drop_corrupt() removes such files, and the next extraction recomputes their rows"
                )
            out[start : start + SHARD] = np.lib.format.read_array(
                io.BytesIO(data), allow_pickle=False
            )
        return out

    def corrupt(self) -> list[str]:
        """Names of the shards that `read` refuses; reads every one, changes nothing."""
        return [
            n
            for start, n in self._shards().items()
            if self._name(start, (self.path / n).read_bytes()) != n
        ]

    def drop_corrupt(self) -> list[str]:
        """Remove the shards that `read` refuses, and only those; returns their names. Takes the
        lock itself.
        """
        with self.lock():
            bad = self.corrupt()
            for name in bad:
                (self.path / name).unlink()
        return bad

    @contextmanager
    def lock(self, start: int = 0, stop: int | None = None) -> Iterator[None]:
        """Be the one writer of this key: others wait, then ask `missing` again; freed by the kernel
        after a kill.

        Of rows ``start .. stop`` (whole shards; default: all): writers of other ranges work beside
        this one, a writer of all rows waits for every one of them. Ranges that overlap are safe but
        compute their common rows twice.
        """
        start, stop = self._part(start, stop)
        if self._filling is not None:
            raise RuntimeError(
                f"{self.path}: these rows are locked already"
            )  # waiting for oneself never ends
        whole = (start, stop) == (0, self.n)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as locks:
            locks.enter_context(self._flock(".lock", fcntl.LOCK_EX if whole else fcntl.LOCK_SH))
            if not whole:
                locks.enter_context(self._flock(f".{start}-{stop}.lock", fcntl.LOCK_EX))
            for torn in self.path.glob(
                "*.tmp"
            ):  # left by a killed writer; another range's may be in the making
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
                logging.getLogger(__name__).warning(
                    "%s: waiting for %s to end", self.path, Path(file.name).read_text()
                )
                fcntl.flock(file, kind)
            with suppress(
                OSError
            ):  # naming the holder is a courtesy: a full disk must not forbid drop_corrupt
                file.truncate(0)
                file.write(f"process {os.getpid()} on {os.uname().nodename}".encode())
            try:
                yield
            finally:
                fcntl.flock(
                    file, fcntl.LOCK_UN
                )  # closing is not enough: forked data loaders share the open file

    def _part(self, start: int, stop: int | None) -> tuple[int, int]:
        stop = self.n if stop is None else stop
        odd = [row for row in (start, stop) if row % SHARD and row != self.n]
        if odd or not 0 <= start <= stop <= self.n:
            raise ValueError(
                f"{self.path}: rows {start} to {stop} are no whole files of {SHARD} rows in 0 to {self.n}"
            )
        return start, stop

    def _shards(self) -> dict[int, str]:
        names = sorted(os.listdir(self.path)) if self.path.is_dir() else []
        return {
            int(name[:9]): name for name in names if re.fullmatch(r"\d{9}-[0-9a-f]{16}\.npy", name)
        }

    def _name(self, start: int, data: bytes) -> str:
        salted = (
            f"{self.key} {self.n} {self.width} {start} ".encode() + data
        )  # a sound shard of other rows won't pass
        return f"{start:09d}-{hashlib.sha256(salted).hexdigest()[:16]}.npy"

    def _save(self, start: int, rows: np.ndarray) -> None:
        np.lib.format.write_array(file := io.BytesIO(), rows, allow_pickle=False)
        if not (self.path / "meta.json").exists():
            self._put("meta.json", json.dumps(self.record, indent=1).encode())
        if start not in self._shards():
            self._put(self._name(start, file.getvalue()), file.getvalue())

    def _put(self, name: str, data: bytes) -> None:
        torn = (
            self.path / f"{name}.{secrets.token_hex(4)}.tmp"
        )  # two ranges write one meta.json at a time
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with open(torn, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(
                    file.fileno()
                )  # else a power cut can leave the final name on an empty file
            os.replace(torn, self.path / name)
        except OSError as err:  # the same errno gives the same subclass of OSError
            torn.unlink(missing_ok=True)
            raise OSError(
                err.errno, f"cannot write features into {self.path}: {err.strerror}"
            ) from err


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m fungi_core.store", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument(
        "what",
        choices=("list", "check", "repair"),
        help="repair removes the files that check names",
    )
    parser.add_argument("--root", type=Path, help="default: FUNGI_STORE, else data/store")
    args = parser.parse_args(argv)
    if args.what == "list":
        for entry in entries(args.root):
            what = " ".join(
                str(entry["meta"].get(name, "")) for name in ("data", "backbone", "feature")
            )
            print(
                f"{entry['key']}  {entry['done']} of {entry['n']} rows  {entry['bytes'] / 1e6:.1f} MB  {what}"
            )
        return
    count, bad = check(args.root, args.what == "repair")
    for file in bad:
        print(
            f"{file} is truncated, altered or foreign{'; removed' if args.what == 'repair' else ''}"
        )
    print(f"{count} entries, {len(bad)} bad files")
    if bad and args.what == "check":
        sys.exit(1)


if __name__ == "__main__":
    main()
