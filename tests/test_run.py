"""The notebook runner: parameters checked before a kernel starts, output whole or absent, failure
one line.
"""

import ast
import copy
import hashlib
import os
from contextlib import nullcontext
from pathlib import Path

import nbformat
import papermill
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from companion import paths, run

PARAMETERS = """\
profile: str = "mini"  # which profile
seed: int = 0  # base seed
n_train: int = 10  # images of the memory bank
ratio: float = 0.5  # a share
verbose: bool = False  # say more
backbones: list = ["a"]  # encoders
datasets: list = ["x"]  # data sets"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A notebooks folder of two notebooks, one of which breaks, with the profiles mini and big."""
    here = tmp_path / "notebooks"
    (here / "profiles").mkdir(parents=True)
    monkeypatch.setattr(run, "NOTEBOOKS", here)
    (here / "profiles" / "mini.yaml").write_text("profile: mini\n")
    (here / "profiles" / "big.yaml").write_text(
        "profile: big\nn_train: 500\nnotebooks:\n  01_fine:\n    backbones: [b, c]\n"
    )
    write(
        here / "01_fine.ipynb",
        PARAMETERS,
        "import os; print(profile, seed, n_train, backbones, os.getcwd())",
    )
    write(
        here / "02_broken.ipynb",
        'profile: str = "mini"  # which profile\nseed: int = 0  # base seed',
        "print('before')",
        "raise KeyError(f'no such thing\\nseed {seed}')",
        "print('never')",
    )
    return here


def write(path: Path, parameters: str, *code: str) -> None:
    nb = new_notebook(
        metadata={
            "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
            "language_info": {"name": "python"},
        }
    )
    nb.cells = [
        new_markdown_cell("# Title"),
        new_code_cell(parameters, metadata={"tags": ["parameters"]}),
        *map(new_code_cell, code),
    ]
    nbformat.write(nb, path)


def printed(path: Path) -> str:
    nb = nbformat.read(path, as_version=4)
    return "".join(
        out.text for cell in nb.cells if cell.cell_type == "code" for out in cell.outputs
    )


def test_parameters_are_defaults_then_profile_then_overrides(folder):
    assert run.parameters("01_fine")["n_train"] == 10
    big = run.parameters("01_fine", "big", {"seed": 3})
    expected = {"profile": "big", "n_train": 500, "backbones": ["b", "c"], "seed": 3, "ratio": 0.5}
    assert {name: big[name] for name in expected} == expected
    assert run.parameters("02_broken", "big") == {
        "profile": "big",
        "seed": 0,
    }  # n_train is not its own


@pytest.mark.parametrize("value, annotation, expected", [
    (1, "int", True), (True, "int", False), (1.0, "int", False), ("1", "int", False),
    (1, "float", True), (0.5, "float", True), (True, "float", False),
    ("x", "str", True), (None, "str", False),
    (True, "bool", True), (1, "bool", False), (["a"], "list", True), ("a", "list", False),
])  # fmt: skip
def test_types_of_parameters(value, annotation, expected):
    known = {"x": {"type": annotation, "default": ["a"]}}
    with nullcontext() if expected else pytest.raises(ValueError, match=f"'x' takes {annotation}"):
        run.check("01_fine", "x", value, known)


def test_an_unknown_annotation_is_an_error():
    with pytest.raises(ValueError, match="unknown parameter type 'tensor'; there are int"):
        run.check("01_fine", "x", 1, {"x": {"type": "tensor"}})


@pytest.mark.parametrize("arguments, words", [
    (["03_none"], ["unknown notebook '03_none'", "01_fine", "02_broken"]),
    (["01_fine", "--profile", "huge"], ["unknown profile 'huge'", "big", "mini"]),
    (["01_fine", "-p", "n_trian", "3"],
     ["unknown parameter of 01_fine 'n_trian' (did you mean 'n_train'?)", "backbones"]),
    (["01_fine", "-p", "seed", "one"], ["'seed' takes int", "str 'one'"]),
    (["01_fine", "-p", "verbose", "1"], ["'verbose' takes bool", "int 1"]),
    (["01_fine", "-p", "backbones", "resnet"], ["'backbones' takes list", "str 'resnet'"]),
    (["01_fine", "-p", "n_train", "-1"], ["'n_train' takes numbers from 0 on, not -1"]),
    (["01_fine", "-p", "seed", "-3"], ["'seed' takes numbers from 0 on, not -3"]),
    (["01_fine", "-p", "ratio", "nan"], ["'ratio' takes numbers from 0 on, not nan"]),
    (["01_fine", "-p", "ratio", "inf"], ["'ratio' takes numbers from 0 on, not inf"]),
    (["01_fine", "-p", "backbones", "[]"], ["'backbones' needs at least one entry"]),
    (["01_fine", "-p", "datasets", "[x"], ["expected ',' or ']'"]),
    (["01_fine", "-p", "profile", "big"], ["choose the profile with --profile"]),
])  # fmt: skip
def test_a_wrong_request_is_one_line_before_any_kernel(
    folder, tmp_path, capsys, monkeypatch, arguments, words
):
    monkeypatch.setattr(
        papermill, "execute_notebook", lambda *a, **k: pytest.fail("a kernel was started")
    )
    out = tmp_path / "out.ipynb"
    assert run.main([*arguments, "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(word in error for word in words), error
    assert not out.exists()


@pytest.mark.parametrize("name", sorted(run.COUNTS))
def test_counts_begin_at_one(name):
    for right, wrong, annotation in ((1, 0, "int"), (2, -1, "int"), ([1, 2], [1, 0], "list")):
        exist = {name: {"type": annotation, "default": right, "help": ""}}
        run.check("01_fine", name, right, exist)
        with pytest.raises(ValueError, match=f"'{name}' takes numbers from 1 on, not "):
            run.check("01_fine", name, wrong, exist)


def test_every_notebook_is_in_range_under_every_profile_and_every_count_is_somebodys():
    found = set()
    for slug in run.notebooks():
        exist = run.declared(slug)
        found |= exist.keys()
        for profile in run.profiles():
            for name, value in run.parameters(slug, profile).items():
                run.check(slug, name, value, exist)
    assert found >= run.COUNTS


@pytest.mark.parametrize("text, words", [
    ("profile: mini\nn_train: -5\n", ["'n_train' takes numbers from 0 on"]),
    ("profile: mini\nn_trian: 3\n", ["unknown parameter in profile mini.yaml 'n_trian'"]),
    ("profile: mini\nn_train: many\n", ["'n_train' takes int"]),
    ("profile: mini\nnotebooks: {05_none: {seed: 1}}\n",
     ["unknown notebook in profile mini.yaml '05_none'"]),
    ("profile: mini\nnotebooks: {01_fine: {sede: 1}}\n",
     ["unknown parameter of 01_fine 'sede' (did you mean 'seed'?)"]),
    ("n_train: 3\n", ["must hold the line 'profile: mini'"]),
])  # fmt: skip
def test_a_wrong_profile_is_one_line(folder, capsys, text, words):
    (folder / "profiles" / "mini.yaml").write_text(text)
    assert run.main(["01_fine"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(word in error for word in words), error


def test_runs_from_another_folder_and_repeats_byte_for_byte(folder, tmp_path, monkeypatch, capsys):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    digests = []
    for name in ("one", "two"):
        assert (
            run.main(
                ["01_fine", "--profile", "big", "-p", "seed", "7", "--out", f"{name}/out.ipynb"]
            )
            == 0
        )
        digests.append(hashlib.sha256((elsewhere / name / "out.ipynb").read_bytes()).hexdigest())
        assert printed(elsewhere / name / "out.ipynb") == f"big 7 500 ['b', 'c'] {folder}\n"
        assert os.listdir(elsewhere / name) == ["out.ipynb"]
    assert digests[0] == digests[1]
    assert capsys.readouterr().out.startswith("01_fine (big): ")


def test_a_broken_cell_leaves_the_partial_notebook_and_one_line(folder, tmp_path, capsys):
    out = tmp_path / "runs" / "02_broken.ipynb"
    assert run.main(["02_broken", "-p", "seed", "5", "--out", str(out)]) == 1
    error = capsys.readouterr().err
    assert (
        error.startswith("02_broken, cell 4: KeyError: 'no such thing\\nseed 5'")
        and error.count("\n") == 1
    ), error
    assert not out.exists()
    assert out.with_suffix(".failed.ipynb").name in error
    assert "before" in out.with_suffix(".failed.ipynb").read_text()


def test_a_kernel_that_dies_is_named_too_and_a_later_success_removes_the_partial(
    folder, tmp_path, capsys
):
    out = tmp_path / "out.ipynb"
    write(
        folder / "02_broken.ipynb",
        PARAMETERS,
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    )
    assert run.main(["02_broken", "--out", str(out)]) == 1
    assert capsys.readouterr().err.startswith("02_broken, cell 3: DeadKernelError: ")
    write(folder / "02_broken.ipynb", PARAMETERS, "print('fixed')")
    assert run.main(["02_broken", "--out", str(out)]) == 0
    assert not out.with_suffix(".failed.ipynb").exists()
    assert printed(out) == "fixed\n"


def test_a_notebook_that_ends_for_want_of_data_is_a_line_and_no_success(folder, tmp_path, capsys):
    end = "from companion import explore\nexplore.end('needs flowers102')"
    write(folder / "02_broken.ipynb", PARAMETERS, end, "print('never')")
    assert run.main(["02_broken", "--out", str(tmp_path / "out.ipynb")]) == 3
    assert capsys.readouterr() == ("", "02_broken (mini): needs flowers102\n")
    assert 'never\\n"' not in (tmp_path / "out.ipynb").read_text()


def test_declared_reads_what_papermill_reads(folder):
    """The cell tagged "parameters" has one reader of ours, without the second that papermill
    takes to import.
    """
    theirs = papermill.inspect_notebook(folder / "01_fine.ipynb")
    ours = run.declared("01_fine")
    assert ours["datasets"] == {"type": "list", "default": ["x"], "help": "data sets"}
    assert list(ours) == list(theirs)
    for name, parameter in ours.items():
        known = theirs[name]
        assert parameter["type"] == known["inferred_type_name"]
        assert parameter["default"] == ast.literal_eval(known["default"])
        assert parameter["help"] == known["help"]


def test_plain_papermill_reads_a_profile(folder, tmp_path):
    profile = {
        "profile": "big",
        "n_train": 500,
        "notebooks": {"01_fine": {"backbones": ["b", "c"]}},
    }
    papermill.execute_notebook(
        folder / "01_fine.ipynb", tmp_path / "out.ipynb", profile, progress_bar=False
    )
    assert printed(tmp_path / "out.ipynb").startswith("big 0 500 ['a']")


def test_normalize_strips_runs_and_keeps_results(folder):
    nb = nbformat.read(folder / "01_fine.ipynb", as_version=4)
    stream = lambda name, text: nbformat.v4.new_output("stream", name=name, text=text)
    result = nbformat.v4.new_output("execute_result", execution_count=1)
    nb.cells[2].execution_count = 1
    nb.cells[2].outputs = [stream("stdout", "ab"), stream("stderr", "c"), result]
    clean = nbformat.from_dict(copy.deepcopy(nb))
    nb.cells[2].outputs[:1] = [stream("stdout", "a"), stream("stdout", "b")]
    nb.metadata["widgets"], nb.metadata.language_info["version"] = {"state": 1}, "3.11.7"
    nb.metadata["papermill"] = {"duration": 1.0}
    nb.cells[2].metadata.update(execution={"iopub.execute_input": "noon"})
    nb.cells[2].metadata.update(papermill={"duration": 1.0})
    assert nb != clean
    assert run.normalize(nb) == clean


# ---- the real notebooks: slow ones with --slow; nbval runs every one of them in any case


SUFFIXES = {"figure": ("png", "pdf", "csv", "json"), "table": ("csv", "json")}


def written_files(slug: str) -> set[str]:
    """Files that a notebook writes by `Page.figure` and `Page.table`, where their names are
    literals.
    """
    nb = nbformat.read(run.NOTEBOOKS / f"{slug}.ipynb", as_version=4)
    trees = [ast.parse(cell.source) for cell in nb.cells if cell.cell_type == "code"]
    calls = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Call)]
    found = set()
    for call in calls:
        kind = getattr(call.func, "attr", "").removeprefix("save_")
        names = [arg.value for arg in call.args[1:2] if isinstance(arg, ast.Constant)]
        found |= {f"{name}.{suffix}" for name in names for suffix in SUFFIXES.get(kind, ())}
    return found


def contents(folder: Path, *suffixes: str) -> dict[str, str]:
    files = sorted(
        p for p in folder.rglob("*") if p.is_file() and (not suffixes or p.suffix in suffixes)
    )
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def stored() -> dict[str, int]:
    """Feature files and when they were written; locks come and go."""
    return {
        str(p): p.stat().st_mtime_ns
        for p in paths.store_dir().rglob("*")
        if p.is_file() and "lock" not in p.name
    }


QUICK = {
    "02_complementarity"
}  # reads all features of the mini profile: the whole path once, in every test run


@pytest.mark.contract
@pytest.mark.parametrize(
    "slug", [s if s in QUICK else pytest.param(s, marks=pytest.mark.slow) for s in run.notebooks()]
)
def test_contract(slug, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    figures = paths.figures_dir() / "mini"
    run.execute(slug, "mini", out=tmp_path / "first.ipynb")
    assert [name for name in written_files(slug) if not (figures / name).is_file()] == []
    before, drawn = stored(), contents(figures, ".png", ".pdf", ".csv")
    run.execute(slug, "mini", out=tmp_path / "second.ipynb")
    assert stored() == before, "the second run wrote features"
    if slug != "17_throughput":  # measures time
        assert contents(figures, ".png", ".pdf", ".csv") == drawn, (
            "the second run drew other figures"
        )
    assert sorted(os.listdir(tmp_path)) == ["first.ipynb", "second.ipynb"], (
        "a notebook wrote into the caller's folder"
    )


@pytest.mark.contract
@pytest.mark.parametrize(
    "slug",
    [s if s == "01_method" else pytest.param(s, marks=pytest.mark.slow) for s in run.notebooks()],
)
def test_without_data_or_network_the_papers_profile_ends_with_one_table(
    slug, tmp_path, monkeypatch
):
    """Plain papermill, as a reader has it: a success, no traceback, no word of IPython's on how to
    quit.
    """
    monkeypatch.setenv("FUNGI_DATA", str(tmp_path))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))  # no weights there
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # and none to be had
    monkeypatch.setenv("FUNGI_FIGURES", str(tmp_path / "figures"))
    parameters, book = run.parameters(slug, "paper"), run.NOTEBOOKS / f"{slug}.ipynb"
    nb = papermill.execute_notebook(book, tmp_path / "out.ipynb", parameters, progress_bar=False)
    outputs = [out for cell in nb.cells for out in cell.get("outputs", [])]
    assert [out["text"] for out in outputs if out.get("name") == "stderr"] == []
    if slug in ("00_start_here", "19_scoreboard", "20_your_own_data"):  # need nothing: ran through
        assert "error" not in {out["output_type"] for out in outputs}
        return
    *_, table, end = outputs
    assert (end["ename"], end["evalue"], len(end["traceback"])) == ("SystemExit", "0", 1)
    assert end["traceback"][0].startswith("Nothing can be run here")
    tables = [out for out in outputs if out.output_type == "display_data"]
    assert tables == [table]
    parts = ["size", "licence", "how to get it", parameters["backbones"][0]]
    if "vit_base_patch14_dinov2.lvd142m" in parameters["backbones"]:
        parts += ["0.35 GB", "hf download timm/vit_base_patch14_dinov2.lvd142m"]
    for part in parts:
        assert part in table["data"]["text/html"]


def test_a_kernel_whose_port_was_taken_is_started_once_more(folder, monkeypatch, tmp_path):
    """Two kernels that start at the same time may choose the same port; one of them dies."""
    tried, real = [], papermill.execute_notebook

    def taken(*args, **options):
        tried.append(args)
        if len(tried) == 1:
            raise RuntimeError("Kernel died before replying to kernel_info")
        return real(*args, **options)

    monkeypatch.setattr(papermill, "execute_notebook", taken)
    assert run.execute("01_fine", "mini", out=tmp_path / "out.ipynb").is_file()
    assert len(tried) == 2


def test_a_kernel_that_does_not_come_up_names_its_notebook(folder, monkeypatch, tmp_path):
    def taken(*args, **options):
        raise RuntimeError("Kernel died before replying to kernel_info")

    monkeypatch.setattr(papermill, "execute_notebook", taken)
    line = "^01_fine: its kernel did not come up: Kernel died before replying to kernel_info$"
    with pytest.raises(RuntimeError, match=line):
        run.execute("01_fine", "mini", out=tmp_path / "out.ipynb")
