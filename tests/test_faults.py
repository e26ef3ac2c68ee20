"""The table of faults names tests that exist; the list of licences names all that there is."""

import ast
import importlib.util
import re

import pytest

from companion import paths

TABLE = (paths.ROOT / "tests" / "FAULTS.md").read_text()
ROWS = [line for line in TABLE.splitlines() if re.match(r"\| (?!fault|-)", line)]


def test_every_row_names_a_test_and_how_often_it_was_tried():
    assert len(ROWS) > 40
    for row in ROWS:
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert len(cells) == 4 and all(cells), row
        assert re.fullmatch(r"`test_\w+\.py::test_\w+`", cells[2]), row


@pytest.mark.parametrize(
    "file, test", sorted(set(re.findall(r"`(test_\w+\.py)::(test_\w+)`", TABLE)))
)
def test_every_test_of_the_table_exists(file, test):
    tree = ast.parse((paths.ROOT / "tests" / file).read_text())
    assert test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_the_licences_are_those_of_the_tables_and_of_the_lock():
    """Compare names and versions; what a package says of itself depends on the platform.

    To mend: ``make licences``.
    """
    spec = importlib.util.spec_from_file_location("licences", paths.ROOT / "data" / "licences.py")
    spec.loader.exec_module(licences := importlib.util.module_from_spec(spec))
    written = licences.FILE.read_text()
    assert licences.data_and_weights() in written, "out of date: make licences"
    listed = re.findall(r"^\| ([\w.-]+) \| ([\d][\w.]*) \| .+ \|$", written, re.M)
    assert dict(listed) == licences.pins(), "out of date: make licences"
    assert written.count("not installed on this platform") == 0
