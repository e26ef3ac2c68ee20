"""The store under fire: kills, races, torn, altered and foreign files, full and read-only disks."""

import builtins
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from helpers import entries

from companion import paths, stored
from fungi_core import store
from fungi_core.store import SHARD, StoreCorrupt, StoreMismatch, key, open_entry

META = {"backbone": "vit_micro", "objective": "kl", "seed": 0, "views": [2, 10]}
N, WIDTH = 5 * SHARD + 17, 6  # the last shard is ragged

# A process that fills the store in small blocks, logs each row it computes, and may kill itself
# with SIGKILL at the
# n-th call of a function: `python -c WORKER root log pause [module.function nth]`.
WORKER = (
    f"n, width, meta = {N}, {WIDTH}, {META!r}"
    + """
import os, signal, sys, time
from pathlib import Path
import numpy as np
from fungi_core.store import open_entry
root, log, pause = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
if len(sys.argv) > 4:
    name, calls = sys.argv[4], int(sys.argv[5])
    real = getattr(os, name)
    def deadly(*args):
        global calls
        calls -= 1
        if calls == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args)
    setattr(os, name, deadly)
rows = open_entry(meta, n, width, root)
print("ready", flush=True)
with rows.lock(), open(log, "a", buffering=1) as computed:
    for start, stop in rows.missing():
        for first in range(start, stop, 50):
            last = min(first + 50, stop)
            time.sleep(pause)
            computed.write(f"{first} {last}\\n")
            rows.write(first, np.sin(np.arange(first * width, last * width)).reshape(-1, width))
"""
)


def features() -> np.ndarray:
    return np.sin(np.arange(N * WIDTH)).reshape(N, WIDTH).astype(np.float32)


def filled(root: Path, meta: dict = META, values: np.ndarray | None = None) -> store.Entry:
    values = features() if values is None else values
    rows = open_entry(meta, *values.shape, root)
    with rows.lock():
        rows.write(0, values)
    return rows


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def start_worker(root: Path, log: Path, pause: float, *deadly: object) -> subprocess.Popen:
    command = [sys.executable, "-c", WORKER, str(root), str(log), str(pause), *map(str, deadly)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=paths.ROOT)


def computed(log: Path) -> np.ndarray:
    """How often each row was computed, from the workers' log."""
    times = np.zeros(N, int)
    for line in log.read_text().splitlines():
        first, last = map(int, line.split())
        times[first:last] += 1
    return times


# --- key


def test_key_is_canonical():
    assert key({"a": 1, "b": {"d": 2, "c": (3, 4)}}) == key({"b": {"c": [3, 4], "d": 2}, "a": 1})
    assert len(key(META)) == 24 and int(key(META), 16) >= 0
    # worked by hand: printf '{"a":1}' | sha256sum
    assert key({"a": 1}) == "015abd7f5cc57a2dd94b7590"
    assert len({key(META | {"seed": seed}) for seed in range(100)}) == 100


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), {1}, np.int64(3), Path("x"), b"x", [1, {"y": object()}]]
)
def test_key_names_the_field_json_cannot_hold(value):
    with pytest.raises(ValueError, match="'temperature'") as info:
        key({"seed": 0, "temperature": value})
    assert "\n" not in str(info.value)


# --- write, read, resume


@pytest.mark.parametrize("n", [1, SHARD - 1, SHARD, SHARD + 1, 3 * SHARD, 3 * SHARD + 40])
@pytest.mark.parametrize("size", [1, 37, SHARD, 10_000])
def test_round_trip_for_any_block_size(tmp_path, n, size):
    values = np.random.default_rng(n).normal(size=(n, 3)).astype(np.float32)
    rows = open_entry(META, n, 3, tmp_path)
    with rows.lock():
        for start in range(0, n, size):
            rows.write(start, values[start : start + size])
    assert rows.complete and rows.missing() == []
    again = open_entry(META, n, 3, tmp_path).read()
    assert again.dtype == np.float32 and again.shape == (n, 3) and np.array_equal(again, values)


def test_bytes_do_not_depend_on_order_or_block_size(tmp_path):
    filled(tmp_path / "whole")
    rows = open_entry(META, N, WIDTH, tmp_path / "shuffled")
    starts = list(range(0, N, 23))
    random.Random(0).shuffle(starts)
    with rows.lock():
        for start in starts:
            rows.write(start, features()[start : start + 23])
    assert contents(rows.path) == contents(tmp_path / "whole" / rows.key)


def test_nothing_on_disk_before_the_first_full_shard(tmp_path):
    rows = open_entry(META, N, WIDTH, tmp_path / "store")
    assert not (tmp_path / "store").exists() and rows.missing() == [(0, N)] and not rows.complete
    with pytest.raises(ZeroDivisionError), rows.lock():
        rows.write(0, features()[: SHARD - 1])
        raise ZeroDivisionError("the extraction failed")
    assert not rows.path.exists() and entries(tmp_path / "store") == []
    with rows.lock():
        rows.write(
            SHARD - 1, features()[SHARD - 1 : SHARD]
        )  # completes nothing: the rows above were dropped
    assert not rows.path.exists() and rows.missing() == [(0, N)]


def test_missing_is_merged_and_aligned(tmp_path):
    rows = open_entry(META, N, WIDTH, tmp_path)
    with rows.lock():
        rows.write(
            SHARD - 5, features()[SHARD - 5 : 2 * SHARD + 5]
        )  # completes shard 1, touches 0 and 2
        rows.write(4 * SHARD, features()[4 * SHARD : 5 * SHARD])
        assert rows.missing() == [(0, SHARD), (2 * SHARD, 4 * SHARD), (5 * SHARD, N)]
    assert rows.missing() == open_entry(META, N, WIDTH, tmp_path).missing()
    assert not rows.complete
    with pytest.raises(LookupError, match=f"{N - 2 * SHARD} of {N} rows are missing"):
        rows.read()


def test_rows_on_disk_are_left_alone(tmp_path):
    rows = filled(tmp_path)
    before = contents(rows.path)
    with rows.lock():
        rows.write(0, np.zeros((N, WIDTH)))
    assert contents(rows.path) == before and np.array_equal(rows.read(), features())


def test_default_root_is_the_store_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("FUNGI_STORE", str(tmp_path / "elsewhere"))
    rows = open_entry(META, 3, 2)
    assert rows.path == tmp_path / "elsewhere" / key(META) and rows.key == key(META)


# --- refusals


@pytest.mark.parametrize(
    "n, width, field, other", [(N + 1, WIDTH, "n", "width"), (N, WIDTH + 1, "width", "n")]
)
def test_mismatch_names_the_field(tmp_path, n, width, field, other):
    filled(tmp_path)
    with pytest.raises(StoreMismatch, match=rf" {field} \(") as info:
        open_entry(META, n, width, tmp_path)
    assert f" {other} (" not in str(info.value) and "\n" not in str(info.value)


def test_altered_and_damaged_meta_are_refused(tmp_path):
    rows = filled(tmp_path)
    file = rows.path / "meta.json"
    good = file.read_text()
    file.write_text(good.replace("vit_micro", "vit_mini"))
    with pytest.raises(StoreMismatch, match=r" meta \(.*vit_mini.*vit_micro"):
        open_entry(META, N, WIDTH, tmp_path)
    for damaged in (good[:40], "", "[1, 2]", json.dumps({"n": 3})):
        file.write_text(damaged)
        with pytest.raises(StoreCorrupt, match="meta.json is damaged"):
            open_entry(META, N, WIDTH, tmp_path)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e39])  # 1e39 is finite in float64 only
@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_non_finite_rows_are_refused_and_nothing_is_written(tmp_path, bad):
    values = features().astype(np.float64)
    values[SHARD + 9, 2] = values[SHARD + 30, 0] = bad
    rows = open_entry(META, N, WIDTH, tmp_path)
    with rows.lock():
        with pytest.raises(ValueError, match=f"row {SHARD + 9} holds NaN or infinity"):
            rows.write(0, values)
        assert not rows.path.exists()


@pytest.mark.parametrize(
    "start, shape", [(-1, (3, WIDTH)), (N - 2, (3, WIDTH)), (0, (3, WIDTH + 1)), (0, (WIDTH,))]
)
def test_blocks_that_do_not_fit_are_refused(tmp_path, start, shape):
    rows = open_entry(META, N, WIDTH, tmp_path)
    with rows.lock(), pytest.raises(ValueError, match=f"does not fit in .{N}, {WIDTH}."):
        rows.write(start, np.zeros(shape))


def test_writing_needs_the_lock_and_locking_twice_is_refused(tmp_path):
    rows = open_entry(META, N, WIDTH, tmp_path)
    with pytest.raises(RuntimeError, match="with entry.lock"):
        rows.write(0, features())
    with rows.lock(), pytest.raises(RuntimeError, match="locked already"):
        rows.drop_corrupt()
    with pytest.raises(RuntimeError, match="with entry.lock"):
        rows.write(0, features())


# --- damaged shards


def truncate(file: Path, rows: store.Entry, tmp: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def empty(file: Path, rows: store.Entry, tmp: Path) -> None:
    os.truncate(file, 0)


def flip_data(file: Path, rows: store.Entry, tmp: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-5] ^= 1  # one bit, in a low byte of a number: no parser would notice
    file.write_bytes(data)


def flip_header(file: Path, rows: store.Entry, tmp: Path) -> None:
    file.write_bytes(file.read_bytes().replace(b"<f4", b"<i4"))


def append(file: Path, rows: store.Entry, tmp: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\0")


def foreign_text(file: Path, rows: store.Entry, tmp: Path) -> None:
    file.write_text("not an array")


def foreign_array(file: Path, rows: store.Entry, tmp: Path) -> None:
    np.save(file, np.zeros((SHARD, WIDTH), np.float32))


def pickled(file: Path, rows: store.Entry, tmp: Path) -> None:
    np.save(file, np.array([{"a": 1}], dtype=object), allow_pickle=True)


def other_place(file: Path, rows: store.Entry, tmp: Path) -> None:
    """A sound shard of the same rows under another first row, its own checksum kept in the name."""
    source = next(rows.path.glob(f"{3 * SHARD:09d}-*"))
    file.unlink()
    shutil.copy(source, file.with_name(f"{SHARD:09d}{source.name[9:]}"))


def other_store(file: Path, rows: store.Entry, tmp: Path) -> None:
    """A sound shard of another key, same place and shape, under its own name."""
    other = filled(tmp / "other", META | {"seed": 1})
    file.unlink()
    shutil.copy(next(other.path.glob(f"{SHARD:09d}-*")), rows.path)


@pytest.mark.parametrize(
    "damage",
    [
        truncate,
        empty,
        flip_data,
        flip_header,
        append,
        foreign_text,
        foreign_array,
        pickled,
        other_place,
        other_store,
    ],
)
def test_damaged_shards_are_named_dropped_and_recomputed(tmp_path, damage):
    rows = filled(tmp_path / "store")
    before = contents(rows.path)
    damage(next(rows.path.glob(f"{SHARD:09d}-*")), rows, tmp_path)
    name = next(rows.path.glob(f"{SHARD:09d}-*")).name
    with pytest.raises(StoreCorrupt, match=rf"{rows.path / name} .*drop_corrupt\(\)") as info:
        rows.read()
    assert "\n" not in str(info.value)
    assert rows.drop_corrupt() == [name] and rows.drop_corrupt() == []
    assert rows.missing() == [(SHARD, 2 * SHARD)]
    with rows.lock():
        rows.write(SHARD, features()[SHARD : 2 * SHARD])
    assert contents(rows.path) == before and np.array_equal(rows.read(), features())


def test_files_that_are_no_shards_are_never_used_and_temporary_ones_cleared_by_the_lock(tmp_path):
    rows = filled(tmp_path)
    before = contents(rows.path).keys()
    for name in (
        ".DS_Store",
        "notes.txt",
        "000000000.npy",
        "features.npy",
        f"{SHARD:09d}-{'0' * 16}.npy.tmp",
    ):
        (rows.path / name).write_text("x")
    assert np.array_equal(rows.read(), features()) and rows.drop_corrupt() == []
    left = {".DS_Store", "notes.txt", "000000000.npy", "features.npy"}
    assert contents(rows.path).keys() == before | left


def test_check_names_what_repair_removes_and_extraction_makes_anew(tmp_path, capsys):
    rows, other = filled(tmp_path), filled(tmp_path, META | {"seed": 1})
    before = contents(rows.path), contents(other.path)
    assert stored.check(tmp_path) == (2, [])
    with pytest.raises(SystemExit, match="stored: .*typo is no folder"):
        stored.main(["check", "--root", str(tmp_path / "typo")])
    shard, meta = next(rows.path.glob(f"{SHARD:09d}-*")), other.path / "meta.json"
    flip_data(shard, rows, tmp_path)
    meta.write_text(
        meta.read_text().replace('"seed": 1', '"seed": 2')
    )  # valid JSON that describes other rows
    with pytest.raises(SystemExit) as info:
        stored.main(["check", "--root", str(tmp_path)])
    assert info.value.code == 1
    said = capsys.readouterr().out
    assert f"{shard} is truncated, altered or foreign\n" in said
    assert f"{meta} is truncated, altered or foreign\n" in said
    assert contents(rows.path).keys() == before[0].keys()  # check changes nothing
    stored.main(["repair", "--root", str(tmp_path)])
    assert f"{shard} is truncated, altered or foreign; removed" in capsys.readouterr().out
    stored.main(["check", "--root", str(tmp_path)])
    assert (
        capsys.readouterr().out == "1 entries, 0 bad files\n"
    )  # the other entry says no more what it holds
    assert open_entry(META, N, WIDTH, tmp_path).missing() == [(SHARD, 2 * SHARD)]
    for again, files in (
        (filled(tmp_path), before[0]),
        (filled(tmp_path, META | {"seed": 1}), before[1]),
    ):
        assert contents(again.path) == files and np.array_equal(again.read(), features())


# --- ranges of one key


def test_ranges_are_written_beside_each_other_and_by_two_processes(tmp_path):
    """What separate jobs of one extraction do: each locks and fills its own rows, and nothing is
    left to be merged.
    """
    first, second = (open_entry(META, N, WIDTH, tmp_path) for _ in range(2))
    cut = 2 * SHARD
    with first.lock(0, cut), second.lock(cut, N):
        torn = second.path / f"{cut:09d}-{'0' * 16}.npy.1.tmp"
        first.write(0, features()[:cut])
        torn.write_text("in the making")
        assert first.missing(0, cut) == [] and second.missing(cut) == [(cut, N)] == first.missing()
        with open_entry(META, N, WIDTH, tmp_path).lock(cut - SHARD, cut):
            assert torn.exists()  # another range's
        second.write(cut, features()[cut:])
    with second.lock(cut, N):
        assert not torn.exists()
    assert contents(first.path) == contents(filled(tmp_path / "whole").path)


def test_a_range_waits_for_the_same_range_and_the_whole_for_all(tmp_path):
    rows = open_entry(META, N, WIDTH, tmp_path)

    def locked(*part) -> bool:
        with open_entry(META, N, WIDTH, tmp_path).lock(*part):
            return True

    with ThreadPoolExecutor(3) as pool:
        with rows.lock(SHARD, 2 * SHARD):
            waiting = [pool.submit(locked, SHARD, 2 * SHARD), pool.submit(locked)]
            time.sleep(0.1)
            assert not any(one.done() for one in waiting)
        assert all(one.result(timeout=10) for one in waiting)
        with rows.lock():
            waiting = pool.submit(locked, SHARD, 2 * SHARD)
            time.sleep(0.1)
            assert not waiting.done()
        assert waiting.result(timeout=10)


@pytest.mark.parametrize("part", [(1, SHARD), (0, 5), (SHARD, 0), (0, N + SHARD), (-SHARD, SHARD)])
def test_ranges_are_whole_files(tmp_path, part):
    rows = open_entry(META, N, WIDTH, tmp_path)
    with (
        pytest.raises(ValueError, match=f"no whole files of {SHARD} rows in 0 to {N}"),
        rows.lock(*part),
    ):
        pass
    with pytest.raises(ValueError, match="no whole files"):
        rows.missing(*part)


def test_rows_outside_the_locked_range_are_refused(tmp_path):
    rows = open_entry(META, N, WIDTH, tmp_path)
    with (
        rows.lock(SHARD, 2 * SHARD),
        pytest.raises(ValueError, match=f"locked {SHARD} to {2 * SHARD}"),
    ):
        rows.write(0, features())
    assert not rows.path.exists()


# --- kills and races


def check_after_kill(rows: store.Entry, undisturbed: dict[str, bytes]) -> None:
    """What a killed writer leaves: temporary files and whole shards, byte for byte those of an
    undisturbed run.
    """
    for name, data in (contents(rows.path) if rows.path.is_dir() else {}).items():
        assert name.endswith(".tmp") or data == undisturbed[name]


def resume(tmp_path: Path, log: Path, undisturbed: dict[str, bytes]) -> None:
    rows = open_entry(META, N, WIDTH, tmp_path / "store")
    todo = rows.missing()
    log.write_text("")
    assert start_worker(tmp_path / "store", log, 0).wait(60) == 0
    expected = np.zeros(N, int)
    for start, stop in todo:
        expected[start:stop] = 1
    assert np.array_equal(computed(log), expected)  # nothing recomputed but what was not on disk
    assert contents(rows.path) == undisturbed  # temporary files are gone, too
    assert np.array_equal(rows.read(), features())


@pytest.mark.parametrize(
    "function, nth",
    [
        ("fsync", 1),
        ("fsync", 2),
        ("replace", 1),
        ("replace", 2),
        ("replace", 4),
        ("fsync", 7),
        ("replace", 7),
    ],
)
def test_kill_at_every_stage_of_a_write(tmp_path, function, nth):
    """Before the temporary file is safe, and before its rename: of meta.json (1), a shard, the
    ragged last one (7).
    """
    undisturbed = contents(filled(tmp_path / "undisturbed").path)
    worker = start_worker(tmp_path / "store", tmp_path / "log", 0, function, nth)
    assert worker.wait(60) == -signal.SIGKILL
    rows = open_entry(META, N, WIDTH, tmp_path / "store")
    assert len(list(rows.path.glob("*.tmp"))) == 1
    assert sum(stop - start for start, stop in rows.missing()) == N - SHARD * max(0, nth - 2)
    check_after_kill(rows, undisturbed)
    resume(tmp_path, tmp_path / "log", undisturbed)


def kill_at_random(tmp_path: Path, kills: int, seed: int) -> None:
    undisturbed = contents(filled(tmp_path / "undisturbed").path)
    rng = random.Random(seed)
    rows, ends = open_entry(META, N, WIDTH, tmp_path / "store"), []
    for _ in range(kills):
        worker = start_worker(tmp_path / "store", tmp_path / "log", 0.01)
        worker.stdout.readline()
        time.sleep(rng.uniform(0, 0.2 / kills))  # an undisturbed run takes at least 0.27 s
        worker.kill()
        ends.append(worker.wait(60))
        check_after_kill(rows, undisturbed)
    assert ends[0] == -signal.SIGKILL
    resume(tmp_path, tmp_path / "log", undisturbed)


@pytest.mark.parametrize("seed", range(2))
def test_kill_at_random_points_and_resume(tmp_path, seed):
    kill_at_random(tmp_path, kills=3, seed=seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 120))
def test_kill_at_random_points_and_resume_twenty_times(tmp_path, seed):
    kill_at_random(tmp_path, kills=4, seed=seed)


def test_two_processes_compute_each_row_once(tmp_path):
    workers = [start_worker(tmp_path / "store", tmp_path / "log", 0.005) for _ in range(2)]
    assert [worker.wait(60) for worker in workers] == [0, 0]
    assert np.array_equal(computed(tmp_path / "log"), np.ones(N, int))
    assert np.array_equal(open_entry(META, N, WIDTH, tmp_path / "store").read(), features())


def test_second_takes_over_when_the_first_is_killed(tmp_path, caplog):
    rows = open_entry(META, N, WIDTH, tmp_path / "store")
    worker = start_worker(tmp_path / "store", tmp_path / "log", 0.05)
    while rows.missing()[0][0] < SHARD:  # the worker has the lock and has finished a shard
        assert worker.poll() is None
        time.sleep(0.01)
    with ThreadPoolExecutor(1) as pool:

        def take_over() -> list[tuple[int, int]]:
            with rows.lock():
                return rows.missing()

        waiting = pool.submit(take_over)
        time.sleep(0.1)
        assert not waiting.done()
        worker.kill()
        worker.wait(60)
        assert waiting.result(timeout=10)[-1][1] == N
    assert f"waiting for process {worker.pid} on {os.uname().nodename}" in caplog.text


def test_readers_beside_a_writer(tmp_path):
    """Readers see an incomplete store or the finished one, never a torn one."""
    worker = start_worker(tmp_path / "store", tmp_path / "log", 0.005)

    def read_until_complete(_: int) -> int:
        refused = 0
        while True:
            try:
                assert np.array_equal(
                    open_entry(META, N, WIDTH, tmp_path / "store").read(), features()
                )
                return refused
            except LookupError:
                refused += 1
                assert worker.poll() in (None, 0)
                time.sleep(0.005)

    with ThreadPoolExecutor(4) as pool:
        refused = list(pool.map(read_until_complete, range(4)))
    assert worker.wait(60) == 0 and max(refused) > 0


# --- disks


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_full_disk_keeps_finished_shards(tmp_path, monkeypatch, function):
    rows = open_entry(META, N, WIDTH, tmp_path)
    real, calls = getattr(os, function), 0

    def full(*args):
        nonlocal calls
        calls += 1
        if calls > 3:  # meta.json and two shards
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args)

    monkeypatch.setattr(os, function, full)
    with (
        pytest.raises(
            OSError, match=f"cannot write features into {rows.path}: No space left"
        ) as info,
        rows.lock(),
    ):
        rows.write(0, features())
    assert info.value.errno == errno.ENOSPC and "\n" not in str(info.value)
    monkeypatch.undo()
    assert rows.missing() == [(2 * SHARD, N)] and not list(rows.path.glob("*.tmp"))
    with rows.lock():
        rows.write(2 * SHARD, features()[2 * SHARD :])
    assert np.array_equal(rows.read(), features())


@pytest.mark.parametrize("room", [0, 100, 30_000])
def test_a_limit_on_file_sizes_fails_as_a_full_disk_does(tmp_path, room):
    """What needs no mount: the kernel refuses to write past RLIMIT_FSIZE, in meta.json already or
    in a shard.
    """
    script = f"""
import errno, json, resource, signal, sys
import numpy as np
from pathlib import Path
from fungi_core.store import open_entry
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)   # else the kernel's signal ends the process
# two shards of 64 kB, one of 22 kB
values = np.sin(np.arange(600 * 64)).reshape(600, 64).astype(np.float32)
rows = open_entry({{}}, 600, 64, Path({str(tmp_path)!r}))
resource.setrlimit(resource.RLIMIT_FSIZE, ({room}, resource.RLIM_INFINITY))
try:
    with rows.lock():
        rows.write(512, values[512:])
        rows.write(0, values[:512])
    sys.exit("the limit was not met")
except OSError as err:
    assert err.errno == errno.EFBIG and str(rows.path) in str(err) and "\\n" not in str(err), err
left = rows.missing()
assert left == ([(0, 512)] if {room} == 30_000 else [(0, 600)]), left
assert not list(Path({str(tmp_path)!r}).rglob("*.tmp"))
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
with rows.lock():
    for start, stop in rows.missing():
        rows.write(start, values[start:stop])
assert np.array_equal(rows.read(), values)
print("passed")
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=paths.ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "passed\n", done.stderr


SMALL_DISK = """
import errno, os, subprocess, sys
from pathlib import Path
import numpy as np
from fungi_core.store import SHARD, open_entry
disk = Path(sys.argv[1])
values = np.sin(np.arange(2000 * 64)).reshape(2000, 64).astype(np.float32)   # eight shards of 64 kB
(disk / "filler").write_bytes(bytes(250_000))
rows = open_entry({}, 2000, 64, disk)
try:
    with rows.lock():
        rows.write(0, values)
    sys.exit("the disk did not fill up")
except OSError as err:
    assert err.errno == errno.ENOSPC and str(rows.path) in str(err), err
(start, stop), = rows.missing()
assert stop == 2000 and 0 < start < 2000 and not list(rows.path.glob("*.tmp")), (start, stop)
assert rows.drop_corrupt() == []
(disk / "filler").unlink()
with rows.lock():
    rows.write(start, values[start:])
subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
again = open_entry({}, 2000, 64, disk)
assert again.complete and np.array_equal(again.read(), values)
other = open_entry({"seed": 1}, 2000, 64, disk)
try:
    with other.lock():
        sys.exit("locked on a read-only disk")
except OSError as err:
    assert err.errno == errno.EROFS and str(disk) in str(err), err
print("passed")
"""


def test_full_and_read_only_tmpfs(tmp_path):
    """A real small disk, in a mount namespace of its own: full, then freed, then read-only."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = 'mount -t tmpfs -o size=600k tmpfs "$2" || exit 77; exec "$0" -c "$1" "$2"'
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mounted]
    command += [sys.executable, SMALL_DISK, str(disk)]
    if not shutil.which("unshare"):
        pytest.skip("needs unshare (util-linux)")
    done = subprocess.run(command, cwd=paths.ROOT, capture_output=True, text=True, timeout=120)
    if done.returncode == 77 or "unshare failed" in done.stderr:
        pytest.skip(f"cannot mount a tmpfs here: {done.stderr.strip()}")
    assert done.stdout == "passed\n", done.stderr


def test_read_only_store_can_be_read(tmp_path, monkeypatch):
    """chmod does not bind root, so every call that would change the disk fails here."""
    rows = filled(tmp_path)

    def refuse(*args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(args[0]))

    def read_only(file, mode="r", *args, real=builtins.open, **kwargs):
        return (real if mode in ("r", "rb") else refuse)(file, mode, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", read_only)
    for name in ("mkdir", "replace", "rename", "unlink", "truncate"):
        monkeypatch.setattr(os, name, refuse)
    again = open_entry(META, N, WIDTH, tmp_path)
    assert (
        again.complete
        and np.array_equal(again.read(), features())
        and entries(tmp_path)[0]["done"] == N
    )
    with pytest.raises(OSError, match=f"Read-only file system.*{rows.key}"), rows.lock():
        pass


# --- scale


def test_a_million_rows_open_in_under_a_second(tmp_path):
    n = 1_000_000
    rows = open_entry(META, n, 768, tmp_path)
    rows.path.mkdir()
    (rows.path / "meta.json").write_text(json.dumps(rows.record))
    for start in range(0, n, SHARD):
        if start != 500 * SHARD:
            (rows.path / f"{start:09d}-{'0' * 16}.npy").touch()
    since = time.perf_counter()
    again = open_entry(META, n, 768, tmp_path)
    assert again.missing() == [(500 * SHARD, 501 * SHARD)] and not again.complete
    assert time.perf_counter() - since < 1
