"""Where a number comes from: parameters, stores, data, commit, versions and machine."""

import os
import platform
import re
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path

from companion import paths

PACKAGES = ("torch", "timm", "numpy", "scikit-learn", "matplotlib", "fungi_core")


def provenance(
    notebook: str,
    parameters: Mapping,
    *,
    stores: Sequence[str] = (),
    datasets: Iterable = (),
    started: float | None = None,
    code: Mapping | None = None,
) -> dict:
    """Return where a figure comes from, as a dict that JSON can hold.

    ``parameters``: the notebook's, "seed" among them; ``stores``: keys of the store; ``datasets``:
    data sets as `companion.data` loads them; ``started``: ``time.time()`` at the notebook's start;
    ``code``: what `git` says of the code that runs, by default what it says now. "dirty" tells
    whether the working tree, figures apart, differs from the commit; both are None outside a git
    checkout.
    """
    import torch  # here, so that plotting alone does not wait for it

    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "notebook": notebook,
        "parameters": dict(parameters),
        "seed": parameters["seed"],
        "stores": list(stores),
        "datasets": [
            dict(name=d.name, split=d.split, n=len(d), fingerprint=d.fingerprint, note=d.note)
            for d in datasets
        ],
        **(git() if code is None else code),
        "versions": {"python": platform.python_version()} | {p: version(p) for p in PACKAGES},
        "device": {"cpu": cpu(), "cores": cores, "cuda": cuda},
        "wall_seconds": None if started is None else round(time.time() - started, 1),
    }


def git() -> dict:
    """Return the checkout's commit, and whether anything but figures differs from it."""
    nowhere = {"commit": None, "dirty": None}  # an unpacked archive, or an installed package
    if not (paths.ROOT / ".git").exists():  # git would ask a checkout around it
        return nowhere
    command = ["git", "status", "--porcelain=v2", "--branch", "--", ".", ":!figures"]
    try:
        done = subprocess.run(command, cwd=paths.ROOT, capture_output=True, text=True, check=True)
    except (FileNotFoundError, subprocess.CalledProcessError):  # no git on this machine
        return nowhere
    # It says "(initial)" before the first commit.
    head = re.search(r"^# branch.oid ([0-9a-f]+)$", done.stdout, re.MULTILINE)
    dirty = any(not line.startswith("#") for line in done.stdout.splitlines())
    return {"commit": head and head[1], "dirty": dirty}


def version(package: str) -> str | None:
    """Return the version of an installed package, None where it is not there."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def cpu() -> str:
    """Return the processor's name."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return model[1] if model else platform.processor() or platform.machine()
