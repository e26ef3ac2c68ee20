"""Tests leave the committed figures and the user's feature store alone, and use few threads."""

import os

import pytest
from hypothesis import settings

os.environ.setdefault(
    "OMP_NUM_THREADS", "2"
)  # before torch is imported; a shared machine is not ours alone

import torch

# The same examples in every run, no limit of time on a busy machine, no folder of past failures.
settings.register_profile("fixed", derandomize=True, deadline=None, database=None, max_examples=60)
settings.load_profile("fixed")

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = (
        "1"  # read when a kernel is defined: before the first import of fungi_core
    )


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))
    for item in items if not torch.cuda.is_available() else ():
        if "cuda" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session", autouse=True)
def scratch_folders(tmp_path_factory):
    """FUNGI_STORE and FUNGI_FIGURES point to a temporary folder unless the caller has set them (the
    Makefile does).
    """
    with pytest.MonkeyPatch.context() as patch:
        for variable in ("FUNGI_STORE", "FUNGI_FIGURES"):
            if not os.environ.get(variable, "").strip():
                patch.setenv(variable, str(tmp_path_factory.mktemp(variable.lower())))
        yield
