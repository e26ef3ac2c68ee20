"""Tests leave the committed figures and the user's store alone, and use few threads."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "2")  # before torch is imported: machines are shared

import torch

# The same examples in every run, no limit of time on a busy machine, no folder of past failures.
settings.register_profile("fixed", derandomize=True, deadline=None, database=None, max_examples=60)
settings.load_profile("fixed")

if not torch.cuda.is_available():  # read when a kernel is defined: before fungi_core is imported
    os.environ["TRITON_INTERPRET"] = "1"

# Processes that tests start find both packages of this checkout, whatever is installed.
ROOT = Path(__file__).resolve().parents[1]
FOUND = [str(ROOT), str(ROOT / "notebooks"), os.environ.get("PYTHONPATH", "")]
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, FOUND))


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_collection_modifyitems(config, items):
    skipped = {} if config.getoption("--slow") else {"slow": "slow: run with --slow"}
    if not torch.cuda.is_available():
        skipped["cuda"] = "no CUDA device"
    for item in items:
        for mark, reason in skipped.items():
            if item.get_closest_marker(mark):  # keywords hold the names of files and functions too
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session", autouse=True)
def scratch_folders(tmp_path_factory):
    """Point FUNGI_STORE and FUNGI_FIGURES to folders of this run, unless the caller has set them.

    The Makefile does: into build/test, which it empties first.
    """
    with pytest.MonkeyPatch.context() as patch:
        for variable in ("FUNGI_STORE", "FUNGI_FIGURES"):
            if not os.environ.get(variable, "").strip():
                patch.setenv(variable, str(tmp_path_factory.mktemp(variable.lower())))
        yield


@pytest.fixture(scope="session")
def fresh_checkout(tmp_path_factory) -> Path:
    """Return a folder of links to this checkout without what a run leaves in it.

    Plans depend on the jobs done already; made in there, they are those of a fresh clone.
    """
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("Snakefile", "fungi_core", "notebooks", "requirements.lock"):
        (folder / name).symlink_to(ROOT / name)
    return folder
