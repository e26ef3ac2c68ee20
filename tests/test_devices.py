"""Jobs side by side take different GPUs, named by an nvidia-smi of ours; no card is needed."""

import os
import subprocess
import sys

import pytest

from companion import devices, paths

CLAIM = """
import os, sys
from companion import devices
print(devices.claim(), os.environ.get("CUDA_VISIBLE_DEVICES"), flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine with two GPUs, one of them cut into two instances."""
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text(
        "#!/bin/sh\necho 'GPU 0: A (UUID: a)'\necho '  MIG 1g (UUID: m)'\n"
        "echo 'GPU 1: A (UUID: b)'\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("FUNGI_STORE", str(tmp_path / "store"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return tmp_path


def start(**env) -> subprocess.Popen:
    command, pipe = [sys.executable, "-c", CLAIM], subprocess.PIPE
    env = os.environ | env
    return subprocess.Popen(command, cwd=paths.ROOT, env=env, text=True, stdin=pipe, stdout=pipe)


def test_processes_take_different_devices_and_a_killed_one_frees_its_own(machine):
    one = start()
    assert one.stdout.readline() == "0 0\n"
    two = start()
    assert two.stdout.readline() == "1 1\n"
    three = start()  # more jobs than devices: one is shared
    assert three.stdout.readline() in ("0 0\n", "1 1\n")
    one.kill()
    one.wait()
    four = start()
    assert four.stdout.readline() == "0 0\n"
    for process in (two, three, four):
        process.communicate("\n")


def test_only_devices_that_are_visible(machine):
    both = [start(CUDA_VISIBLE_DEVICES="2,5") for _ in range(2)]
    assert sorted(process.stdout.readline() for process in both) == ["2 2\n", "5 5\n"]
    for process in both:
        process.communicate("\n")


@pytest.mark.parametrize("given", ["", "3", "GPU-6b3d"])
def test_what_a_scheduler_chose_stays(machine, monkeypatch, given):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    assert devices.claim() is None and os.environ["CUDA_VISIBLE_DEVICES"] == given
    assert not (machine / "store").exists()


def test_without_a_gpu_nothing_is_done(machine, monkeypatch):
    monkeypatch.setenv("PATH", str(machine))
    assert devices.visible() == [] and devices.claim() is None


def test_threads_that_wait_sleep_unless_the_user_says_otherwise():
    """Spinning ones take a busy machine's cores from each other; see `companion`."""
    code = "import companion, os; print(os.environ['OMP_WAIT_POLICY'])"
    for asked, expected in (({}, "passive"), ({"OMP_WAIT_POLICY": "active"}, "active")):
        env = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"} | asked
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
        assert done.stdout.strip() == expected, done.stderr
