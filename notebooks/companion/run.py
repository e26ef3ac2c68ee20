"""Run one notebook with one profile: parameters are checked before a kernel starts, the output
appears whole or not at all, and a failure is one red line.

    python -m companion.run 02_complementarity --profile mini -p seed 1

A profile (``notebooks/profiles/NAME.yaml``) is a flat mapping of parameters, handed to each
notebook that declares them; ``notebooks: {NN_slug: {...}}`` in it goes to one notebook alone.
"""

# papermill and nbformat take a second to import, and the kernel of every notebook imports this
# module (through `page`): they are imported where they are used.
import argparse
import ast
import json
import logging
import math
import os
import resource
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from functools import cache
from pathlib import Path

import yaml

from companion import devices
from companion.messages import one_line, require
from companion.paths import ROOT

NOTEBOOKS = ROOT / "notebooks"
# Annotations that a parameter may have, and the types of its values; a bool is no int here.
TYPES = {"int": (int,), "float": (float, int), "str": (str,), "bool": (bool,), "list": (list,)}
# Numbers, alone or in lists, are finite and not negative; these are at least 1.
COUNTS = frozenset(
    "k shots most shown side rounds seeds draws repeats views_a_call precision_images simclr_steps"
    " strides".split()
)  # fmt: skip
# What differs between two runs with equal outputs, beside what nbstripout always removes.
STRIPPED = """metadata.papermill cell.metadata.papermill cell.metadata.execution metadata.widgets
    metadata.language_info.codemirror_mode metadata.language_info.file_extension
    metadata.language_info.mimetype metadata.language_info.nbconvert_exporter
    metadata.language_info.pygments_lexer metadata.language_info.version""".split()


def notebooks() -> list[str]:
    """Return the slugs of all notebooks, in the paper's order."""
    return sorted(p.stem for p in NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))


def profiles() -> list[str]:
    """Return the names of all profiles."""
    return sorted(p.stem for p in (NOTEBOOKS / "profiles").glob("*.yaml"))


def declared(slug: str) -> dict[str, dict]:
    """Read the parameters that a notebook declares, in the cell tagged "parameters".

    Returns {name: {"type": annotation, "default": value, "help": trailing comment}}. Raises
    ValueError for an unknown notebook and for a default that is no literal.
    """
    require("notebook", slug, notebooks())
    file = NOTEBOOKS / f"{slug}.ipynb"
    return deepcopy(_declared(file, file.stat().st_mtime_ns))


@cache  # a plan asks for every notebook's, for every notebook
def _declared(file: Path, changed: int) -> dict[str, dict]:
    cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
    tagged = [cell for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
    source = "".join(line for cell in tagged for line in cell["source"])
    found = {}
    for node in (n for n in ast.parse(source).body if isinstance(n, ast.AnnAssign)):
        name, line = node.target.id, source.splitlines()[node.lineno - 1]
        try:
            default = ast.literal_eval(node.value)
        except ValueError:
            raise ValueError(
                f"{file.stem}: the default of '{name}' is no literal: {line}"
            ) from None
        annotation, comment = ast.unparse(node.annotation), line.partition("  # ")[2]
        found[name] = {"type": annotation, "default": default, "help": comment}
    return found


def check(slug: str, name: str, value: object, exist: dict[str, dict]) -> None:
    """Raise ValueError where a notebook has no such parameter (``exist``: those declared), or the
    value has another type or is out of range.
    """
    require(f"parameter of {slug}", name, exist)
    wanted, low = exist[name]["type"], int(name in COUNTS)
    require("parameter type", wanted, TYPES)
    if type(value) not in TYPES[wanted]:
        given = f"{type(value).__name__} {value!r}"
        raise ValueError(f"{slug}: parameter '{name}' takes {wanted}, not {given}")
    if value == []:
        raise ValueError(f"{slug}: parameter '{name}' needs at least one entry")
    names = wanted == "list" and _lists_names(exist[name])
    for item in value if isinstance(value, list) else [value]:
        if wanted == "list" and isinstance(item, str) != names:
            kind = "names" if names else "numbers"
            raise ValueError(f"{slug}: parameter '{name}' lists {kind}, not {item!r}")
        if type(item) in (int, float) and not low <= item < math.inf:
            raise ValueError(
                f"{slug}: parameter '{name}' takes numbers from {low} on, not {item!r}"
            )


def parsed(text: str, parameter: dict) -> object:
    """Read what a command line gives for a declared parameter, as its type takes it.

    YAML says where a list ends, never what a word is: by its rules 9e-1 is text, a folder's name
    2024 a number and 010 eight. Raises YAMLError for an open bracket.
    """
    if parameter["type"] == "str":
        return text
    value = yaml.BaseLoader(text).get_single_data()  # text, lists and mappings, nothing else
    if not isinstance(value, list):
        return _number(value)
    return value if _lists_names(parameter) else [_number(one) for one in value]


def _lists_names(parameter: dict) -> bool:
    """Say whether a declared list holds names; else it holds numbers."""
    return all(isinstance(one, str) for one in parameter["default"])


def _number(word: object) -> object:
    """Return the int, float or bool that a word writes; anything else as it is."""
    for kind in (int, float):
        with suppress(ValueError, TypeError):
            return kind(word)
    return {"true": True, "false": False}.get(str(word).lower(), word)


def load_profile(name: str) -> tuple[dict, dict[str, dict]]:
    """Read a profile: the parameters for every notebook that declares them, and {slug: parameters
    of that notebook alone}. Raises ValueError for an unknown profile, notebook or parameter.
    """
    require("profile", name, profiles())
    file = NOTEBOOKS / "profiles" / f"{name}.yaml"
    common = yaml.safe_load(file.read_text(encoding="utf-8"))
    common = common if isinstance(common, dict) else {}
    own = {slug: given or {} for slug, given in (common.pop("notebooks", None) or {}).items()}
    if common.get("profile") != name:
        raise ValueError(f"profile {file.name} must hold the line 'profile: {name}'")
    for slug in own:
        require(f"notebook in profile {file.name}", slug, notebooks())
    anywhere = sorted(set().union(*(declared(slug) for slug in notebooks())))
    for parameter in common:
        require(f"parameter in profile {file.name}", parameter, anywhere)
    return common, own


def parameters(slug: str, profile: str = "mini", overrides: dict | None = None) -> dict:
    """Return a notebook's parameters: its defaults, then the profile's, then ``overrides``.

    Raises ValueError for an unknown notebook, profile or name, and for a value that does not fit.
    """
    exist, overrides = declared(slug), overrides or {}
    common, own = load_profile(profile)
    if overrides.get("profile", profile) != profile:
        raise ValueError(f"{slug}: choose the profile with --profile, not with -p profile")
    given = {name: value for name, value in common.items() if name in exist}
    given |= own.get(slug, {}) | overrides
    for name, value in given.items():
        check(slug, name, value, exist)
    return {name: parameter["default"] for name, parameter in exist.items()} | given


def normalize(notebook):
    """Strip in place what differs between two runs with equal outputs; return the notebook."""
    from nbconvert.preprocessors import CoalesceStreamsPreprocessor
    from nbstripout import strip_output

    # Where a stream is cut into pieces depends on the machine's load.
    merged, _ = CoalesceStreamsPreprocessor().preprocess(notebook, {})
    return strip_output(
        merged, keep_output=True, keep_count=True, keep_id=True, extra_keys=STRIPPED
    )


def started(start: Callable, *args, **options):
    """Call ``start``, and once more where its kernel did not come up.

    A kernel beside it can take a port between its choice and its use. One that dies later raises a
    subclass of RuntimeError, which is not tried again.
    """
    try:
        return start(*args, **options)
    except RuntimeError as e:
        if type(e) is not RuntimeError:
            raise
        return start(*args, **options)


def execute(
    slug: str, profile: str, overrides: dict | None = None, out: Path | None = None
) -> Path:
    """Run a notebook in its own folder and return where the executed one lies (default
    runs/PROFILE/SLUG.ipynb, with ``overrides`` runs/own/SLUG.ipynb).

    A failing cell, or a kernel that does not come up, raises RuntimeError with one line; the
    partial notebook stays beside ``out`` as SLUG.failed.ipynb.
    """
    import nbformat
    import papermill
    from nbclient.exceptions import CellTimeoutError, DeadKernelError

    values = parameters(slug, profile, overrides)
    out = Path(out or ROOT / "runs" / ("own" if overrides else profile) / f"{slug}.ipynb").resolve()
    if out.is_dir():
        raise ValueError(f"{out} is a folder; name a file in it, such as {out / slug}.ipynb")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_suffix(".failed.ipynb")
    try:
        executed = started(
            papermill.execute_notebook,
            NOTEBOOKS / f"{slug}.ipynb",
            partial,
            parameters=values,
            cwd=NOTEBOOKS,
            progress_bar=sys.stderr.isatty(),
            extra_arguments=["--log-level=CRITICAL"],  # nothing about loopback ports
        )
    except (papermill.PapermillExecutionError, DeadKernelError, CellTimeoutError) as e:
        kind = getattr(e, "ename", type(e).__name__)
        text = " ".join(str(getattr(e, "evalue", e)).split())[:500]
        times = [c.metadata.get("papermill", {}) for c in nbformat.read(partial, 4).cells]
        cell = sum(bool(t.get("start_time")) for t in times) - 1  # one holds the parameters given
        raise RuntimeError(
            f"{slug}, cell {cell}: {kind}: {text} (partial output: {partial})"
        ) from e
    except RuntimeError as e:  # of no cell: `started` tried twice
        raise RuntimeError(f"{slug}: its kernel did not come up: {e}") from e
    for cell in executed.cells:
        if "injected-parameters" in cell.metadata.get("tags", []):
            cell.id = "injected-parameters"  # papermill draws a random one
    nbformat.write(normalize(executed), partial)
    os.replace(partial, out)
    return out


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return 0 (done), 1 (a cell failed), 2 (wrong request), 3 (no data)."""
    parser = argparse.ArgumentParser(
        "python -m companion.run", description=__doc__.split("\n\n")[0]
    )
    add = parser.add_argument
    add("notebook", help="slug, such as 02_complementarity")
    add("--profile", default="mini", help="a file of notebooks/profiles (default: mini)")
    add("-p", dest="override", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    add("--out", type=Path, help="executed notebook (default: in runs/PROFILE; with -p: runs/own)")
    args, start = parser.parse_args(argv), time.perf_counter()
    logging.getLogger("papermill").setLevel(logging.CRITICAL)  # one line on failure, our own
    try:
        exist = declared(args.notebook)
        unknown = {"type": "str"}  # `parameters` names it
        overrides = {name: parsed(text, exist.get(name, unknown)) for name, text in args.override}
        devices.claim()  # the kernel inherits it
        os.environ.pop("JPY_SESSION_NAME", None)  # nobody watches, where a notebook asked for it
        out = execute(args.notebook, args.profile, overrides, args.out)
    except (ValueError, RuntimeError, OSError, yaml.YAMLError) as e:
        red, plain = ("\033[31m", "\033[0m") if sys.stderr.isatty() else ("", "")
        print(f"{red}{one_line(e)}{plain}", file=sys.stderr)
        return 1 if isinstance(e, RuntimeError) else 2
    cells = json.loads(out.read_text(encoding="utf-8"))["cells"]
    shown = [output for cell in cells for output in cell.get("outputs", [])]
    if ended := [output for output in shown if output.get("ename") == "SystemExit"]:
        print(f"{args.notebook} ({args.profile}): {ended[0]['traceback'][0]}", file=sys.stderr)
        return 3
    took, held = time.perf_counter() - start, peak_bytes() / 1e9
    print(f"{args.notebook} ({args.profile}): {took:.0f} s, {held:.1f} GB at its peak, {out}")
    return 0


def peak_bytes() -> int:
    """Return the most memory that a finished child of this process held at once."""
    held = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return held * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    sys.exit(main())
