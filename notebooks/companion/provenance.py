"""Where a result comes from: notebook, parameters, features, data, commit, versions and machine."""

import json
import os
import platform
import re
import subprocess
import time
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path, PurePath

import numpy as np
import torch

from companion import paths

PACKAGES = ("torch", "timm", "numpy", "scikit-learn", "matplotlib", "fungi_core")


def record(
    notebook: str,
    parameters: Mapping,
    *,
    seed: int,
    stores: Iterable = (),
    datasets: Iterable = (),
    started: float | None = None,
) -> dict:
    """Return where a figure or table comes from, as a dict that JSON can hold.

    `stores` are store keys, or rows with a `key`; `datasets` have a `name`, `split`, `fingerprint`,
    `note` and length; `started` is `time.time()` at the notebook's start. "dirty" tells whether the
    working tree, figures apart, differs from the commit; both are None outside a git checkout.
    Raises TypeError for a parameter that JSON cannot hold.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    found = {
        "notebook": notebook,
        "parameters": dict(parameters),
        "seed": seed,
        "stores": [getattr(store, "key", store) for store in stores],
        "datasets": [
            {"name": d.name, "split": d.split, "n": len(d), "fingerprint": d.fingerprint}
            | {"note": d.note}
            for d in datasets
        ],
        **_commit(),
        "versions": {"python": platform.python_version()} | {p: _version(p) for p in PACKAGES},
        "device": {"cpu": _cpu(), "cores": cores, "cuda": cuda},
        "wall_seconds": None if started is None else round(time.time() - started, 1),
    }
    return json.loads(json.dumps(found, default=_plain, allow_nan=False))


def _plain(value) -> object:
    """Return a value of numpy or a path as JSON's nearest type."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, PurePath):
        return str(value)
    raise TypeError(f"provenance holds a {type(value).__name__}, which JSON cannot: {value!r}")


def _commit() -> dict:
    command = ["git", "status", "--porcelain=v2", "--branch", "--", ".", ":!figures"]
    try:
        done = subprocess.run(command, cwd=paths.ROOT, capture_output=True, text=True)
    except FileNotFoundError:  # no git on this machine
        return {"commit": None, "dirty": None}
    if done.returncode:  # no checkout: an unpacked archive or an installed package
        return {"commit": None, "dirty": None}
    # Before the first commit git writes "(initial)".
    head = re.search(r"^# branch.oid ([0-9a-f]+)$", done.stdout, re.MULTILINE)
    changed = any(not line.startswith("#") for line in done.stdout.splitlines())
    return {"commit": head and head[1], "dirty": changed}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return model[1] if model else platform.processor() or platform.machine()
