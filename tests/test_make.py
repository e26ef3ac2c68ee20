"""The Makefile in a checkout whose path has a space, with programs that only say how they were
called.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from companion.paths import ROOT

LAST = ("19_scoreboard", "00_start_here")
PROGRAMS = ("python", "snakemake", "ruff", "nbstripout", "jupyter")
TESTS = "[python][-m][pytest][-q][-rs][--numprocesses][auto][--maxprocesses][8][--dist][loadfile]"
RECORD = """#!/bin/sh
for word in "$0" "$@"; do printf '[%s]' "${word##*.venv/bin/}"; done
printf ' %s|%s|%s\\n' "$FUNGI_DATA" "$FUNGI_STORE" "$FUNGI_FIGURES"
"""


@pytest.fixture
def checkout(tmp_path) -> Path:
    folder = tmp_path / "my project"
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / "build" / "test" / "store").mkdir(parents=True)
    (folder / "notebooks").mkdir()
    for name in ("Makefile", "pyproject.toml", "requirements.lock"):
        shutil.copy(ROOT / name, folder)
    shutil.copy(ROOT / "notebooks" / "pyproject.toml", folder / "notebooks")
    for name in PROGRAMS:
        (folder / ".venv" / "bin" / name).write_text(RECORD)
        (folder / ".venv" / "bin" / name).chmod(0o755)
    (folder / ".venv" / ".installed").touch()
    return folder


def make(folder: Path, *arguments: str, fails: bool = False) -> list[str]:
    inherited = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")  # of the `make test` that runs this test
    env = {name: value for name, value in os.environ.items() if name not in inherited}
    env |= dict.fromkeys(("FUNGI_DATA", "FUNGI_STORE", "FUNGI_FIGURES"), "")
    done = subprocess.run(["make", *arguments], cwd=folder, env=env, capture_output=True, text=True)
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done.stdout.splitlines()


def test_tests_write_below_the_checkout_and_begin_with_nothing(checkout, tmp_path):
    said = make(checkout, "test")
    scratch = checkout / "build" / "test"
    for what in ("[tests]", "[--nbval-lax][notebooks]"):
        assert f"{TESTS}{what} |{scratch}/store|{scratch}/figures" in said
    assert not scratch.exists() and os.listdir(tmp_path) == ["my project"]


@pytest.mark.parametrize("named", ["my data", "../my data", "{}/my data"])
def test_lite_takes_a_folder_with_a_space_from_anywhere(checkout, tmp_path, named):
    for folder in (checkout, tmp_path):
        (folder / "my data").mkdir()
    expected = checkout / named.format(tmp_path)
    said = make(checkout, "lite", f"DATA={named.format(tmp_path)}", "CORES=2", "GPUS=1")
    batch = (
        "[snakemake][--cores][2][--resources][gpu=1][--keep-going][--rerun-incomplete][--nolock]"
    )
    batch += f"[--quiet][all][--config][profile=lite] {expected.resolve()}||"
    assert batch in said
    assert "[python][-m][companion.paper] ||" in said  # the gallery's page


def test_after_a_failed_notebook_the_scoreboard_shows_what_there_is(checkout):
    snakemake = checkout / ".venv" / "bin" / "snakemake"
    snakemake.write_text(RECORD + "mkdir -p runs/mini && exit 1\n")
    _, *last = make(checkout, "reproduce", fails=True)
    shown = [f"[python][-m][companion.run][{slug}][--profile][mini]" for slug in LAST]
    assert [line.partition(" ")[0] for line in last] == shown
    _, *last = make(checkout, "reproduce", "PROFILE=typo", fails=True)
    assert last == []  # nothing was begun


def test_plan_lists_what_would_run_and_the_whole_profile(checkout):
    said = make(checkout, "plan", "PROFILE=paper")
    assert any(line.startswith("[snakemake]") and "[profile=paper]" in line for line in said)
    assert "[python][-m][companion.plan][paper] ||" in said


def test_check_leaves_out_what_runs_batches_and_whole_notebooks(checkout):
    said = make(checkout, "check")
    assert "[ruff][check][.] ||" in said and "[ruff][format][--check][.] ||" in said
    assert f"{TESTS}[-m][not contract and not batch][tests] ||" in said
