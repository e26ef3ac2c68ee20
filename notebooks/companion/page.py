"""What every notebook does: it reads features, saves figures and tables with their provenance, and
tells the scoreboard what it measured.

    page = Page("03_image_classification", globals())    # in the set-up cell
    runs = page.runs()
    page.figure(plots.accuracy_by_features(results), "table02_gradients", results)
"""

import time
from collections.abc import Iterable, Mapping, Sequence

import pandas as pd
from pandas.io.formats.style import Styler

from companion import paper, protocol, run
from companion.figures import style
from fungi_core import extract

COUNTED = {"backbones": "backbone", "datasets": "data set", "sets": "data set"}


class Page:
    """An open notebook: its declared parameters with their values, its start, and what it has read
    so far. Everything that it saves carries this as its provenance.
    """

    def __init__(self, slug: str, names: Mapping):
        """Open the notebook ``slug`` and print one line about it. ``names`` are its variables,
        ``globals()``. Raises ValueError for an unknown notebook or a parameter without a value.
        """
        declared = run.declared(slug)
        if absent := [name for name in declared if name not in names]:
            raise ValueError(f"{slug}: no value of the parameter '{absent[0]}'; run its cell first")
        self.slug, self.started = slug, time.time()
        self.parameters = {name: names[name] for name in declared}
        self.read: list[tuple[str, str]] = []  # (backbone, data set) of every run
        self.stores: dict[str, None] = {}  # keys, in the order in which they were first read
        self.data: dict[tuple, object] = {}  # data sets, by name, split and fingerprint
        counts = [(len(self.parameters[x]), COUNTED[x]) for x in COUNTED if x in declared]
        size = " x ".join(f"{n} {word}{'s' * (n != 1)}" for n, word in counts)
        about = ["profile " + self.parameters["profile"], size, f"seed {self.parameters['seed']}"]
        print(", ".join(filter(None, about)))

    def runs(
        self,
        backbones: Sequence[str] | None = None,
        datasets: Sequence[str] | None = None,
        objectives: Sequence = extract.ALL,
        **options,
    ) -> list[protocol.Run]:
        """Return (backbone, data set, train, test) for every pair that can be run here, as
        `protocol.collect` does.

        Backbones, data sets, ``n_train``, ``n_test`` and ``seed`` are the notebook's parameters
        unless given; further ``options`` are those of `protocol.collect`.
        """
        own = self.parameters
        sizes = {name: own[name] for name in ("n_train", "n_test", "seed")} | options
        backbones = own["backbones"] if backbones is None else backbones
        datasets = own["datasets"] if datasets is None else datasets
        return self.used(protocol.collect(backbones, datasets, objectives, **sizes))

    def used(self, runs: Sequence[protocol.Run]) -> Sequence[protocol.Run]:
        """Remember runs that were made otherwise, for the provenance; returns them."""
        self.read += [(backbone, dataset) for backbone, dataset, *_ in runs]
        for *_, train, test in runs:
            for rows in (train, test):
                self.used_data([rows.data], rows.store_keys)
        return runs

    def used_data(self, data: Iterable, stores: Iterable[str] = ()) -> None:
        """Remember data sets and the keys of stores that no run holds, for the provenance."""
        self.data |= {(d.name, d.split, d.fingerprint): d for d in data}
        self.stores |= dict.fromkeys(stores)

    def proof(self) -> dict:
        """Return the whole provenance: notebook, all its parameters, seed, stores, data sets,
        commit, versions, device, and the seconds since it was opened.
        """
        return style.provenance(
            self.slug,
            self.parameters,
            seed=self.parameters["seed"],
            stores=self.stores,
            datasets=self.data.values(),
            started=self.started,
        )

    def provenance(self) -> dict:
        """Return the short provenance that is shown last; the whole is in each figure's JSON."""
        proof = self.proof()
        return {key: proof[key] for key in ("notebook", "seed", "commit", "versions")}

    def figure(self, fig: style.Figure, stem: str, numbers: pd.DataFrame) -> style.Figure:
        """Save a figure as STEM.png and .pdf, the numbers it draws as .csv and its provenance as
        .json; returns it, as the value of its cell.
        """
        style.save_figure(fig, stem, numbers, self.proof())
        return fig

    def table(self, frame: pd.DataFrame, stem: str, decimals: int = 1):
        """Save a table as STEM.csv with its provenance as .json; returns it styled, for display."""
        return style.save_table(frame, stem, self.proof(), decimals=decimals)

    def claims(
        self, measured: Mapping[str, Sequence], runs: Sequence[protocol.Run] | None = None
    ) -> Styler:
        """Save what was measured for the notebook's claims, for the scoreboard; returns each claim
        in words beside the paper's number, ours, its interval and the verdict, for display.

        ``measured`` is {claim id: (value, low, high)}, NaN where a claim cannot be tested or has no
        interval. They were measured on ``runs`` (all that the page has read unless given); a fourth
        entry of one claim says in words where that one was measured, or what it lacks.
        """
        where = on(self.read if runs is None else runs)
        # The fourth entry is the claim's own, where it has one.
        rows = [(name, *(*numbers, where)[:4]) for name, numbers in measured.items()]
        frame = pd.DataFrame(rows, columns=paper.MEASURED)
        paper.save_measured(frame, self.slug, self.parameters["profile"])
        board = paper.scoreboard(self.parameters["profile"]).set_index("id").loc[list(measured)]
        shown = {
            "claim": board["claim"],
            "theirs": board["paper_delta"].map(paper.signed),
            "ours": board["value"].map(paper.signed),
            "interval": [paper.bounds(row) for row in board.to_dict("records")],
            "verdict": board["verdict"],
        }
        styled = pd.DataFrame(shown).style.hide(axis="index").set_uuid("claims")
        return styled.set_properties(**{"text-align": "left"}, subset=["claim", "verdict"])


def on(runs: Sequence[tuple]) -> str:
    """Return what a claim was measured on, for the scoreboard: "data sets; backbones"."""
    names = lambda i: ", ".join(dict.fromkeys(run[i] for run in runs))
    return f"{names(1)}; {names(0)}"
