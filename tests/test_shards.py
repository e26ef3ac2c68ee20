"""One extraction as several jobs: the bytes of a single run, in any order and after a kill."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import entries

from companion import features, paths
from fungi_core.extract import shard_rows
from fungi_core.store import SHARD

NAME = "random:test_vit"
ROWS = ["--n-train", "1000", "--n-test", "8"]  # four files of the store, the last one ragged; one
FEATURES = ["embedding", "kl", "simclr"]
# Imports once, then forks for every job: reads a list of [store, kill, arguments ...], runs them at
# the same time, each the command with the small network, and answers with [status, output] of each.
# A job may be killed at the n-th file that it renames.
JOBS = """
import json, os, signal, sys
import torch
from companion import features
from companion.encoders import objectives
from fungi_core import KL, SimCLR, load
from fungi_core.views import Patches
features.load = lambda name: load(name, arguments={"img_size": 32}, device="cpu", dtype="float32")
objectives.PAPER["image"] = (KL(), SimCLR(Patches(stride=2), dim=16, negatives=3))
rename = os.replace

def run(root, kill, arguments, out):
    os.environ["FUNGI_STORE"] = root
    os.dup2(out, 1), os.dup2(out, 2)
    def deadly(*names):
        nonlocal kill
        kill -= 1
        if kill == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(*names)
    os.replace = deadly
    torch.set_num_threads(1)
    features.main(arguments)

for line in sys.stdin:
    children = []
    for number, (root, kill, *arguments) in enumerate(json.loads(line)):
        file = f"{root}.{number}.log"
        out = os.open(file, os.O_CREAT | os.O_TRUNC | os.O_RDWR)
        if not (pid := os.fork()):
            try:
                run(root, kill, arguments, out)
            except SystemExit as error:
                os.write(2, f"{error}".encode())
                os._exit(1)
            sys.stdout.flush()
            os._exit(0)
        children.append((pid, file))
    statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid, _ in children]
    done = [[status, open(file).read()] for status, (_, file) in zip(statuses, children)]
    print(json.dumps(done), flush=True)
"""


@pytest.fixture(scope="module")
def ended():
    """jobs at the same time, as (store, killed at which file, arguments ...) -> [status, output] of
    each.
    """
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    command = [sys.executable, "-c", JOBS]
    with subprocess.Popen(command, cwd=paths.ROOT, env=env, **pipes) as server:

        def ask(*jobs):
            every = [NAME, "digits", *FEATURES, *ROWS]
            wanted = [[str(root), kill, *every, *rest] for root, kill, *rest in jobs]
            print(json.dumps(wanted), file=server.stdin, flush=True)
            return json.loads(server.stdout.readline())

        yield ask
        server.stdin.close()


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*.*"))
        if p.suffix != ".lock"
    }


def test_shards_are_whole_files_even_and_nothing_is_left_out():
    for n in (0, 1, 256, 257, 1000, 1_281_167):
        for count in (1, 2, 3, 4, 7, 26):
            parts = [shard_rows(n, i, count) for i in range(1, count + 1)]
            assert [start for start, _ in parts[1:]] == [stop for _, stop in parts[:-1]]
            assert (parts[0][0], parts[-1][1]) == (0, n) and all(
                start % SHARD == 0 or start == n for start, _ in parts
            )
            sizes = [-(-(stop - start) // SHARD) for start, stop in parts]
            assert max(sizes) - min(sizes) <= 1
    assert [shard_rows(1000, i, 4) for i in (1, 2, 3, 4)] == [
        (0, 256),
        (256, 512),
        (512, 768),
        (768, 1000),
    ]
    for i, count in ((0, 4), (5, 4)):
        with pytest.raises(ValueError, match=f"shard {i}/4: shards are counted from 1/4 to 4/4"):
            shard_rows(1000, i, count)


@pytest.mark.parametrize("text", ["0/4", "5/4", "1", "a/b", "1/0", "-1/2", "1/2/3"])
def test_a_wrong_shard_is_one_line(text, capsys):
    with pytest.raises(SystemExit):
        features.main([NAME, "digits", "kl", f"--shard={text}"])
    assert f"'{text}' is no part I/N, such as 2/8" in capsys.readouterr().err


def test_four_shards_in_any_order_two_at_once_one_killed_are_the_bytes_of_one_run(tmp_path, ended):
    """Negatives too: drawn by whichever job comes first, and the same."""
    names = "embedding, kl, simclr"
    rows = f"1000 train rows and 8 test rows of {names}"
    all_rows = [0, f"digits {NAME}: {rows} in the store\n"]
    assert ended((tmp_path / "one", 0)) == [all_rows]

    root, shard = tmp_path / "four", lambda i: f"--shard={i}/4"
    ((status, text),) = ended((root, 0, shard(4)))
    assert status == 0
    rows = f"train rows 768 to 1000 of 1000 and test rows 0 to 8 of 8 of {names}"
    assert text == f"digits {NAME}: {rows} in the store\n"
    assert [status for status, _ in ended((root, 0, shard(3)), (root, 0, shard(1)))] == [0, 0]
    # SimCLR's trunk is whole already, for negatives need it. Embedding, KL and its trunk are
    # stored, SimCLR's gradients are about to be.
    ((status, _),) = ended((root, 4, shard(2)))
    assert status == -signal.SIGKILL and len(list(root.glob("*/*.tmp"))) == 1
    lacking = {e["meta"]["feature"] for e in entries(root) if e["done"] < e["n"]}
    assert lacking == {"simclr"}
    assert sorted(e["n"] - e["done"] for e in entries(root)) == [0] * 10 + [SHARD]
    assert ended((root, 0, shard(2)))[0][0] == 0
    assert contents(root) == contents(tmp_path / "one")
    assert ended((root, 0)) == [all_rows]  # the final check
    assert contents(root) == contents(tmp_path / "one")


def test_shards_that_all_start_at_once_are_the_bytes_of_one_run(tmp_path, ended):
    ended((tmp_path / "one", 0))
    found = ended(*((tmp_path / "many", 0, f"--shard={i}/4") for i in (1, 2, 3, 4)))
    assert [status for status, _ in found] == [0] * 4
    assert contents(tmp_path / "many") == contents(tmp_path / "one")


def test_the_last_job_fills_what_is_left_and_refuses_a_torn_file(tmp_path, ended):
    root = tmp_path / "store"
    assert [ended((root, 0, *part))[0][0] for part in (["--shard=1/2"], [])] == [0, 0]
    assert all(entry["done"] == entry["n"] for entry in entries(root))
    large = [entry for entry in entries(root) if entry["n"] > SHARD]
    (kl,) = (entry["key"] for entry in large if entry["meta"]["feature"] == "kl")
    torn = next(root.glob(f"{kl}/{SHARD:09d}-*.npy"))
    torn.write_bytes(torn.read_bytes()[:-1])
    ((status, text),) = ended((root, 0))
    assert status == 1 and torn.name in text and "Traceback" not in text
