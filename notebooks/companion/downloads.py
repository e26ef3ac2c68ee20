"""Files from the network: by checksum, resumed where a transfer broke off, never when
``FUNGI_OFFLINE`` is set; and archives unpacked without leaving their folder.
"""

import hashlib
import os
import stat
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from tqdm.auto import tqdm

# torchvision knows no checksum of this one; it is the one that other libraries' loaders agree on
CHECKSUMS = {
    "https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/archives/fgvc-aircraft-2013b.tar.gz": "d4acdd33327262359767eeaa97a4f732",
}
TRIES, PAUSE, TIMEOUT = 5, 2.0, 60.0  # attempts, and seconds between them and without an answer


def offline() -> bool:
    """Whether ``FUNGI_OFFLINE`` forbids every transfer (any value but empty and 0)."""
    return os.environ.get("FUNGI_OFFLINE", "").strip() not in ("", "0")


def fetch(url: str, file: Path, checksum: str | None = None) -> Path:
    """``file``, from ``url`` unless it is there: whole and with this checksum (hex: MD5 or
    SHA-256), or not there.

    What a broken transfer leaves (``file.part``) is continued by the next call. ValueError without
    a checksum, RuntimeError for another one, ConnectionError offline or after `TRIES` attempts.
    """
    checksum = (checksum or CHECKSUMS.get(url, "")).lower()
    if len(checksum) not in (32, 64):
        raise ValueError(f"{url} has no MD5 or SHA-256 to check it by; it is not fetched")
    if file.is_file() and digest(file, len(checksum)) == checksum:
        return file
    if offline():
        raise ConnectionError(f"{url} is not fetched: FUNGI_OFFLINE is set")
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"{file.name}.part")
    resumed = _transfer(url, part)
    if (
        resumed and digest(part, len(checksum)) != checksum
    ):  # continued from something else: once more, from nothing
        part.unlink()
        _transfer(url, part)
    if (found := digest(part, len(checksum))) != checksum:
        part.unlink()
        raise RuntimeError(f"{url} has the checksum {found}, not {checksum}; it is not kept")
    os.replace(part, file)
    return file


def digest(file: Path, length: int = 64) -> str:
    """SHA-256 of a file in hex, or MD5 where 32 digits are asked for (official archives publish no
    better).
    """
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256" if length == 64 else "md5").hexdigest()


def _transfer(url: str, part: Path) -> bool:
    """Fill ``part`` to its end, going on from what it holds; returns whether it held something."""
    resumed, error = part.is_file() and part.stat().st_size > 0, None
    for attempt in range(TRIES):
        time.sleep(PAUSE if attempt else 0)
        done = part.stat().st_size if part.is_file() else 0
        try:
            wanted = {"Range": f"bytes={done}-"} if done else {}
            with urlopen(
                Request(url, headers={"User-Agent": "fungi_core", **wanted}), timeout=TIMEOUT
            ) as answer:
                done = (
                    done if answer.status == 206 else 0
                )  # a server that cannot resume sends everything
                size = answer.headers.get("Content-Length")
                end = done + int(size) if size is not None else None
                with part.open("ab" if done else "wb") as out, _bar(part.stem, done, end) as bar:
                    while block := answer.read(2**20):
                        out.write(block)
                        bar.update(len(block))
            if end is None or part.stat().st_size == end:
                return resumed
            error = f"ended after {part.stat().st_size} of {end} bytes"
        except HTTPError as refusal:
            if refusal.code == 416 and done:  # nothing left to send
                return resumed
            error = refusal
            if 400 <= refusal.code < 500:
                break
        except (OSError, HTTPException) as broken:
            error = broken
    raise ConnectionError(f"{url} could not be fetched: {error}")


def _bar(name: str, done: int, end: int | None) -> tqdm:
    return tqdm(
        desc=name,
        initial=done,
        total=end,
        unit="B",
        unit_scale=True,
        disable=not sys.stderr.isatty(),
    )


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a .zip, .tar, .tgz, ... into ``folder``. Nothing appears there unless all of it could
    be unpacked.

    ValueError, naming the member, for absolute names, ``..``, links that lead outside, devices.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        dir=folder, prefix=f".{archive.name}-", suffix=".part"
    ) as inside:
        if zipfile.is_zipfile(archive):
            _unzip(archive, Path(inside))
        else:
            try:
                with tarfile.open(archive) as opened:
                    opened.extractall(
                        inside, filter=lambda member, path: _checked(archive, member, path)
                    )
            except tarfile.FilterError as error:
                raise ValueError(f"{archive}: {error}; nothing was unpacked") from error
            except (tarfile.TarError, EOFError, OSError) as error:
                raise ValueError(f"{archive} cannot be unpacked: {error}") from error
        _move_into(Path(inside), folder)


def _unzip(archive: Path, inside: Path) -> None:
    with zipfile.ZipFile(archive) as opened:
        for member in opened.infolist():
            _refuse_outside(archive, member.filename)
            if stat.S_ISLNK(member.external_attr >> 16):
                raise ValueError(f"{archive}: {member.filename!r} is a link; nothing was unpacked")
        opened.extractall(inside)


def _checked(archive: Path, member: tarfile.TarInfo, path: str) -> tarfile.TarInfo:
    _refuse_outside(
        archive, member.name
    )  # Python's own filter would strip a leading slash in silence
    return tarfile.data_filter(member, path)


def _refuse_outside(archive: Path, name: str) -> None:
    parts = name.replace("\\", "/").split("/")
    if name.startswith(("/", "\\")) or ".." in parts or ":" in parts[0]:
        raise ValueError(f"{archive}: {name!r} would leave the folder; nothing was unpacked")


def _move_into(source: Path, folder: Path) -> None:
    """Rename everything below ``source`` to its place below ``folder``; a folder as a whole where
    it is new there.
    """
    for entry in list(source.iterdir()):
        place = folder / entry.name
        if entry.is_dir() and not entry.is_symlink() and place.is_dir():
            _move_into(entry, place)
        else:
            os.replace(entry, place)


@contextmanager
def instead_of_torchvisions(module) -> Iterator[None]:
    """While a class of torchvision's ``module`` downloads, it does so by `fetch` and `unpack`.

    torchvision's own functions begin again after a broken transfer, fall back from https to http,
    and take one of the paper's archives without a checksum.
    """

    def download_url(url, root, filename=None, md5=None):
        fetch(url, Path(root) / (filename or url.rpartition("/")[2]), md5)

    def download_and_extract_archive(
        url, download_root, extract_root=None, filename=None, md5=None
    ):
        file = Path(download_root) / (filename or url.rpartition("/")[2])
        unpack(fetch(url, file, md5), Path(extract_root or download_root))

    ours = {
        f.__name__: f
        for f in (download_url, download_and_extract_archive)
        if hasattr(module, f.__name__)
    }
    theirs = {name: getattr(module, name) for name in ours}
    try:
        vars(module).update(ours)
        yield
    finally:
        vars(module).update(theirs)
