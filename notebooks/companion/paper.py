"""The numbers printed in the paper (Tables 1-16, 19 and 22), its claims, and our own numbers beside
them.

One row of ``data/paper/tableNN.csv`` is one printed number. ``row`` is the feature set
("Embeddings", printed also as "Features"; "FUNGI"; "E+K+D+S" = embedding joined with the KL, DINO
and SimCLR gradients) or the printed row name; ``column`` the backbone or the data set; ``setting``
the rest ("full", "5-shot" = printed "Few Shot", memory size, "Oxford M"). ``value`` is in percent
unless ``metric`` says otherwise; ``delta`` is the difference printed beside it, in the same unit,
empty where none is printed. ``backbone`` (Tables 1, 5) and ``spread`` (Table 9, one standard
deviation) exist only where the table needs them.
"""

import json

import pandas as pd

from companion.paths import figures_dir, paper_dir

COLUMNS = ["table", "row", "column", "setting", "metric", "value", "delta"]
EXTRA = ["backbone", "spread"]
MEASURED = ["id", "value", "low", "high", "on"]
ITEM_COLUMNS = ["item", "notebook", "shows"]
CLAIM_COLUMNS = ["id", "item", "claim", "notebook", "paper_number", "paper_delta", "expected"]
TEXT = {
    *ITEM_COLUMNS,
    "row",
    "column",
    "setting",
    "metric",
    "backbone",
    "id",
    "claim",
    "paper_number",
    "expected",
}

NOTES = {
    3: "‡: HummingBird is quoted from Balazevic et al. (2024), largest memory bank only.",
    4: "‡: end-to-end fine-tuning (E2E FT) is quoted from Balazevic et al. (2024); n = number of labelled images.",
    5: "AG News uses 10 shots, the other data sets 5.",
    6: "The marks for norm and projection are lost in the text version: rows are numbered as printed, only the default "
    "row of KL and DINO is certain. SimCLR's first row is printed N/A.",
    7: "‡: HummingBird is quoted from Balazevic et al. (2024), largest memory bank only.",
    11: "The printed gain of E+S on ESC 50 (full) is 2.5; the printed values differ by 2.4.",
    13: "Printed MoCov3 ViT-B/32; every other place of the paper has MoCov3 ViT-B/16.",
    15: "The marks for independent heads are lost in the text version; the running text says that they are better.",
    22: "Performance is of the embedding joined with the one gradient. Table 2 has other accuracies for the same "
    "backbone: 65.3 (Embeddings) and 66.3 (E+K) against 67.3 and 68.2 here.",
}


def tables() -> list[int]:
    """Numbers of the tables that are stored."""
    return sorted(
        int(path.stem.removeprefix("table")) for path in paper_dir().glob("table[0-9][0-9].csv")
    )


def load(table: int) -> pd.DataFrame:
    """One table of the paper, tidy: one row per printed number (columns: see the module).

    What a reader must know of the table is in ``frame.attrs["note"]``. Raises ValueError for a
    table that is not stored (the message lists those that are) and for a file whose columns are not
    the expected ones.
    """
    if table not in tables():
        raise ValueError(
            f"no table {table!r} of the paper is stored; there are {', '.join(map(str, tables()))}"
        )
    frame = _read(f"table{table:02d}.csv", COLUMNS, EXTRA)
    frame.attrs["note"] = NOTES.get(table, "")
    return frame


def claims() -> pd.DataFrame:
    """What the paper claims, one row per claim that can be tested, in the order of its figures and
    tables.

    ``expected`` is the sign that the claim gives the measured difference: "+", "-", or "" where it
    predicts none. ``paper_delta`` is the paper's own difference (percentage points unless the claim
    names another unit), NaN where it prints no number; ``notebook`` is the notebook that measures
    it.
    """
    return _read("claims.csv", CLAIM_COLUMNS)


def items() -> pd.DataFrame:
    """Every figure and table of the paper: item ("Fig. 2", "Table 10"), the notebook that has it,
    what it shows.
    """
    return _read("items.csv", ITEM_COLUMNS)


def beside(ours: pd.DataFrame, table: int, on: list[str]) -> pd.DataFrame:
    """Our numbers beside the paper's: the columns ``on``, then ``ours``, ``paper``, then what else
    ``ours`` holds.

    ``ours`` has the columns ``on`` and ``value``. The merge is outer: a number that only one side
    has is NaN on the other, never dropped; rows are in the printed order, ours alone last. Raises
    ValueError when a column is missing or ``on`` does not tell the rows of a side apart.
    """
    paper = load(table)
    for name, frame in (("ours", ours), (f"table {table}", paper)):
        if missing := [column for column in [*on, "value"] if column not in frame.columns]:
            raise ValueError(
                f"{name} has no column {', '.join(missing)}; it has {', '.join(map(str, frame.columns))}"
            )
        if twice := frame.duplicated(on).sum():
            raise ValueError(
                f"{name}: {twice} rows repeat another in {', '.join(on)}; add a column to on, or filter"
            )
    paper = paper[[*on, "value"]].rename(columns={"value": "paper"}).assign(order=range(len(paper)))
    both = paper.merge(ours.rename(columns={"value": "ours"}), on=on, how="outer")
    # An outer merge sorts by key: back to the printed order, what only we have last.
    both = both.sort_values("order", kind="stable", ignore_index=True).drop(columns="order")
    rest = [column for column in both.columns if column not in {*on, "ours", "paper"}]
    return both[[*on, "ours", "paper", *rest]]


def save_measured(measured: pd.DataFrame, notebook: str, profile: str) -> pd.DataFrame:
    """Write what a notebook measured for its claims, figures/PROFILE/claims_NOTEBOOK.csv, for the
    scoreboard.

    ``measured``: id, value, low, high (NaN bounds: no interval), on (data and backbones). An id
    that is not a claim of this notebook raises ValueError.
    """
    known = claims().query("notebook == @notebook")["id"]
    if wrong := sorted(set(measured["id"]) - set(known)):
        raise ValueError(f"{notebook} has no claim {wrong[0]!r}; its claims are {', '.join(known)}")
    folder = figures_dir() / profile
    folder.mkdir(parents=True, exist_ok=True)
    measured[MEASURED].to_csv(
        folder / f"claims_{notebook}.csv", index=False, float_format="%.4g", lineterminator="\n"
    )
    return measured


def scoreboard(profile: str) -> pd.DataFrame:
    """Every claim with ours (value, low, high, on), a verdict on its sign and how its size compares
    (`size`), in the paper's order; what was not run says so.
    """
    files = sorted((figures_dir() / profile).glob("claims_*.csv"))
    ours = pd.concat([pd.DataFrame(columns=MEASURED), *map(pd.read_csv, files)]).drop_duplicates(
        "id", keep="last"
    )
    board = claims().merge(ours, on="id", how="left")
    board[["value", "low", "high"]] = board[["value", "low", "high"]].astype(float)
    board["verdict"] = [
        verdict(*row)
        for row in board[["expected", "value", "low", "high", "on"]].itertuples(index=False)
    ]
    board["size"] = [
        size(*row) for row in board[["paper_delta", "value", "low", "high"]].itertuples(index=False)
    ]
    return board


def as_markdown(board: pd.DataFrame) -> str:
    """The measured claims of a `scoreboard` as a Markdown table, the disagreements first: README's."""
    order = ["disagrees", "undecided", "agrees"]
    board = board[board["verdict"].isin(order)].sort_values(
        "verdict", key=lambda v: v.map(order.index), kind="stable"
    )
    lines = ["| paper | claim | theirs | ours | verdict | size |", "|---|---|---|---|---|---|"]
    for r in board.to_dict("records"):
        theirs = "–" if pd.isna(r["paper_delta"]) else _signed(r["paper_delta"])
        cells = r["item"], r["claim"], theirs, _ours(r), r["verdict"], r["size"] or "–"
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def size(paper_delta: float, value: float, low: float, high: float) -> str:
    """How our difference compares with the paper's, which a verdict on the sign leaves open:
    "alike" where the paper's number is inside our interval, else "smaller", "larger" or "other
    sign"; "" where one of the numbers is missing.
    """
    if pd.isna([paper_delta, value, low, high]).any():
        return ""
    if low <= paper_delta <= high:
        return "alike"
    if value * paper_delta < 0:
        return "other sign"
    return "smaller" if abs(value) < abs(paper_delta) else "larger"


def overview(profile: str) -> pd.DataFrame:
    """Every figure and table of the paper, and what lies of it in the figures folder: item, shows,
    notebook, run (the profiles it was run in), minutes (of the longest such run), ours (one line:
    the item's first claim, ours with its interval against the paper's, the verdict, and how many
    claims have which; ``profile``'s where it was run in it).
    """
    table, done = items(), _runs()
    folders = sorted({name for _, name in done}, key=lambda name: (name != profile, name))
    boards = {name: scoreboard(name).query("verdict != 'not run'") for name in folders}

    def line(item: str) -> str:
        for name, board in boards.items():
            if len(here := board[board["item"] == item]):
                counts = ", ".join(
                    f"{n} {verdict}" for verdict, n in here["verdict"].value_counts().items()
                )
                return f"{_against(here.iloc[0])}{f' (of {len(here)}: {counts})' if len(here) > 1 else ''}, {name}"
        return "not run" if item in set(claims()["item"]) else ""

    minutes = [
        max((done[slug, p] for p in folders if (slug, p) in done), default=None)
        for slug in table["notebook"]
    ]
    return table.assign(
        run=[", ".join(p for p in folders if (slug, p) in done) for slug in table["notebook"]],
        minutes=["" if m is None else "under 1" if m < 1 else f"{m:.0f}" for m in minutes],
        ours=[line(item) for item in table["item"]],
    )


def _runs() -> dict[tuple[str, str], float]:
    """{(notebook, profile): minutes from its start to its last figure}, from the provenance beside
    the figures.
    """
    done: dict[tuple[str, str], float] = {}
    for file in figures_dir().glob("*/*.json"):
        record = json.loads(file.read_text(encoding="utf-8"))
        key = record["notebook"], file.parent.name
        done[key] = max(done.get(key, 0.0), (record.get("wall_seconds") or 0) / 60)
    return done


def _against(row: pd.Series) -> str:
    """Ours and the paper's in a few words: "+3.2 [+1.5, +5.0], paper +4.8: agrees"."""
    if pd.isna(row["value"]):
        return row["verdict"]
    paper = "" if pd.isna(row["paper_delta"]) else f", paper {_signed(row['paper_delta'])}"
    return f"{_ours(row)}{paper}: {row['verdict']}"


def _ours(row) -> str:
    """Our number with its interval, where it has one."""
    interval = "" if pd.isna(row["low"]) else f" [{_signed(row['low'])}, {_signed(row['high'])}]"
    return _signed(row["value"]) + interval


def _signed(x: float) -> str:
    return f"{x:+.1f}".replace("-", "−")


def verdict(expected: str, value: float, low: float, high: float, on: object) -> str:
    """Agrees or disagrees only where the whole interval does; "undecided" where it holds zero, or
    without a sign.
    """
    if not isinstance(on, str):
        return "not run"
    if pd.isna(value):
        return "not testable here"
    low, high = (value, value) if pd.isna(low) else (low, high)
    if not expected or low <= 0 <= high:
        return "undecided"
    return "agrees" if (low > 0) == (expected == "+") else "disagrees"


def _read(name: str, columns: list[str], extra: list[str] | None = None) -> pd.DataFrame:
    # An empty text cell stays "", a missing number becomes NaN: so everything is read as text
    # first.
    extra = extra or []
    path = paper_dir() / name
    if not path.is_file():
        raise FileNotFoundError(f"{name} is not in {path.parent}; it is part of the repository")
    frame = pd.read_csv(path, encoding="utf-8", dtype=str, keep_default_na=False)
    found = list(frame.columns)
    if found[: len(columns)] != columns or set(found[len(columns) :]) - set(extra):
        raise ValueError(
            f"{name} has the columns {', '.join(found)}; expected {', '.join(columns)}"
            + (f", then any of {', '.join(extra)}" if extra else "")
        )
    for column in found:
        if column not in TEXT:
            frame[column] = pd.to_numeric(frame[column])
    return frame
