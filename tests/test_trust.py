"""Whom the code trusts: no pickle, checked downloads, archives that stay in their folder, no
network in `mini`, nothing written but the store, figures/ and runs/.
"""

import ast
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from companion import paths
from companion.data import datasets, packed
from companion.encoders import checkpoints

PYTHON = [
    path
    for pattern in (
        "fungi_core/*.py",
        "notebooks/companion/**/*.py",
        "benchmarks/*.py",
        "data/*.py",
        "data/backbones/*.py",
        "data/texts/*.py",
    )
    for path in sorted(paths.ROOT.glob(pattern))
    if ".ipynb_checkpoints" not in path.parts
]


# --- code that loads code


def calls(tree: ast.AST):
    """(dotted name, call) of every call in a module, by the names that things come from."""
    real = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            real |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
        elif isinstance(node, ast.Import):
            real |= {a.asname: a.name for a in node.names if a.asname}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            first, dot, rest = ast.unparse(node.func).partition(".")
            yield f"{real.get(first, first)}{dot}{rest}", node


# Modules that run what they read, and functions that run what they are given.
RISKY_MODULES = ("pickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "runpy")
RISKY_CALLS = ("eval", "exec", "builtins.eval", "builtins.exec", "os.system", "os.popen",
               "subprocess.getoutput", "subprocess.getstatusoutput", "torch.hub.load")  # fmt: skip


def wrongs(source: str) -> list[str]:
    """What in a module could run code that a file brings along."""
    tree, out = ast.parse(source), []
    keyword = lambda call, name: next(
        (ast.unparse(k.value) for k in call.keywords if k.arg == name), None
    )
    for name, call in calls(tree):
        last = name.rpartition(".")[2]
        if (
            name in ("torch.load", "torch.hub.load_state_dict_from_url")
            and keyword(call, "weights_only") != "True"
        ):
            out.append(f"{name} without weights_only=True")
        if keyword(call, "allow_pickle") not in (None, "False"):
            out.append(f"{name} with allow_pickle")
        if name.startswith("yaml.") and last in ("load", "unsafe_load", "full_load"):
            out.append(name)
        if name in RISKY_CALLS or keyword(call, "shell") == "True":
            out.append(name)
        given = [ast.unparse(one).strip("'\"") for one in call.args]
        if last in ("import_module", "__import__") and given[0].split(".")[0] in RISKY_MODULES:
            out.append(f"{name} of {given[0]}")
        if last == "read_array" and len(given) > 1 and given[1] != "False":
            out.append(f"{name} with allow_pickle")
        if keyword(call, "trust_remote_code") not in (None, "False"):
            out.append(f"{name} with trust_remote_code")
        unpacks = last == "extractall" or last == "extract" and "tarfile" in source
        zipped = "zipfile" in source and "tarfile" not in source
        if unpacks and not keyword(call, "filter") and not zipped:
            out.append(f"{name} without a filter")
    for node in ast.walk(tree):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        out += [f"import {n}" for n in names if n.split(".")[0] in RISKY_MODULES]
    return out


def test_the_search_covers_both_packages():
    found = {path.relative_to(paths.ROOT).as_posix() for path in PYTHON}
    assert {"fungi_core/backbones.py", "notebooks/companion/run.py"} <= found
    assert {"notebooks/companion/data/datasets.py", "data/licences.py"} <= found


@pytest.mark.parametrize("file", PYTHON, ids=lambda f: f.relative_to(paths.ROOT).as_posix())
def test_no_file_can_bring_code_along(file):
    found = wrongs(file.read_text())
    if (
        file.name == "landmarks.py"
    ):  # the landmarks' official ground truth is a pickle: read by an Unpickler of our own
        assert found == ["import pickle"]
        names = [name for name, _ in calls(ast.parse(file.read_text())) if "pickle" in name.lower()]
        assert names == [
            "pickle.UnpicklingError"
        ]  # ... that admits arrays only (test_retrieval), and nothing else
    else:
        assert found == []


def test_notebooks_neither():
    for file in (paths.ROOT / "notebooks").glob("*.ipynb"):
        cells = [c for c in json.loads(file.read_text())["cells"] if c["cell_type"] == "code"]
        assert [w for cell in cells for w in wrongs("".join(cell["source"]))] == [], file.name


RISKY = [
    "import torch; torch.load(f)",
    "torch.load(f, weights_only=False)",
    "np.load(f, allow_pickle=True)",
    "from joblib import load",
    "import pickle as p",
    "yaml.load(f)",
    "from torch import load; load(f, weights_only=False)",
    "import _pickle",
    "importlib.import_module('pickle')",
    "import marshal; marshal.loads(f)",
    "import runpy; runpy.run_path(f)",
    "os.popen(x)",
    "subprocess.getoutput(x)",
    "import builtins as b; b.exec(x)",
    "np.lib.format.read_array(f, True)",
    "for a, b in zip(x, y): tar.extractall(p)",
    "subprocess.run(x, shell=True)",
    "eval(x)",
    "AutoModel.from_pretrained(n, trust_remote_code=True)",
    "torch.hub.load('a', 'b')",
    "tar.extractall(p)",
    "from tarfile import open; open(f).extract(m)",
]


@pytest.mark.parametrize("source", RISKY)
def test_the_search_finds_what_it_looks_for(source):
    assert len(wrongs(source)) == 1


class Hostile:
    """A pickle that makes a file when it is read."""

    def __init__(self, file: Path):
        self.file = str(file)

    def __reduce__(self):
        return open, (self.file, "w")


def test_a_hostile_checkpoint_is_refused_in_one_line_and_runs_nothing(tmp_path):
    torch.save({"state_dict": Hostile(tmp_path / "ran")}, tmp_path / "weights.pth")
    with pytest.raises(
        ValueError, match="weights.pth does not hold the weights it should"
    ) as error:
        checkpoints.load_into(torch.nn.Linear(1, 1), tmp_path / "weights.pth", checkpoints.moco)
    assert "\n" not in str(error.value) and not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_a_hostile_cifar_is_refused_before_it_is_unpickled(name, tmp_path, monkeypatch):
    """The official batches are pickles; torchvision reads them only where their MD5 is the official
    one.
    """
    monkeypatch.setenv("FUNGI_DATA", str(tmp_path))
    from torchvision.datasets import CIFAR10, CIFAR100

    kind = {"cifar10": CIFAR10, "cifar100": CIFAR100}[name]
    folder = tmp_path / kind.base_folder
    folder.mkdir()
    for file in [*(name for name, _ in kind.train_list + kind.test_list), kind.meta["filename"]]:
        (folder / file).write_bytes(pickle.dumps(Hostile(tmp_path / "ran")))
    with pytest.raises(datasets.DatasetUnavailable, match="not found or corrupted"):
        datasets.load(name, "train")
    assert not (tmp_path / "ran").exists()


def test_a_packed_file_with_objects_is_refused(tmp_path):
    arrays = dict.fromkeys(packed.ARRAYS, np.zeros(1, np.uint8))
    arrays |= {
        "labels": np.array([Hostile(tmp_path / "ran")], object),
        "offsets": np.zeros(2, np.int64),
    }
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match="allow_pickle=False"):
        packed.npz(tmp_path / "a.npz", True)
    assert not (tmp_path / "ran").exists()


# --- a run of the mini profile: no network, and nothing written but its own

GUARD = """
import os, socket

HERE = (None, "", "127.0.0.1", "::1", "localhost", "unix", socket.gethostname())

def guarded(real, host_of):
    def call(*arguments, **more):
        host = host_of(*arguments)
        if host not in HERE:  # a kernel talks to its client over loopback
            with open(os.environ["NETWORK_LOG"], "a") as log:
                log.write(f"{host}\\n")
            raise OSError(f"no network here: {host}")
        return real(*arguments, **more)
    return call

def of_address(socket, address):
    return address[0] if isinstance(address, tuple) else "unix"

socket.socket.connect = guarded(socket.socket.connect, of_address)
socket.socket.connect_ex = guarded(socket.socket.connect_ex, of_address)
socket.getaddrinfo = guarded(socket.getaddrinfo, lambda host, *rest: host)
"""
# The command that the Snakefile gives an extraction.
EXTRACTION = re.search(r"-m ([\w.]+) \{wildcards", (paths.ROOT / "Snakefile").read_text())[1]
# What the tools write into any home: their own caches.
CACHES = (".cache/matplotlib", ".config/matplotlib", ".ipython", ".local/share/jupyter", ".jupyter")


def states(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file below a folder with its size and time."""
    found = {}
    for where, _, files in os.walk(folder):
        for name in files:
            stat = os.lstat(file := Path(where, name))
            found[file.relative_to(folder).as_posix()] = stat.st_size, stat.st_mtime_ns
    return found


def copied(folder: Path) -> tuple[Path, dict[str, str]]:
    """Copy the project; return it and an environment in which its own two packages are found.

    In that environment no process can leave loopback, and the home folder is empty.
    """
    project, home, guard = folder / "project", folder / "home", folder / "guard"
    ignored = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "store", "downloads")
    for name in ("fungi_core", "notebooks", "data"):
        shutil.copytree(paths.ROOT / name, project / name, ignore=ignored)
    for made in (home, guard, folder / "tmp", folder / "work"):
        made.mkdir()
    (guard / "sitecustomize.py").write_text(GUARD)
    foreign = ("FUNGI_", "HF_", "XDG_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    return project, kept | {
        "PYTHONPATH": os.pathsep.join(map(str, (guard, project, project / "notebooks"))),
        "NETWORK_LOG": str(folder / "network"),
        "HOME": str(home),
        "TMPDIR": str(folder / "tmp"),
        "PYTHONDONTWRITEBYTECODE": "1",
    }


@pytest.mark.contract
def test_a_run_of_mini_needs_no_network_and_writes_the_store_figures_and_runs_alone(tmp_path):
    """An extraction and a notebook, each a process of its own, of a copy of the project."""
    project, environment = copied(tmp_path)
    work, network = tmp_path / "work", tmp_path / "network"

    def run(*command: str) -> subprocess.CompletedProcess:
        command = [sys.executable, *command]
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, cwd=work, timeout=900
        )

    reach = run("-c", "import urllib.request as r; r.urlopen('http://example.org', timeout=5)")
    assert "no network here: example.org" in reach.stderr and network.read_text()  # it guards
    network.unlink()
    found = run(
        "-c", "import fungi_core, companion; print(fungi_core.__file__, companion.__file__)"
    )
    own = [project / "fungi_core/__init__.py", project / "notebooks/companion/__init__.py"]
    assert found.stdout.split() == [str(file) for file in own]
    before = states(project)
    sizes = ("--n-train", "20", "--n-test", "20")
    done = run("-m", EXTRACTION, "vit_micro.sup_tin100", "digits", "kl", *sizes)
    assert done.returncode == 0, done.stderr
    done = run("-m", "companion.run", "01_method")
    assert done.returncode == 0, done.stderr
    assert not network.exists(), network.read_text()
    after = states(project)
    changed = {file for file in before.keys() | after.keys() if before.get(file) != after.get(file)}
    own = ("data/store/", "figures/mini/", "runs/mini/")
    assert {file for file in changed if not file.startswith(own)} == set()
    assert all(any(file.startswith(folder) for file in changed) for folder in own)
    assert {p.name for p in tmp_path.iterdir()} == {"project", "guard", "home", "work", "tmp"}
    assert states(work) == {}
    assert [file for file in states(tmp_path / "home") if not file.startswith(CACHES)] == []
