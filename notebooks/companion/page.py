"""A notebook's page: what each does with its parameters, runs, figures, tables and claims."""

import time
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib_inline.backend_inline import set_matplotlib_formats

from companion import explore, paper, paths, protocol, run
from companion.features import ALL
from companion.figures import style
from companion.provenance import git, provenance

SHOWN = ("notebook", "seed", "commit", "versions")  # of the provenance, at a page's end


class Page:
    """Hold what a notebook was opened with; the set-up cell makes one from its slug and
    ``globals()``, where lists that papermill's ``-p`` gave as text are read. Raises ValueError for
    an unknown notebook, a parameter without a value and a wrong value.

    ``parameters``: the values of the parameters that the notebook declares. ``used``: every run
    that was handed out, for the provenance of figures and tables. ``profiles``: the parameters that
    its profile gives it.
    """

    def __init__(self, slug: str, namespace: MutableMapping):
        declared = run.declared(slug)
        if absent := [name for name in declared if name not in namespace]:
            raise ValueError(f"{slug}: no value of the parameter '{absent[0]}'; run its cell first")
        self.slug, self.started, self.used = slug, time.time(), []
        self.code = git()  # that runs, whatever is pulled before a figure is saved
        if explore.live():
            set_matplotlib_formats("retina")  # sharp on screens of high density
            explore.stop_in_a_line()
        for name, known in declared.items():
            if isinstance(namespace[name], str):
                namespace[name] = run.parsed(namespace[name], known)
            run.check(slug, name, namespace[name], declared)
        self.parameters = {name: namespace[name] for name in declared}
        self.profiles = run.parameters(slug, self.parameters["profile"])
        self.as_declared = all(
            self.parameters[name] == known["default"] for name, known in declared.items()
        )
        said = [f"{name} {value}" for name, value in self.parameters.items() if name != "profile"]
        print(f"profile {self.parameters['profile']}: {', '.join(said)}")

    def sizes(self) -> dict:
        """Return the parameters that say how many rows are taken, and the seed."""
        names = ("n_train", "n_test", "seed")
        return {name: self.parameters[name] for name in names if name in self.parameters}

    def runs(self, objectives: Sequence = ALL, **options) -> list[protocol.Run]:
        """Return features of every backbone and data set of the page that can be run here.

        What is missing is shown. ``options`` replace parameters (``seed``) or go to
        `protocol.collect` (``projection``).
        """
        chosen = self.parameters["backbones"], self.parameters["datasets"]
        return self.use(protocol.collect(*chosen, objectives, **self.sizes() | options))

    def seeded(
        self, objectives: Sequence = ALL, **options
    ) -> dict[tuple[str, str], list[protocol.Pair]]:
        """Return {(backbone, data set): [(train, test), ...]}, a pair for each of the seeds.

        The page's parameter ``seeds`` is their number; they count from ``seed``. ``options`` go to
        `protocol.collect`.
        """
        first, number = self.parameters["seed"], self.parameters["seeds"]
        found = {run[:2]: [run[2:]] for run in self.runs(objectives, **options)}
        for seed in range(first + 1, first + number):
            for (backbone, dataset), pairs in found.items():
                asked = self.sizes() | options | {"seed": seed}
                more = protocol.collect([backbone], [dataset], objectives, **asked)
                self.use(more)
                pairs.append(more[0][2:])
        return found

    def use(self, runs: Sequence[tuple]) -> Sequence[tuple]:
        """Remember runs (backbone, data set, train, test) that were made otherwise; return them."""
        self.used += runs
        return runs

    def proof(self) -> dict:
        """Return where the numbers come from: parameters, stores, data, commit, versions."""
        rows = [split for *_, train, test in self.used for split in (train, test)]
        data = {
            (part.data.name, part.data.split, part.data.fingerprint): part.data for part in rows
        }
        return provenance(
            self.slug,
            self.parameters,
            stores=list(dict.fromkeys(key for part in rows for key in part.keys)),
            datasets=data.values(),
            started=self.started,
            code=self.code,
        )

    def figure(self, fig, name: str, numbers: pd.DataFrame):
        """Save a figure with its numbers and provenance; return it, so that it is shown."""
        style.save_figure(fig, name, numbers, self.proof(), self.folder())
        return fig

    def table(self, table: pd.DataFrame, name: str, decimals: int = 1):
        """Save a table with its provenance; return it styled, so that it is shown."""
        style.save_table(table, name, self.proof(), self.folder())
        return style.show_table(table, decimals)

    def shelf(self) -> str:
        """Return which results these are: the profile's, or, with other parameters, "own"."""
        return self.parameters["profile"] if self.parameters == self.profiles else "own"

    def folder(self) -> Path:
        """Return where figures and tables are kept: never in place of a profile's own."""
        return paths.figures_dir() / self.shelf()

    def claims(self, measured: Mapping[str, tuple], runs: Sequence[tuple] | str | None = None):
        """Write what was measured for claims to the scoreboard, and return it as a table.

        ``measured``: {claim: (value, low, high)}, or with a fourth entry, what it was measured on
        (default: ``runs``, else all of the page); NaN where a claim cannot be tested.
        """
        on = runs if isinstance(runs, str) else where(self.used if runs is None else runs)
        rows = [(name, *numbers, on)[:5] for name, numbers in measured.items()]
        frame = pd.DataFrame(rows, columns=paper.MEASURED)
        paper.save_measured(frame, self.slug, self.shelf())
        board = paper.scoreboard(self.shelf()).set_index("id").loc[list(measured)].reset_index()
        shown = {
            "claim": board["claim"],
            "paper": board["paper_delta"].map(paper.signed),
            "ours": board["value"].map(paper.signed),
            "interval": [paper.bounds(*row) for row in board[["low", "high"]].to_numpy()],
            "verdict": board["verdict"],
        }
        return style.show_table(pd.DataFrame(shown))

    def check(self, what: str, value: float, stored: float, within: float) -> None:
        """Say whether a headline number is where it was, with the parameters as declared."""
        if not self.as_declared:
            print(f"{what}: other parameters than the stored number's")
            return
        known = paper.claims().set_index("id")
        said = "{item}: {claim}".format(**known.loc[what]) if what in known.index else f"{what}."
        same = bool(np.abs(value - stored) <= within)
        print(f"{said} Measured within {within:g} of the stored {stored:g}: {same}")

    def provenance(self) -> dict:
        """Return the provenance in short; it is whole in each figure's JSON."""
        proof = self.proof()
        return {key: proof[key] for key in SHOWN}


def where(runs: Sequence[tuple]) -> str:
    """Return what claims were measured on, for the scoreboard: data sets; backbones."""
    names = lambda i: ", ".join(dict.fromkeys(one[i] for one in runs))
    return f"{names(1)}; {names(0)}"
