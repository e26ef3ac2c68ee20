"""The rules of the house (two packages, who may import what, sizes), read from the sources alone.

Each rule is a function that takes the root of a project and returns its faults, one line each.
`test_rule` applies it to this project, `test_each_rule_catches_its_fault` to a small project in
which one fault is planted.
"""

import ast
import importlib
import io
import json
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CORE_LINES, MODULE_LINES, COMPANION_LINES, COMPANION_NOW = 3_300, 320, 5_900, 7_420
COLUMNS, FUNCTION_LINES = 100, 49
PACKAGES = {"fungi_core": "fungi_core", "companion": "notebooks/companion"}
PACKAGE_TOPS = ("fungi_core", "notebooks")
# scipy is not in it: scikit-learn, which the core needs, brings it, and sounds are resampled by it.
NOT_IN_THE_CORE = {
    "companion", "pandas", "matplotlib", "seaborn", "IPython", "ipywidgets", "papermill",
    "torchvision",
}  # fmt: skip
DRAWING = {"matplotlib", "seaborn"}
OURS = (
    "fungi_core/**/*.py", "notebooks/companion/**/*.py", "tests/**/*.py", "benchmarks/*.py",
    "data/*.py", "data/backbones/*.py", "data/texts/*.py",
)  # fmt: skip

Sources = dict[str, ast.Module]


# --- reading


def python_files(root: Path) -> list[Path]:
    """Return the project's own Python files, whatever else lies in the checkout."""
    found = (path for pattern in OURS for path in root.glob(pattern))
    return sorted(path for path in found if ".ipynb_checkpoints" not in path.parts)


def package(root: Path, name: str) -> Sources:
    """Return the modules of one package by dotted name; a package's own name is its __init__."""
    folder = root / PACKAGES[name]
    trees = {}
    for path in python_files(root):
        if path.is_relative_to(folder):
            parts = [name, *path.relative_to(folder).with_suffix("").parts]
            dotted = ".".join(part for part in parts if part != "__init__")
            trees[dotted] = ast.parse(path.read_text(encoding="utf-8"))
    return trees


def both(root: Path) -> Sources:
    return package(root, "fungi_core") | package(root, "companion")


def pages(root: Path) -> Sources:
    """Return the code of each notebook and of the README's examples as if it were a module."""
    trees = {}
    for path in sorted(root.glob("notebooks/*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
        trees[f"notebooks/{path.name}"] = ast.parse("\n".join(code))
    readme = (root / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    return trees | {"README.md": ast.parse("\n".join(blocks))}


def scripts(root: Path) -> Sources:
    """Return the benchmarks and the scripts beside the data."""
    paths = [path for path in python_files(root) if path.relative_to(root).parts[0] != "tests"]
    own = [path for path in paths if path.relative_to(root).parts[0] in ("benchmarks", "data")]
    return {path.relative_to(root).as_posix(): ast.parse(path.read_text()) for path in own}


def imports(name: str, tree: ast.Module, modules: set[str]) -> Iterator[tuple]:
    """Yield (module, name or None, name bound here, line) of every import, at whatever depth.

    ``from companion.data import masks`` imports the module ``companion.data.masks`` where there is
    such a module in ``modules``, else the name ``masks`` of the module ``companion.data``.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, None, alias.asname or alias.name.split(".")[0], node.lineno
        if isinstance(node, ast.ImportFrom):
            source = node.module if not node.level else absolute(name, node, modules)
            for alias in node.names:
                whole, bound = f"{source}.{alias.name}", alias.asname or alias.name
                if whole in modules:
                    yield whole, None, bound, node.lineno
                else:
                    yield source, alias.name, bound, node.lineno


def absolute(name: str, node: ast.ImportFrom, modules: set[str]) -> str:
    """Return the module that a relative import in the module ``name`` means."""
    is_package = any(module.startswith(f"{name}.") for module in modules)
    parts = name.split(".")
    above = parts[: len(parts) - node.level + is_package]
    return ".".join([*above, node.module] if node.module else above)


def dotted(node: ast.expr) -> list[str]:
    """Return ["a", "b", "c"] for the expression ``a.b.c``, [] for any other."""
    if isinstance(node, ast.Name):
        return [node.id]
    inner = dotted(node.value) if isinstance(node, ast.Attribute) else []
    return [*inner, node.attr] if inner else []


def uses(name: str, tree: ast.Module, modules: set[str]) -> Iterator[tuple[str, str, int]]:
    """Yield (module of ours, name in it, line) of everything taken from another module."""
    bound = {}
    for module, taken, here, line in imports(name, tree, modules):
        if taken is not None:
            yield module, taken, line
        else:
            bound[here] = module if here != module.split(".")[0] else here
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and (parts := dotted(node)) and parts[0] in bound:
            module, rest = bound[parts[0]], parts[1:]
            while rest and f"{module}.{rest[0]}" in modules:
                module, rest = f"{module}.{rest[0]}", rest[1:]
            if len(rest) == 1 and module in modules:
                yield module, rest[0], node.lineno


def public_names(tree: ast.Module) -> dict[str, ast.stmt]:
    """Return the functions, classes and constants of a module without a leading underscore."""
    found = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = node
        targets = node.targets if isinstance(node, ast.Assign) else []
        targets += [node.target] if isinstance(node, ast.AnnAssign) else []
        found |= {target.id: node for target in targets if isinstance(target, ast.Name)}
    return {name: node for name, node in found.items() if not name.startswith("_")}


# --- the rules


def core_imports_no_companion_and_nothing_heavy(root: Path) -> list[str]:
    core = package(root, "fungi_core")
    return [
        f"{name}:{line} imports {module}"
        for name, tree in core.items()
        for module, _, _, line in imports(name, tree, set(core))
        if module.split(".")[0] in NOT_IN_THE_CORE
    ]


def data_does_not_import_evaluate(root: Path) -> list[str]:
    companion = package(root, "companion")
    return [
        f"{name}:{line} imports {module}"
        for name, tree in companion.items()
        if name.startswith("companion.data")
        for module, _, _, line in imports(name, tree, set(companion))
        if module.startswith("companion.evaluate")
    ]


def only_figures_draws_and_it_draws_only(root: Path) -> list[str]:
    companion = package(root, "companion")
    faults = []
    for name, tree in companion.items():
        drawing = name.startswith("companion.figures")
        for module, _, _, line in imports(name, tree, set(companion)):
            top = module.split(".")[0]
            apart = top == "torch" or module.startswith("companion.data")
            if apart if drawing else top in DRAWING:
                faults.append(f"{name}:{line} imports {module}")
    return faults


def no_private_name_crosses_a_module(root: Path) -> list[str]:
    own = both(root)
    return [
        f"{name}:{line} takes {used} of {module}"
        for name, tree in (own | scripts(root) | pages(root)).items()
        for module, used, line in uses(name, tree, set(own))
        if used.startswith("_") and not used.startswith("__") and module != name
    ]


def no_import_circle(root: Path) -> list[str]:
    own = both(root)
    graph = {
        name: {module for module, *_ in imports(name, tree, set(own)) if module in own}
        for name, tree in own.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return ["circle: " + " <- ".join(error.args[1])]
    return []


def every_public_name_of_the_core_is_used(root: Path) -> list[str]:
    """A name in the signature of a public function of its module counts as used with it."""
    core, readme = package(root, "fungi_core"), (root / "README.md").read_text(encoding="utf-8")
    others = core | package(root, "companion") | scripts(root) | pages(root)
    used = {
        (module, name)
        for other, tree in others.items()
        for module, name, _ in uses(other, tree, set(core))
        if module != other
    }
    used |= {(module, "main") for module in re.findall(r"-m (fungi_core\.\w+)", readme)}
    quoted = set(re.findall(r"\w+", " ".join(re.findall(r"`([^`\n]+)`", readme))))
    faults = []
    for module, tree in core.items():
        for name, node in public_names(tree).items():
            if (module, name) not in used and name not in quoted | in_signatures(tree, name):
                faults.append(f"{module}:{node.lineno} {name} is used by no other file")
    return faults


def in_signatures(tree: ast.Module, apart_from: str) -> set[str]:
    """Return the names in annotations of a module's public functions and methods, but of one."""
    owners = [node for name, node in public_names(tree).items() if name != apart_from]
    functions = [
        node for owner in owners for node in ast.walk(owner) if isinstance(node, ast.FunctionDef)
    ]
    hints = []
    for function in functions:
        arguments = (node for node in ast.walk(function.args) if isinstance(node, ast.arg))
        hints += [function.returns, *(argument.annotation for argument in arguments)]
    parts = (part for hint in hints if hint for part in ast.walk(hint))
    return {part.id for part in parts if isinstance(part, ast.Name)}


def count(paths: list[Path]) -> int:
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)


def core_is_thin(root: Path) -> list[str]:
    paths = [path for path in python_files(root) if path.is_relative_to(root / "fungi_core")]
    lines = {path.name: count([path]) for path in paths}
    faults = [f"fungi_core/{name}: {n} lines" for name, n in lines.items() if n > MODULE_LINES]
    total = sum(lines.values())
    return faults + [f"fungi_core: {total} lines"] * (total > CORE_LINES)


def companion_lines(root: Path) -> int:
    folder = root / PACKAGES["companion"]
    return count([path for path in python_files(root) if path.is_relative_to(folder)])


def companion_is_small(root: Path) -> list[str]:
    total = companion_lines(root)
    return [f"companion: {total} lines"] * (total > COMPANION_LINES)


def companion_grows_no_more(root: Path) -> list[str]:
    """It is over its limit by what only the owner can let go; until then it may not grow."""
    total = companion_lines(root)
    return [f"companion: {total} lines, {COMPANION_NOW} allowed"] * (total > COMPANION_NOW)


def no_long_line(root: Path) -> list[str]:
    return [
        f"{path.relative_to(root)}:{i} has {len(line)} columns"
        for path in python_files(root)
        for i, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if len(line) > COLUMNS
    ]


def only_tables_are_laid_out_by_hand(root: Path) -> list[str]:
    """``fmt: skip`` may end a table: a constant, or the list of a test's parameters."""
    faults = []
    for path in python_files(root):
        text = path.read_text(encoding="utf-8")
        marks = [
            token.start[0]
            for token in tokenize.generate_tokens(io.StringIO(text).readline)
            if token.type == tokenize.COMMENT and re.match(r"#\s*fmt:\s*(skip|off)", token.string)
        ]
        ends = {table.end_lineno for table in tables(ast.parse(text))}
        faults += [f"{path.relative_to(root)}:{line}" for line in marks if line not in ends]
    return faults


def tables(tree: ast.Module) -> Iterator[ast.AST]:
    """Yield the assignments to UPPER_CASE names and the decorators of tests."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            names = [name.id for name in node.targets if isinstance(name, ast.Name)]
            if names and all(name.isupper() for name in names):
                yield node
        if isinstance(node, ast.FunctionDef):
            yield from (d for d in node.decorator_list if "parametrize" in ast.unparse(d))


def functions_are_short(root: Path) -> list[str]:
    faults = []
    for path in python_files(root):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = node.end_lineno - node.lineno + 1
                if lines > FUNCTION_LINES:
                    where = f"{path.relative_to(root)}:{node.lineno}"
                    faults.append(f"{where} {node.name} has {lines} lines")
    return faults


def formatted(root: Path) -> list[str]:
    command = [sys.executable, "-m", "ruff", "format", "--check", "--quiet", "--no-cache"]
    command += ["--config", str(ROOT / "pyproject.toml"), "--output-format", "concise"]
    done = subprocess.run(
        [*command, *map(str, python_files(root))], cwd=root, capture_output=True, text=True
    )
    return (done.stdout + done.stderr).splitlines() if done.returncode else []


def snakefile_lists_no_modules(root: Path) -> list[str]:
    """Code that changes a feature is told by its folder: no file and no row of modules is named."""
    text = (root / "Snakefile").read_text(encoding="utf-8")
    own = [path for path in python_files(root) if path.relative_to(root).parts[0] in PACKAGE_TOPS]
    modules = {path.stem for path in own} - {"__init__"}
    rows = re.findall(r"""(?:["'][\w./]+["'][,\s]+)+["'][\w./]+["']""", text)  # "a", "b"
    rows += re.findall(r"""["']([\w./]+(?: [\w./]+)+)["']""", text)  # "a b".split()
    faults = [
        f"Snakefile lists modules: {row}"
        for row in rows
        if sum(Path(word).stem in modules for word in re.findall(r"[\w./]+", row)) > 1
    ]
    named = re.findall(r"""["']([\w./]*\w\.py)["']""", text)
    return faults + [f"Snakefile names {name}" for name in named]


RULES = [
    core_imports_no_companion_and_nothing_heavy,
    data_does_not_import_evaluate,
    only_figures_draws_and_it_draws_only,
    no_private_name_crosses_a_module,
    no_import_circle,
    every_public_name_of_the_core_is_used,
    core_is_thin,
    companion_is_small,
    companion_grows_no_more,
    no_long_line,
    only_tables_are_laid_out_by_hand,
    functions_are_short,
    formatted,
    snakefile_lists_no_modules,
]


# Rules that the move into two packages has not met yet; a rule leaves the list when it holds.
NOT_YET = {
    companion_is_small: "the companion is being made small",
}


def marked(rule):
    marks = [pytest.mark.xfail(strict=False, reason=NOT_YET[rule])] if rule in NOT_YET else []
    return pytest.param(rule, marks=marks, id=rule.__name__)


@pytest.mark.parametrize("rule", [marked(rule) for rule in RULES])
def test_rule(rule):
    assert rule(ROOT) == []


def printed_by(code: str) -> list[str]:
    """Return the words that a new interpreter prints."""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_importing_the_core_loads_no_heavy_library():
    heavy = {"pandas", "matplotlib", "seaborn", "transformers", "papermill", "IPython", "companion"}
    code = (
        f"import sys; from fungi_core import KL, load; print(*sorted({heavy} & set(sys.modules)))"
    )
    assert printed_by(code) == []


def test_the_core_lists_its_names_and_knows_no_other():
    core = importlib.import_module("fungi_core")
    assert set(dir(core)) == {"DINO", "KL", "Fungi", "SimCLR", "load"}
    assert all(callable(getattr(core, name)) for name in dir(core))
    with pytest.raises(AttributeError, match="module 'fungi_core' has no attribute 'Fungy'"):
        print(core.Fungy)


def test_a_plan_of_mini_loads_no_model_library():
    code = """import sys
from companion import plan, run
from companion.data import masks
from companion.encoders.table import unavailable
for slug in run.notebooks():
    assert not any(map(unavailable, run.parameters(slug, "mini").get("backbones", [])))
print(*sorted({"timm", "torchvision", "transformers", "sklearn"} & set(sys.modules)))"""
    assert printed_by(code) == []


# --- the rules themselves: a clean project, and one fault planted in it


def notebook(code: str) -> str:
    return json.dumps({"cells": [{"cell_type": "code", "source": [code]}]})


CORE, FUNGI, BENCHMARK = "fungi_core/gradients.py", "fungi_core/fungi.py", "benchmarks/run.py"
COMPANION = "notebooks/companion"
PHOTOS, PLOTS = f"{COMPANION}/data/photos.py", f"{COMPANION}/figures/plots.py"
TEST = "tests/test_a.py"
CLEAN = {
    "fungi_core/__init__.py": "from .fungi import Fungi, load\n",
    FUNGI: """
import torch

from . import gradients

NOTE = "a string may say # fmt: skip, or import pandas"


class Fungi:
    def rows(self) -> torch.Tensor:
        return gradients.factors(self)


def load():
    return Fungi()
""",
    CORE: """
TABLE = {1:  1,
         22: 2}  # fmt: skip


class Hook:
    pass


class Factors:
    pass


def factors(hook: list[Hook]) -> Factors:
    return _tap()


def _tap():
    return Factors()


def inner_product():
    pass


def main():
    pass
""",
    f"{COMPANION}/__init__.py": "",
    f"{COMPANION}/data/__init__.py": "",
    PHOTOS: """
import fungi_core.gradients

print(fungi_core.gradients.TABLE, fungi_core.gradients.__name__)
""",
    f"{COMPANION}/evaluate/__init__.py": "",
    f"{COMPANION}/evaluate/knn.py": "from companion.data import photos\n\nprint(photos)\n",
    f"{COMPANION}/figures/__init__.py": "",
    PLOTS: "import matplotlib\n\nprint(matplotlib)\n",
    "notebooks/01_method.ipynb": notebook("from fungi_core.fungi import NOTE\nprint(NOTE)"),
    BENCHMARK: "from fungi_core import gradients as g\n\nprint(g.inner_product)\n",
    TEST: "def test_it():\n    pass\n",
    "README.md": "`Fungi` is all; `python -m fungi_core.gradients` shows it.\n",
    "Snakefile": """
CODE = [p for folder in ("fungi_core", "notebooks/companion") for p in Path(folder).rglob("*.py")]
FEATURES = [p for p in CODE if p.parts[2] in ("data", "encoders")]
shell: "python -m fungi_core.gradients"
""",
}
PLANTED = {  # rule -> [(file, what is put at its end, the fault that must be found)]
    core_imports_no_companion_and_nothing_heavy: [
        (CORE, "import pandas as pd", "fungi_core.gradients:27 imports pandas"),
        (CORE, "from torchvision.transforms import v2", "torchvision.transforms"),
        (CORE, "from companion.data import photos", "companion.data"),
        (CORE, "def f():\n    import seaborn", "seaborn"),
        (CORE, "import papermill.inspection as p", "papermill"),
    ],
    data_does_not_import_evaluate: [
        (PHOTOS, "from companion.evaluate import knn", "companion.evaluate.knn"),
        (PHOTOS, "def f():\n    from companion import evaluate", "companion.evaluate"),
        (PHOTOS, "from ..evaluate.knn import near", "companion.evaluate.knn"),
    ],
    only_figures_draws_and_it_draws_only: [
        (f"{COMPANION}/site.py", "def f():\n    import matplotlib", "companion.site:2"),
        (PLOTS, "from torch import nn", "imports torch"),
        (PLOTS, "from ..data import photos", "imports companion.data.photos"),
    ],
    no_private_name_crosses_a_module: [
        (FUNGI, "gradients._tap()", "takes _tap of fungi_core.gradients"),
        (FUNGI, "from fungi_core.gradients import _tap", "takes _tap"),
        (FUNGI, "def f():\n    from .gradients import _tap", "takes _tap"),
        (BENCHMARK, "g._tap()", "benchmarks/run.py:4 takes _tap"),
        (PHOTOS, "fungi_core.gradients._tap", "takes _tap"),
        ("notebooks/02_b.ipynb", notebook("import fungi_core as f; f._x"), "02_b.ipynb:1 takes _x"),
    ],
    no_import_circle: [
        (CORE, "from fungi_core import fungi", "circle: fungi_core."),
        (CORE, "def f():\n    from fungi_core.fungi import load", "circle: fungi_core."),
        (CORE, "def f():\n    from .fungi import load", "circle: fungi_core."),
        (CORE, "from . import Fungi", "circle: fungi_core"),
        (PHOTOS, "import companion.evaluate.knn", "circle: companion."),
    ],
    every_public_name_of_the_core_is_used: [
        (CORE, "def alone():\n    pass", "fungi_core.gradients:27 alone"),
        (CORE, "SIZE = 1\nprint(SIZE)", "SIZE"),
        (CORE, "SIZE: int = 1", "SIZE"),
        (CORE, "class Own:\n    def f(self) -> Own:\n        pass", "Own"),
    ],
    core_is_thin: [
        (CORE, "x = 1\n" * 300, "fungi_core/gradients.py: 327 lines"),
        ("fungi_core/large.py", "x = 1\n" * 3300, "fungi_core: 3342 lines"),
    ],
    companion_is_small: [(PLOTS, "x = 1\n" * 5900, "companion: 5910 lines")],
    companion_grows_no_more: [(PLOTS, "x = 1\n" * 7420, "companion: 7430 lines, 7420 allowed")],
    no_long_line: [(TEST, "#" * 101, "tests/test_a.py:3 has 101 columns")],
    only_tables_are_laid_out_by_hand: [
        (TEST, "f(1,\n  2)  # fmt: skip", "tests/test_a.py:4"),
        (CORE, "table = [1,\n  2]  # fmt: skip", "gradients.py:28"),
        (CORE, "# fmt: off", "gradients.py:27"),
    ],
    functions_are_short: [
        (CORE, "def f():\n" + "    x = 1\n" * 49, "gradients.py:27 f has 50 lines"),
        (CORE, "class A:\n    async def f():\n" + "        x = 1\n" * 49, "f has 50 lines"),
    ],
    formatted: [(BENCHMARK, "x=1", "benchmarks/run.py")],
    snakefile_lists_no_modules: [
        ("Snakefile", "KEPT = ['gradients', 'photos']", "'gradients', 'photos'"),
        ("Snakefile", "KEPT = 'knn plots photos'.split()", "knn plots photos"),
        ("Snakefile", 'input: "fungi_core/fungi.py"', "names fungi_core/fungi.py"),
    ],
}
CASES = [
    pytest.param(rule, *case, id=f"{rule.__name__}-{i}")
    for rule, cases in PLANTED.items()
    for i, case in enumerate(cases, 1)
]


def build(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text.lstrip("\n"), encoding="utf-8")
    return root


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_a_clean_project_has_no_fault(rule, tmp_path):
    assert rule(build(tmp_path, CLEAN)) == []


@pytest.mark.parametrize("rule, file, text, fault", CASES)
def test_each_rule_catches_its_fault(rule, file, text, fault, tmp_path):
    build(tmp_path, CLEAN | {file: CLEAN.get(file, "") + text + "\n"})
    assert [found for found in rule(tmp_path) if fault in found], rule(tmp_path)


def test_every_rule_has_a_planted_fault():
    assert set(PLANTED) == set(RULES)
