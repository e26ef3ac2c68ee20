"""Lint of every notebook: structure, parameters, size, no trace of the machine it ran on,
normalised metadata.
"""

import ast
import json
import re
import sys
from collections import Counter
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from companion import paths, run

IMPORTS = {
    "fungi_core",
    "numpy",
    "pandas",
    "torch",
    "timm",
    "PIL",
    "sklearn",
    "IPython",
    "ipywidgets",
}
IMPORTS |= sys.stdlib_module_names
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


def parameter_faults(cell, declared: dict) -> list[str]:
    """A parameters cell is annotated literals, one a line, each with a trailing comment; at most
    ten.
    """
    faults = []
    for line in lines(cell):
        try:
            (node,) = ast.parse(line).body
            name, value = node.target.id, ast.literal_eval(node.value)
        except (SyntaxError, ValueError, AttributeError):
            faults.append(f"parameters: no annotated literal on one line: {line}")
            continue
        known = declared.get(name, {})
        if not known.get("help"):
            faults.append(f"parameters: '{name}' has no trailing comment that papermill can read")
        elif known["type"] != ast.unparse(node.annotation) or not run.fits(value, known["type"]):
            faults.append(
                f"parameters: the default of '{name}' is no {ast.unparse(node.annotation)}"
            )
    if missing := {"profile", "seed"} - declared.keys():
        faults.append(f"parameters: {', '.join(sorted(missing))} missing")
    if declared.get("profile", {}).get("default") != "mini":
        faults.append("parameters: profile must default to 'mini'")
    if len(declared) > 10:
        faults.append(f"parameters: {len(declared)} of at most 10")
    return faults


def faults(path: Path) -> list[str]:
    """Every rule that a notebook breaks, one line each; empty for a clean one."""
    raw = json.loads(path.read_text(encoding="utf-8"))  # nbformat repairs double ids as it reads
    nb = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    nbformat.validate(nb)
    cells, text, found = code_cells(nb), shown_text(nb), []

    def rule(holds: bool, fault: str) -> None:
        if not holds:
            found.append(fault)

    rule(re.fullmatch(r"\d\d_[a-z0-9_]+", path.stem), "name: NN_slug, lower case")
    rule((nb.nbformat, nb.nbformat_minor) >= (4, 5), "format: 4.5 or newer, with cell ids")
    rule(
        len({cell.get("id") for cell in raw["cells"]}) == len(raw["cells"]),
        "cell ids are not unique",
    )
    rule(10 <= len(nb.cells) <= 18, f"{len(nb.cells)} cells; 10 to 18")
    for i, cell in enumerate(nb.cells, 1):
        rule(
            cell.cell_type != "code" or len(lines(cell)) <= 15,
            f"cell {i}: {len(lines(cell))} lines; at most 15",
        )
    total = sum(len(lines(cell)) for cell in cells)
    rule(total <= 120, f"{total} code lines; at most 120")
    rule(
        nb.cells[0].cell_type == "markdown" and nb.cells[0].source.startswith("# "),
        "first cell: a title",
    )
    rule(
        "provenance" in nb.cells[-1].source and nb.cells[-1].cell_type == "code",
        "last cell: provenance, as code",
    )
    tagged = [cell for cell in nb.cells if "parameters" in cell.metadata.get("tags", [])]
    rule(len(tagged) == 1, f"{len(tagged)} cells tagged 'parameters'; one")
    if len(tagged) == 1:
        try:
            found += parameter_faults(tagged[0], run.declared(path.stem))
        except ValueError as error:
            found.append(f"parameters: {error}")
    for i, cell in enumerate(nb.cells, 1):
        if cell.cell_type == "code":
            try:
                extra = imported(ast.parse(cell.source)) - IMPORTS
                rule(
                    not extra,
                    f"cell {i} imports {', '.join(sorted(extra))}; allowed are fungi_core and basics",
                )
            except SyntaxError as error:
                found.append(f"cell {i}: no plain Python ({error.msg})")
    checked = any(cell.source.startswith("# NBVAL_CHECK_OUTPUT") for cell in cells)
    rule(checked, "no cell starts with # NBVAL_CHECK_OUTPUT")
    rule(not ABSOLUTE.search(text) and str(paths.ROOT) not in text, "an absolute path")
    rule("../" not in text, "a path with ../")
    rule("pip install" not in text, "pip install")
    rule(
        not any(o.output_type == "error" for c in cells for o in c.outputs),
        "an error among the outputs",
    )
    rule(
        all(c.execution_count for c in cells if c.source.strip()),
        "a code cell that was never run (nbval needs all)",
    )
    same = run.normalize(nbformat.from_dict(json.loads(json.dumps(nb)))) == nb
    rule(same, "metadata not normalised: run `make normalize`")
    rule(path.stat().st_size <= 300_000, f"{path.stat().st_size // 1000} KB; at most 300")
    return found


def test_there_are_notebooks_and_numbers_are_unique():
    assert run.notebooks(), f"no NN_slug.ipynb in {run.NOTEBOOKS}"
    assert {p.stem for p in run.NOTEBOOKS.glob("*.ipynb")} == set(run.notebooks())
    assert max(Counter(slug[:2] for slug in run.notebooks()).values()) == 1


@pytest.mark.parametrize("slug", run.notebooks())
def test_lint(slug):
    assert faults(run.NOTEBOOKS / f"{slug}.ipynb") == []


@pytest.mark.parametrize("profile", run.profiles())
def test_every_profile_fits_every_notebook(profile):
    for slug in run.notebooks():
        assert run.parameters(slug, profile)["profile"] == profile


@pytest.mark.parametrize("slug", run.notebooks())
def test_normalised_as_nbstripout_has_it(slug):
    from nbstripout import strip_output

    nb = nbformat.read(run.NOTEBOOKS / f"{slug}.ipynb", as_version=4)
    kept = nbformat.from_dict(json.loads(json.dumps(nb)))
    assert (
        strip_output(
            nb, keep_output=True, keep_count=True, keep_id=True, extra_keys=STRIPPED.split()
        )
        == kept
    )


# ---- the lint itself


def clean_notebook():
    parameters = 'profile: str = "mini"  # which profile\nseed: int = 0  # base seed'
    nb = new_notebook(
        metadata={
            "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
            "language_info": {"name": "python"},
        }
    )
    nb.cells = [
        new_markdown_cell("# Title"),
        new_code_cell(parameters, metadata={"tags": ["parameters"]}),
        *(new_markdown_cell(f"text {i}") for i in range(6)),
        new_code_cell(
            "# NBVAL_CHECK_OUTPUT\n1 + 1",
            outputs=[new_output("execute_result", {"text/plain": "2"}, execution_count=2)],
        ),
        new_code_cell("provenance = {}"),
    ]
    for count, cell in enumerate(code_cells(nb), 1):
        cell.execution_count = count
    return nb


def stream(nb, text):
    code_cells(nb)[-1].outputs = [new_output("stream", text=text)]


def set_source(nb, text, cell=-1):
    code_cells(nb)[cell].source = text


BREAKS = {
    "at most 15": lambda nb: set_source(nb, "x = 1\n" * 15 + "provenance = {}"),
    "10 to 18": lambda nb: nb.cells.pop(3),
    "at most 120": lambda nb: nb.cells.__setitem__(
        slice(2, 2), [new_code_cell("x = 1\n" * 15, execution_count=1) for _ in range(8)]
    ),
    "not unique": lambda nb: nb.cells[1].update(id=nb.cells[2].id),
    "first cell": lambda nb: nb.cells.insert(0, new_markdown_cell("no title")),
    "last cell": lambda nb: set_source(nb, "x = 1"),
    "0 cells tagged": lambda nb: code_cells(nb)[0].metadata.clear(),
    "is no literal": lambda nb: set_source(
        nb, code_cells(nb)[0].source + "\nn: int = 2 * 3  # six", 0
    ),
    "no annotated literal": lambda nb: set_source(nb, "print(1)\n" + code_cells(nb)[0].source, 0),
    "'n' has no trailing comment": lambda nb: set_source(
        nb, code_cells(nb)[0].source + "\nn: int = 2", 0
    ),
    "'n' is no int": lambda nb: set_source(
        nb, code_cells(nb)[0].source + "\nn: int = 2.5  # six", 0
    ),
    "seed missing": lambda nb: set_source(nb, 'profile: str = "mini"  # which', 0),
    "default to 'mini'": lambda nb: set_source(
        nb, code_cells(nb)[0].source.replace("mini", "lite"), 0
    ),
    "of at most 10": lambda nb: set_source(
        nb, code_cells(nb)[0].source + "".join(f"\nn{i}: int = {i}  # n" for i in range(9)), 0
    ),
    "imports matplotlib": lambda nb: set_source(
        nb, "import matplotlib.pyplot as plt\nprovenance = {}"
    ),
    "no plain Python": lambda nb: set_source(nb, "%matplotlib inline\nprovenance = {}"),
    "NBVAL_CHECK_OUTPUT": lambda nb: set_source(nb, "1 + 1", 1),
    "an absolute path": lambda nb: stream(nb, "read /home/someone/data"),
    "../": lambda nb: set_source(nb, "provenance = '../data'"),
    "pip install": lambda nb: set_source(nb, "provenance = 'pip install x'"),
    "an error": lambda nb: code_cells(nb)[-1].outputs.append(
        new_output("error", ename="E", evalue="", traceback=[])
    ),
    "never run": lambda nb: code_cells(nb)[-1].update(execution_count=None),
    "not normalised": lambda nb: nb.metadata.language_info.update(version="3.11.7"),
    "at most 300": lambda nb: stream(nb, "x" * 300_000),
}


def lint(nb, tmp_path, monkeypatch, name="05_made_up"):
    monkeypatch.setattr(run, "NOTEBOOKS", tmp_path)
    (tmp_path / f"{name}.ipynb").write_text(json.dumps(nb), encoding="utf-8")
    return faults(tmp_path / f"{name}.ipynb")


def test_a_clean_notebook_passes(tmp_path, monkeypatch):
    assert lint(clean_notebook(), tmp_path, monkeypatch) == []


@pytest.mark.parametrize("fault", BREAKS)
def test_each_rule_catches_its_fault(tmp_path, monkeypatch, fault):
    nb = clean_notebook()
    BREAKS[fault](nb)
    found = lint(nb, tmp_path, monkeypatch)
    assert any(fault in line for line in found), found
