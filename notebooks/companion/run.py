"""Run one notebook with one profile: parameters are checked before a kernel starts, the output
appears whole or not at all, and a failure is one red line.

    python -m companion.run 02_complementarity --profile mini -p seed 1

A profile (``notebooks/profiles/NAME.yaml``) is a flat mapping of parameters, handed to each
notebook that declares them, so that ``papermill -f`` reads it as well; ``notebooks: {NN_slug:
{...}}`` in it goes to one notebook alone.
"""

import argparse
import ast
import logging
import math
import os
import sys
import time
from pathlib import Path

import nbformat
import papermill
import yaml
from nbclient.exceptions import CellTimeoutError, DeadKernelError

from companion import devices
from companion.paths import ROOT

NOTEBOOKS = ROOT / "notebooks"
TYPES = {
    "int": int,
    "float": float,
    "str": str,
    "bool": bool,
    "list": list,
    "dict": dict,
    "None": type(None),
}
# Numbers, alone or in lists, are finite and not negative; these are at least 1.
COUNTS = {
    "k",
    "shots",
    "most",
    "shown",
    "size",
    "seeds",
    "draws",
    "repeats",
    "views_a_call",
    "precision_images",
    "simclr_steps",
    "strides",
}
KEPT_METADATA = {"kernelspec": ("display_name", "language", "name"), "language_info": ("name",)}


def notebooks() -> list[str]:
    """Slugs of all notebooks, in the paper's order."""
    return sorted(p.stem for p in NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))


def profiles() -> list[str]:
    """Names of all profiles."""
    return sorted(p.stem for p in (NOTEBOOKS / "profiles").glob("*.yaml"))


def _known(kind: str, name: str, exist: list[str]) -> str:
    if name not in exist:
        raise ValueError(f"unknown {kind} '{name}'; there are: {', '.join(exist) or 'none'}")
    return name


def declared(slug: str) -> dict[str, dict]:
    """Parameters of a notebook: name -> {"type": annotation, "default": value, "help": trailing
    comment}.
    """
    _known("notebook", slug, notebooks())
    found = {}
    for name, p in papermill.inspect_notebook(NOTEBOOKS / f"{slug}.ipynb").items():
        try:
            default = ast.literal_eval(p["default"])
        except (ValueError, SyntaxError):
            raise ValueError(
                f"{slug}: the default of parameter '{name}' is no literal: {p['default']}"
            ) from None
        found[name] = {"type": p["inferred_type_name"], "default": default, "help": p["help"]}
    return found


def fits(value: object, annotation: str) -> bool:
    """Whether a value has an annotated type: int, float (takes int), str, bool, list, dict,
    list[str], int | None.
    """
    for option in (part.strip() for part in annotation.split("|")):
        outer, _, inner = option.removesuffix("]").partition("[")
        if outer not in TYPES:
            raise ValueError(f"unknown parameter type '{option}'; accepted are: {', '.join(TYPES)}")
        exact = type(value) is TYPES[outer] or (
            outer == "float" and type(value) is int
        )  # a bool is no int here
        if exact and (outer != "list" or not inner or all(fits(v, inner) for v in value)):
            return True
    return False


def _checked(slug: str, name: str, value: object, exist: dict[str, dict]) -> object:
    if name not in exist:
        raise ValueError(f"{slug} has no parameter '{name}'; it has: {', '.join(exist) or 'none'}")
    kind = exist[name]["type"]
    if not fits(value, kind):
        raise ValueError(
            f"{slug}: parameter '{name}' takes {kind}, not {type(value).__name__} {value!r}"
        )
    low, items = int(name in COUNTS), value if isinstance(value, list) else [value]
    for item in items:
        if (
            isinstance(item, (int, float))
            and not isinstance(item, bool)
            and not low <= item < math.inf
        ):
            raise ValueError(
                f"{slug}: parameter '{name}' takes numbers from {low} on, not {item!r}"
            )
    if value == []:
        raise ValueError(f"{slug}: parameter '{name}' needs at least one entry")
    return value


def load_profile(name: str) -> tuple[dict, dict[str, dict]]:
    """(parameters for every notebook that declares them, {slug: parameters of that notebook alone})
    of a profile.
    """
    _known("profile", name, profiles())
    common = (
        yaml.safe_load((NOTEBOOKS / "profiles" / f"{name}.yaml").read_text(encoding="utf-8")) or {}
    )
    own = common.pop("notebooks", None) or {}
    if common.get("profile") != name:
        raise ValueError(f"profile {name}.yaml must hold the line 'profile: {name}'")
    for slug in own:
        _known(f"notebook in profile {name}.yaml", slug, notebooks())
    declared_anywhere = set().union(*(declared(slug) for slug in notebooks()))
    for parameter in common:
        _known(f"parameter in profile {name}.yaml", parameter, sorted(declared_anywhere))
    return common, own


def parameters(slug: str, profile: str = "mini", overrides: dict | None = None) -> dict:
    """All parameters of a notebook under a profile: its defaults, then the profile's, then
    ``overrides``.

    ValueError for an unknown notebook, profile or parameter (listing what exists), for a value of
    the wrong type or out of range.
    """
    exist = declared(slug)
    common, own = load_profile(profile)
    if (overrides or {}).get("profile", profile) != profile:
        raise ValueError(f"{slug}: choose the profile with --profile, not with -p profile")
    given = {k: v for k, v in common.items() if k in exist} | own.get(slug, {}) | (overrides or {})
    return {k: p["default"] for k, p in exist.items()} | {
        k: _checked(slug, k, v, exist) for k, v in given.items()
    }


def normalize(nb: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Strip, in place, what differs between two runs with equal outputs: times, versions, ids,
    stream chunks.

    Outputs and execution counts stay (counts renumbered from 1): nbval compares against them.
    """
    nb.metadata = {
        k: {f: nb.metadata[k][f] for f in fields if f in nb.metadata[k]}
        for k, fields in KEPT_METADATA.items()
        if k in nb.metadata
    }
    count = 0
    for cell in nb.cells:
        cell.metadata = {"tags": cell.metadata.tags} if cell.metadata.get("tags") else {}
        if "injected-parameters" in cell.metadata.get("tags", []):
            cell.id = "injected-parameters"  # papermill draws a random one
        if cell.cell_type != "code" or cell.execution_count is None:
            continue
        cell.execution_count = count = count + 1
        merged = []
        for out in cell.outputs:
            if out.output_type == "execute_result":
                out.execution_count = count
            if out.output_type == "stream" and merged and merged[-1].get("name") == out.name:
                merged[-1].text += out.text  # where a stream is cut depends on the machine's load
            else:
                merged.append(out)
        cell.outputs = merged
    return nbformat.from_dict(nb)


def _last_cell(nb: nbformat.NotebookNode) -> int:
    """Position, from 1, of the last cell that was started, as the source notebook counts them."""
    added = {"injected-parameters", "papermill-error-cell-tag"}
    cells = [c for c in nb.cells if not added & set(c.metadata.get("tags", []))]
    return max(
        (n for n, c in enumerate(cells, 1) if c.metadata.get("papermill", {}).get("start_time")),
        default=0,
    )


def execute(
    slug: str,
    profile: str,
    overrides: dict | None = None,
    out: Path | None = None,
    bar: bool = False,
) -> Path:
    """Run a notebook in its own folder; returns where the executed one lies (default
    runs/PROFILE/SLUG.ipynb).

    A failing cell raises RuntimeError with one line; the partial notebook stays beside ``out`` as
    SLUG.failed.ipynb.
    """
    values = parameters(slug, profile, overrides)
    out = Path(out or ROOT / "runs" / profile / f"{slug}.ipynb").resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_suffix(".failed.ipynb")
    try:
        nb = papermill.execute_notebook(
            NOTEBOOKS / f"{slug}.ipynb",
            partial,
            parameters=values,
            cwd=NOTEBOOKS,
            progress_bar=bar,
            extra_arguments=["--log-level=CRITICAL"],
        )  # nothing about loopback ports or shutting down
    except (papermill.PapermillExecutionError, DeadKernelError, CellTimeoutError) as e:
        kind, text = (
            getattr(e, "ename", type(e).__name__),
            " ".join(str(getattr(e, "evalue", e)).split()),
        )
        cell = _last_cell(nbformat.read(partial, as_version=4))
        raise RuntimeError(
            f"{slug}, cell {cell}: {kind}: {text[:500]} (partial output: {partial})"
        ) from e
    nbformat.write(normalize(nb), partial)
    os.replace(partial, out)
    return out


def _override(slug: str, name: str, text: str) -> object:
    """A command-line value: taken as it stands where the notebook wants a string, else read as
    YAML.
    """
    return text if declared(slug).get(name, {}).get("type") == "str" else yaml.safe_load(text)


def _list() -> None:
    for slug in notebooks():
        print(slug)
        for name, p in declared(slug).items():
            print(f"    {name}: {p['type']} = {p['default']!r}  # {p['help']}")


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status: 0 done, 1 a cell failed, 2 the request was wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m companion.run", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("notebook", nargs="?", help="slug, such as 02_complementarity")
    parser.add_argument(
        "--profile", default="mini", help="a file of notebooks/profiles (default: mini)"
    )
    parser.add_argument(
        "-p", dest="override", nargs=2, action="append", default=[], metavar=("NAME", "VALUE")
    )
    parser.add_argument(
        "--out", type=Path, help="executed notebook (default: runs/PROFILE/NOTEBOOK.ipynb)"
    )
    parser.add_argument(
        "--list", action="store_true", help="show the notebooks with their parameters"
    )
    parser.add_argument(
        "--normalize",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="normalise notebook files in place",
    )
    args = parser.parse_args(argv)
    logging.getLogger("papermill").setLevel(logging.CRITICAL)  # one line on failure, our own
    start = time.perf_counter()
    try:
        for path in args.normalize or []:
            nbformat.write(normalize(nbformat.read(path, as_version=4)), path)
        if args.list:
            _list()
        if args.list or args.normalize:
            return 0
        slug = _known("notebook", args.notebook or "", notebooks())
        devices.claim()  # the kernel inherits it
        overrides = {name: _override(slug, name, text) for name, text in args.override}
        out = execute(slug, args.profile, overrides, args.out, bar=sys.stderr.isatty())
    except (ValueError, RuntimeError, yaml.YAMLError) as e:
        red, plain = ("\033[31m", "\033[0m") if sys.stderr.isatty() else ("", "")
        print(f"{red}{' '.join(str(e).split())}{plain}", file=sys.stderr)
        return 1 if isinstance(e, RuntimeError) else 2
    print(f"{slug} ({args.profile}): {time.perf_counter() - start:.0f} s, {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
