"""Lint of every notebook: structure, parameters, size, no trace of the machine it ran on,
normalised metadata.
"""

import ast
import json
import re
import sys
from collections import Counter
from pathlib import Path
from statistics import median

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from nbstripout import strip_output

from companion import paths, run

IMPORTS = {"companion", "fungi_core", "numpy", "pandas", "torch", "timm", "PIL", "sklearn"}
IMPORTS |= {"IPython", "ipywidgets", *sys.stdlib_module_names}
CELL_LINES, CODE_LINES, MEDIAN_LINES = 15, 80, 65
CHECKED = "# NBVAL_CHECK_OUTPUT"
ABSOLUTE = re.compile(
    r"""(?<![\w.<])/(?:home|root|work|tmp|usr|opt|mnt|data|var|Users)/|\b[A-Z]:\\"""
)
STRIPPED = """metadata.papermill cell.metadata.papermill cell.metadata.execution metadata.widgets
    metadata.language_info.version"""


def code_cells(nb) -> list:
    return [cell for cell in nb.cells if cell.cell_type == "code"]


def lines(cell) -> list[str]:
    return [line for line in cell.source.splitlines() if line.strip()]


def shown_text(nb) -> str:
    """Everything a reader can read: sources and textual outputs."""
    outputs = [out for cell in code_cells(nb) for out in cell.outputs]
    rich = [
        text
        for out in outputs
        for kind, text in out.get("data", {}).items()
        if kind.startswith("text/")
    ]
    return "\n".join(
        [c.source for c in nb.cells] + [o.text for o in outputs if o.output_type == "stream"] + rich
    )


def imported(tree: ast.AST) -> set[str]:
    names = [a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names]
    names += [node.module or "." for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return {name.split(".")[0] for name in names}


def broken(rules: dict[str, object]) -> list[str]:
    """Return the rules that do not hold, of a table that maps each rule to whether it holds."""
    return [rule for rule, holds in rules.items() if not holds]


def declared_parameters(slug: str) -> tuple[dict, list[str]]:
    """Return the parameters that papermill reads in a notebook, or the fault that it finds."""
    try:
        return run.declared(slug), []
    except ValueError as error:
        return {}, [f"parameters: {error}"]


def parameter_faults(cell, declared: dict) -> list[str]:
    """A parameters cell is at most ten annotated literals, one a line, each with a comment."""
    faults = []
    for line in lines(cell):
        try:
            (node,) = ast.parse(line).body
            name, value = node.target.id, ast.literal_eval(node.value)
        except (SyntaxError, ValueError, AttributeError):
            faults.append(f"parameters: no annotated literal on one line: {line}")
            continue
        known, annotation = declared.get(name, {}), ast.unparse(node.annotation)
        if not known.get("help"):
            faults.append(f"parameters: '{name}' has no trailing comment that papermill can read")
        elif known["type"] != annotation or type(value) not in run.TYPES[annotation]:
            faults.append(f"parameters: the default of '{name}' is no {annotation}")
    missing = {"profile", "seed"} - declared.keys()
    return faults + broken(
        {
            f"parameters: {', '.join(sorted(missing))} missing": not missing,
            "parameters: profile must default to 'mini'": declared.get("profile", {}).get("default")
            == "mini",
            f"parameters: {len(declared)} of at most 10": len(declared) <= 10,
        }
    )


def format_faults(path: Path, nb) -> list[str]:
    raw = json.loads(path.read_text(encoding="utf-8"))  # nbformat repairs double ids as it reads
    ids = {cell.get("id") for cell in raw["cells"]}
    same = run.normalize(nbformat.from_dict(json.loads(json.dumps(nb)))) == nb
    return broken(
        {
            "name: NN_slug, lower case": re.fullmatch(r"\d\d_[a-z0-9_]+", path.stem),
            "format: 4.5 or newer, with cell ids": (nb.nbformat, nb.nbformat_minor) >= (4, 5),
            "cell ids are not unique": len(ids) == len(raw["cells"]),
            "metadata not normalised: run `make normalize`": same,
            f"{path.stat().st_size // 1000} KB; at most 300": path.stat().st_size <= 300_000,
        }
    )


def structure_faults(nb) -> list[str]:
    first, last = nb.cells[0], nb.cells[-1]
    rules = {
        f"{len(nb.cells)} cells; 10 to 18": 10 <= len(nb.cells) <= 18,
        "first cell: a title": first.cell_type == "markdown" and first.source.startswith("# "),
        "last cell: provenance, as code": last.cell_type == "code" and "provenance" in last.source,
        f"no cell starts with {CHECKED}": checked(nb),
    }
    for i, cell in enumerate(nb.cells, 1):
        if cell.cell_type == "code":
            count = len(lines(cell))
            rules[f"cell {i}: {count} lines; at most {CELL_LINES}"] = count <= CELL_LINES
    return broken(rules)


def import_faults(nb) -> list[str]:
    faults = []
    for i, cell in enumerate(nb.cells, 1):
        if cell.cell_type == "code":
            try:
                extra = ", ".join(sorted(imported(ast.parse(cell.source)) - IMPORTS))
            except SyntaxError as error:
                faults.append(f"cell {i}: no plain Python ({error.msg})")
                continue
            if extra:
                faults.append(
                    f"cell {i} imports {extra}; allowed are companion, fungi_core and basics"
                )
    return faults


def output_faults(nb) -> list[str]:
    text, cells = shown_text(nb), code_cells(nb)
    kinds = {out.output_type for cell in cells for out in cell.outputs}
    return broken(
        {
            "an absolute path": not ABSOLUTE.search(text) and str(paths.ROOT) not in text,
            # A link of a page into the gallery is no path of its code.
            "a path with ../": "../" not in text.replace("](../figures/lite/README.md)", ""),
            "pip install": "pip install" not in text,
            "an error among the outputs": "error" not in kinds,
            "a code cell that was never run (nbval needs all)": all(
                cell.execution_count for cell in cells if cell.source.strip()
            ),
        }
    )


def faults(path: Path) -> list[str]:
    """Return every rule that a notebook breaks, one line each; empty for a clean one."""
    nb = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    nbformat.validate(nb)
    found = [*format_faults(path, nb), *structure_faults(nb), *import_faults(nb)]
    tagged = [cell for cell in nb.cells if "parameters" in cell.metadata.get("tags", [])]
    if len(tagged) == 1:
        declared, unread = declared_parameters(path.stem)
        found += unread or parameter_faults(tagged[0], declared)
    else:
        found.append(f"{len(tagged)} cells tagged 'parameters'; one")
    return found + output_faults(nb)


# ---- what a notebook leaves to its Page


def checked(nb) -> list:
    return [cell for cell in code_cells(nb) if cell.source.startswith(CHECKED)]


def compares_a_number(tree: ast.AST) -> bool:
    """Tell whether code compares a number with a stored one within a tolerance.

    Counted are ``page.check(...)``, ``isclose`` and ``allclose`` with a tolerance that is given,
    and ``abs(a - b) < tolerance``.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            given = {keyword.arg for keyword in node.keywords}
            close = name.rpartition(".")[2] in ("isclose", "allclose")
            if name == "page.check" or close and given & {"rel_tol", "abs_tol", "rtol", "atol"}:
                return True
        if isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.Lt | ast.LtE):
            left = node.left
            if isinstance(left, ast.Call) and re.fullmatch(r"(\w+\.)?abs", ast.unparse(left.func)):
                return any(isinstance(part, ast.Sub) for part in ast.walk(left))
    return False


def typed_provenance(tree: ast.AST, parameters: set[str]) -> list[str]:
    """Return calls that repeat a notebook's parameters by hand for its provenance."""
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        own = [k.arg for k in node.keywords if ast.unparse(k.value) == k.arg]
        repeated = [word for word in own if word in parameters]
        if name.rpartition(".")[2] == "provenance" and (node.args or node.keywords):
            found.append("provenance(...) with arguments: page.provenance() knows them")
        if name == "dict" and ("profile" in repeated or len(repeated) > 2):
            found.append(f"dict({', '.join(own)}) repeats parameters: the page knows them")
    return found


def page_faults(path: Path) -> list[str]:
    """Return what a notebook writes by hand though its `Page` does it, and what it leaves out."""
    nb = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    total = code_lines(nb)
    trees = [ast.parse(cell.source) for cell in code_cells(nb)]
    found = broken(
        {
            f"{total} code lines; at most {CODE_LINES}": total <= CODE_LINES,
            "the checked cell compares no number within a tolerance": any(
                compares_a_number(ast.parse(cell.source)) for cell in checked(nb)
            ),
            "a stored number was missed": not any(
                re.search(r" Measured within .*: False$", out.get("text", ""), re.MULTILINE)
                for cell in checked(nb)
                for out in cell.outputs
            ),
        }
    )
    parameters = set(declared_parameters(path.stem)[0])
    return found + [fault for tree in trees for fault in typed_provenance(tree, parameters)]


def code_lines(nb) -> int:
    return sum(len(lines(cell)) for cell in code_cells(nb))


def repeated_cells(folder: Path) -> list[str]:
    """Return cells of over three lines, imports aside, that stand in more than one notebook."""
    where = {}
    for path in sorted(folder.glob("*.ipynb")):
        nb = nbformat.read(path, as_version=nbformat.NO_CONVERT)
        for cell in code_cells(nb):
            tree = ast.parse(cell.source)
            body = [n for n in tree.body if not isinstance(n, ast.Import | ast.ImportFrom)]
            text = "\n".join(map(ast.unparse, body))
            if len(text.splitlines()) > 3 and "parameters" not in cell.metadata.get("tags", []):
                where.setdefault(text, []).append(path.stem)
    return [f"{', '.join(slugs)}: {text}" for text, slugs in where.items() if len(slugs) > 1]


# ---- the notebooks of this project


def test_there_are_notebooks_and_numbers_are_unique():
    assert run.notebooks(), f"no NN_slug.ipynb in {run.NOTEBOOKS}"
    assert {p.stem for p in run.NOTEBOOKS.glob("*.ipynb")} == set(run.notebooks())
    assert max(Counter(slug[:2] for slug in run.notebooks()).values()) == 1


@pytest.mark.parametrize("slug", run.notebooks())
def test_lint(slug):
    assert faults(run.NOTEBOOKS / f"{slug}.ipynb") == []


@pytest.mark.parametrize("slug", run.notebooks())
def test_the_page_does_the_repeated_work(slug):
    assert page_faults(run.NOTEBOOKS / f"{slug}.ipynb") == []


def test_the_median_notebook_is_short():
    books = (nbformat.read(path, as_version=4) for path in run.NOTEBOOKS.glob("*.ipynb"))
    assert median(map(code_lines, books)) <= MEDIAN_LINES


def test_no_cell_stands_in_two_notebooks():
    assert repeated_cells(run.NOTEBOOKS) == []


@pytest.mark.parametrize("profile", run.profiles())
def test_every_profile_fits_every_notebook(profile):
    for slug in run.notebooks():
        assert run.parameters(slug, profile)["profile"] == profile


@pytest.mark.parametrize("slug", run.notebooks())
def test_normalised_as_nbstripout_has_it(slug):
    nb = nbformat.read(run.NOTEBOOKS / f"{slug}.ipynb", as_version=4)
    kept = nbformat.from_dict(json.loads(json.dumps(nb)))
    options = dict(keep_output=True, keep_count=True, keep_id=True, extra_keys=STRIPPED.split())
    assert strip_output(nb, **options) == kept


# ---- the lint itself


PARAMETERS = 'profile: str = "mini"  # which profile\nseed: int = 0  # base seed'
ONE_MORE = lambda line: f"{PARAMETERS}\n{line}"


def clean_notebook():
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nb = new_notebook(metadata={"kernelspec": kernel, "language_info": {"name": "python"}})
    shown = new_output("execute_result", {"text/plain": "True"}, execution_count=2)
    nb.cells = [
        new_markdown_cell("# Title"),
        new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}),
        *(new_markdown_cell(f"text {i}") for i in range(6)),
        new_code_cell(f"{CHECKED}\nabs(1.02 - 1) < 0.05", outputs=[shown]),
        new_code_cell("page.provenance()"),
    ]
    for count, cell in enumerate(code_cells(nb), 1):
        cell.execution_count = count
    return nb


def stream(nb, text):
    code_cells(nb)[-1].outputs = [new_output("stream", text=text)]


def set_source(nb, text, cell=-1):
    code_cells(nb)[cell].source = text


def set_parameters(nb, text):
    set_source(nb, text, 0)


def miss_stored(nb):
    text = "gain. Measured within 2 of the stored 1.5: False\n"
    checked(nb)[0].outputs = [new_output("stream", name="stdout", text=text)]


def set_checked(nb, text):
    set_source(nb, f"{CHECKED}\n{text}", 1)


def add_cells(nb, count, lines_each):
    new = [new_code_cell("x = 1\n" * lines_each, execution_count=1) for _ in range(count)]
    nb.cells[2:2] = new


def add_error(nb):
    error = new_output("error", ename="E", evalue="", traceback=[])
    code_cells(nb)[-1].outputs.append(error)


BREAKS = {
    "at most 15": lambda nb: set_source(nb, "x = 1\n" * 15 + "page.provenance()"),
    "10 to 18": lambda nb: nb.cells.pop(3),
    "not unique": lambda nb: nb.cells[1].update(id=nb.cells[2].id),
    "first cell": lambda nb: nb.cells.insert(0, new_markdown_cell("no title")),
    "last cell": lambda nb: set_source(nb, "x = 1"),
    "0 cells tagged": lambda nb: code_cells(nb)[0].metadata.clear(),
    "is no literal": lambda nb: set_parameters(nb, ONE_MORE("n: int = 2 * 3  # six")),
    "no annotated literal": lambda nb: set_parameters(nb, "print(1)\n" + PARAMETERS),
    "'n' has no trailing comment": lambda nb: set_parameters(nb, ONE_MORE("n: int = 2")),
    "'n' is no int": lambda nb: set_parameters(nb, ONE_MORE("n: int = 2.5  # six")),
    "seed missing": lambda nb: set_parameters(nb, PARAMETERS.splitlines()[0]),
    "default to 'mini'": lambda nb: set_parameters(nb, PARAMETERS.replace("mini", "lite")),
    "of at most 10": lambda nb: set_parameters(
        nb, ONE_MORE("\n".join(f"n{i}: int = {i}  # n" for i in range(9)))
    ),
    "imports matplotlib": lambda nb: set_source(nb, "import matplotlib\npage.provenance()"),
    "no plain Python": lambda nb: set_source(nb, "%matplotlib inline\npage.provenance()"),
    "NBVAL_CHECK_OUTPUT": lambda nb: set_source(nb, "1 + 1", 1),
    "an absolute path": lambda nb: stream(nb, "read /home/someone/data"),
    "../": lambda nb: set_source(nb, "provenance = '../data'"),
    "pip install": lambda nb: set_source(nb, "provenance = 'pip install x'"),
    "an error": add_error,
    "never run": lambda nb: code_cells(nb)[-1].update(execution_count=None),
    "not normalised": lambda nb: nb.metadata.language_info.update(version="3.11.7"),
    "at most 300": lambda nb: stream(nb, "x" * 300_000),
}
PAGE_BREAKS = {
    "at most 80": lambda nb: add_cells(nb, 8, 10),
    "compares no number": lambda nb: set_checked(nb, "print(12, sorted(blocks), gain < 0.5)"),
    "provenance(...) with arguments": lambda nb: set_source(
        nb, "protocol.provenance('05_made_up', started, runs)"
    ),
    "dict(profile, k) repeats": lambda nb: set_source(nb, "made = dict(profile=profile, k=k)"),
    "a stored number was missed": miss_stored,
}


@pytest.fixture
def lint(tmp_path, monkeypatch):
    """Return a function that writes a notebook into a folder of its own and applies some rules."""
    monkeypatch.setattr(run, "NOTEBOOKS", tmp_path)

    def apply(nb, rules=faults, name="05_made_up"):
        (tmp_path / f"{name}.ipynb").write_text(json.dumps(nb), encoding="utf-8")
        return rules(tmp_path / f"{name}.ipynb")

    return apply


def test_a_clean_notebook_passes(lint):
    assert lint(clean_notebook()) == []
    assert lint(clean_notebook(), page_faults) == []


@pytest.mark.parametrize("fault", BREAKS)
def test_each_rule_catches_its_fault(lint, fault):
    nb = clean_notebook()
    BREAKS[fault](nb)
    found = lint(nb)
    assert any(fault in line for line in found), found


@pytest.mark.parametrize("fault", PAGE_BREAKS)
def test_each_rule_of_the_page_catches_its_fault(lint, fault):
    nb = clean_notebook()
    PAGE_BREAKS[fault](nb)
    [found] = lint(nb, page_faults)
    assert fault in found


@pytest.mark.parametrize("code, compares", [
    ("page.check('gain', gain)", True),
    ("print(math.isclose(gain, 3.2, abs_tol=0.1))", True),
    ("np.allclose(gains, [3.2], atol=0.1)", True),
    ("print('gain:', abs(gain - 3.2) < 0.1)", True),
    ("np.abs(gain - 3.2).max() < 0.1, abs(gain - 3.2) <= 0.1", True),
    ("print(len(labels), difference < 1e-5)", False),
    ("math.isclose(gain, 3.2)", False),
    ("abs(gain) < 3.2", False),
    ("print(round(gain, 1))", False),
])  # fmt: skip
def test_what_counts_as_a_compared_number(code, compares):
    assert compares_a_number(ast.parse(code)) == compares


def test_a_cell_in_two_notebooks_is_found(lint, tmp_path):
    nb = clean_notebook()
    set_source(nb, "a = 1\nb = 2\nc = 3\npage.provenance()")
    lint(nb)
    assert repeated_cells(tmp_path) == []
    set_source(nb, "import numpy\n\na = 1  # the same\nb = 2\nc = 3\npage.provenance()")
    lint(nb, name="06_made_up")
    assert repeated_cells(tmp_path) == [
        "05_made_up, 06_made_up: a = 1\nb = 2\nc = 3\npage.provenance()"
    ]
