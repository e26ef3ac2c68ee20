"""The numbers printed in the paper (Tables 1-16, 19 and 22), its claims, and our own numbers beside
them.

    python -m companion.paper     # writes figures/lite/README.md and codecheck.yml

One row of ``data/paper/tableNN.csv`` is one printed number. ``row`` is the feature set
("Embeddings", printed also as "Features"; "FUNGI"; "E+K+D+S" = embedding joined with the KL, DINO
and SimCLR gradients) or the printed row name; ``column`` the backbone or the data set; ``setting``
the rest ("full", "5-shot" = printed "Few Shot", memory size, "Oxford M"). ``value`` is in percent
unless ``metric`` says otherwise; ``delta`` is the difference printed beside it, in the same unit,
empty where none is printed. ``backbone`` (Tables 1, 5) and ``spread`` (Table 9, one standard
deviation) exist only where the table needs them. ``data/paper/NOTES.md`` says what a reader must
know of single tables.
"""

import json
import re
from collections.abc import Mapping
from functools import cache

import pandas as pd
import yaml
from jinja2 import Template

from companion.figures import style
from companion.figures.style import VERDICTS
from companion.messages import require
from companion.paths import PAPER, ROOT, figures_dir, results_dir

MEASURED = ["id", "value", "low", "high", "on"]
NUMBERS = ["table", "value", "delta", "spread", "paper_delta"]  # columns that are no text
STAND_INS = ("vit_micro", "vit_mini", "all-MiniLM", "whisper", "random:")  # not the paper's


def load(table: int) -> pd.DataFrame:
    """Return one table of the paper, a row per printed number; ValueError for one not stored."""
    stored = sorted(file.stem for file in PAPER.glob("table[0-9][0-9].csv"))
    require("table", f"table{table:02d}", stored)
    return _read(f"table{table:02d}.csv")


def claims() -> pd.DataFrame:
    """Return what the paper claims, one row per claim that can be tested, in the order of its
    figures and tables.

    ``expected`` is the sign that the claim gives the measured difference: "+", "-", or "" where it
    predicts none. ``paper_delta`` is the paper's own difference (percentage points unless the claim
    names another unit), NaN where it prints no number; ``notebook`` is the notebook that measures
    it.
    """
    return _read("claims.csv")


def items() -> pd.DataFrame:
    """Return every figure and table of the paper: item, the notebook that has it, what it shows."""
    return _read("items.csv")


def _read(name: str) -> pd.DataFrame:
    """Read a file of ``data/paper``: an empty text stays "", a missing number becomes NaN."""
    frame = pd.read_csv(PAPER / name, encoding="utf-8", dtype=str, keep_default_na=False)
    for column in frame.columns.intersection(NUMBERS):
        frame[column] = pd.to_numeric(frame[column])
    return frame


def save_measured(measured: pd.DataFrame, notebook: str, profile: str) -> None:
    """Write what a notebook measured for its claims, figures/PROFILE/claims_NOTEBOOK.csv, for the
    scoreboard.

    ``measured``: id, value, low, high (NaN bounds: no interval), on (data and backbones). Raises
    ValueError for an id that is no claim of this notebook.
    """
    known = claims().query("notebook == @notebook")["id"]
    if wrong := sorted(set(measured["id"]) - set(known)):
        raise ValueError(f"{notebook} has no claim {wrong[0]!r}; its claims are {', '.join(known)}")
    folder = figures_dir() / profile
    folder.mkdir(parents=True, exist_ok=True)
    text = measured[MEASURED].to_csv(index=False, float_format="%.4g", lineterminator="\n")
    style.write(folder / f"claims_{notebook}.csv", text.encode())


def scoreboard(profile: str) -> pd.DataFrame:
    """Return every claim with ours (value, low, high, on), a `verdict` on its sign, how its `size`
    compares, the smallest effect that could have been ``seen`` (the interval's half-width) and the
    `scale` of the test, in the paper's order; what was not run says so.
    """
    files = sorted(results_dir(profile).glob("claims_*.csv"))
    ours = pd.concat([pd.DataFrame(columns=MEASURED), *map(pd.read_csv, files)])
    board = claims().merge(ours.drop_duplicates("id", keep="last"), on="id", how="left")
    board[["value", "low", "high"]] = board[["value", "low", "high"]].astype(float)
    rows = lambda *names: board[list(names)].itertuples(index=False)
    board["verdict"] = [verdict(*row) for row in rows("expected", "value", "low", "high", "on")]
    board["size"] = [size(*row) for row in rows("paper_delta", "value", "low", "high")]
    board["seen"] = (board["high"] - board["low"]) / 2
    board["scale"] = board["on"].map(scale).where(board["value"].notna(), "")
    return board


def by_verdict(board: pd.DataFrame) -> tuple[list[dict], dict[str, int]]:
    """Return the scoreboard's rows, disagreements first, and how many have each verdict."""
    order = lambda verdicts: verdicts.map(list(VERDICTS).index)
    rows = board.sort_values("verdict", key=order, kind="stable")
    counts = board["verdict"].value_counts()
    return rows.to_dict("records"), {name: int(counts.get(name, 0)) for name in VERDICTS}


def verdict(expected: str, value: float, low: float, high: float, on: object) -> str:
    """Judge the sign of a difference: "agrees" or "disagrees" only where the whole interval does,
    "undecided" where it holds zero or no sign is expected.
    """
    if not isinstance(on, str):
        return "not run"
    if pd.isna(value):
        return "not testable here"
    low, high = (value, value) if pd.isna(low) else (low, high)
    if not expected or low <= 0 <= high:
        return "undecided"
    return "agrees" if (low > 0) == (expected == "+") else "disagrees"


def size(paper_delta: float, value: float, low: float, high: float) -> str:
    """Compare the size of our difference with the paper's, which a verdict on the sign leaves open:
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


def scale(on: object) -> str:
    """Say how near the paper a claim was tested: "paper's kind" where every network is a published
    one of the paper's modality at its size of input, on data sets of the paper, whole or in part;
    else "stand-in"; "" where nothing was measured.
    """
    sets, _, networks = str(on).partition(" (")[0].partition("; ")
    if not networks:
        return ""
    known = _data_sets()  # a part of one is called "NAME_..."
    alike = all(name in known or name.split("_")[0] in known for name in sets.split(", "))
    alike &= not any(name.startswith(STAND_INS) for name in networks.split(", "))
    return "paper's kind" if alike else "stand-in"


@cache
def _data_sets() -> frozenset[str]:
    """Return the names of the paper's data sets."""
    table = pd.read_csv(ROOT / "data" / "datasets.csv")
    return frozenset({*table.query("profile == 'paper'")["name"], "voc2012", "ade20k"})


def signed(x: float, decimals: int = 1) -> str:
    """Return a number with its sign, as text; a dash where there is none."""
    return "–" if pd.isna(x) else f"{x:+z.{decimals}f}".replace("-", "−")


def bounds(low: float, high: float, decimals: int = 1) -> str:
    """Return an interval as text; "" where there is none."""
    return "" if pd.isna(low) else f"[{signed(low, decimals)}, {signed(high, decimals)}]"


def ours(value: float, low: float, high: float, decimals: int = 1) -> str:
    """Return a difference of ours with its interval, as text."""
    return f"{signed(value, decimals)} {bounds(low, high, decimals)}".strip()


def written(profile: str) -> list[dict]:
    """List the figures and tables that notebooks wrote for a profile: name, notebook, items
    ("Fig. 2"), alt (what it shows), drawn (whether it is a picture) and minutes since the
    notebook's start.
    """
    kinds, found = {"fig": "Fig.", "table": "Table", "algorithm": "Algorithm"}, []
    for file in sorted(results_dir(profile).glob("*.json")):
        record = json.loads(file.read_text(encoding="utf-8"))
        numbers = re.findall(r"(?:^|_)(fig|table|algorithm)(\d+)(?=_|$)", file.stem)
        found.append(
            {
                "name": file.stem,
                "notebook": record["notebook"],
                "items": [f"{kinds[kind]} {int(number)}" for kind, number in numbers],
                "alt": record.get("alt", f"Figure {file.stem}"),
                "drawn": file.with_suffix(".png").is_file(),
                "minutes": (record.get("wall_seconds") or 0) / 60,
            }
        )
    return found


def at_a_glance(profile: str) -> str:
    """Say in a line what a profile's results rest on: scope, machines and hours."""
    files = sorted(results_dir(profile).glob("*.json"))
    records = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    given = lambda *names: {x for r in records for n in names for x in r["parameters"].get(n, ())}
    on = {r["device"]["cuda"] or "{cpu}, {cores} cores".format(**r["device"]) for r in records}
    took = pd.DataFrame(records, columns=["notebook", "wall_seconds"]).groupby("notebook").max()
    scope = f"{len(given('backbones'))} networks, {len(given('datasets', 'sets'))} data sets"
    hours = f"{took['wall_seconds'].sum() / 3600:.1f} hours beside the features, extracted before"
    return f"{len(took)} notebooks; {scope}; on {'; '.join(sorted(on))}; {hours}"


def overview(profile: str) -> pd.DataFrame:
    """Return every figure and table of the paper, and what lies of it in the profile's figures:
    item, shows, notebook, run (the profile, "" where it was not run), minutes (of that run), ours
    (one line: the item's first claim, ours with its interval against the paper's, the verdict, and
    how many claims have which).
    """
    minutes = {}
    for record in written(profile):
        minutes[record["notebook"]] = max(minutes.get(record["notebook"], 0), record["minutes"])
    board, rows = scoreboard(profile), []
    for item, slug in items()[["item", "notebook"]].itertuples(index=False):
        took = minutes.get(slug, -1)
        said = "" if took < 0 else "under 1" if took < 1 else f"{took:.0f}"
        line = _in_a_line(board[board["item"] == item], profile)
        rows.append((profile * (slug in minutes), said, line))
    return items().join(pd.DataFrame(rows, columns=["run", "minutes", "ours"]))


def _in_a_line(item: pd.DataFrame, profile: str) -> str:
    """Sum up an item's rows of the scoreboard: "+3.2 [+1.5, +5.0], paper +4.8: agrees, lite"."""
    here = item[item["verdict"] != "not run"]
    if here.empty:
        return "" if item.empty else "not run"
    first = here.iloc[0]
    paper = f", paper {signed(first['paper_delta'])}" * (not pd.isna(first["paper_delta"]))
    numbers = f"{ours(*first[['value', 'low', 'high']])}{paper}: " * (not pd.isna(first["value"]))
    counts = ", ".join(f"{n} {found}" for found, n in here["verdict"].value_counts().items())
    more = f" (of {len(here)}: {counts})" if len(here) > 1 else ""
    return f"{numbers}{first['verdict']}{more}, {profile}"


def as_markdown(profile: str) -> str:
    """Return the page figures/PROFILE/README.md: for each notebook its claims, figures and command,
    then every claim with its verdict, the disagreements first.
    """
    rows, counts = by_verdict(board := scoreboard(profile))
    template = (ROOT / "data" / "site" / "claims.md").read_text(encoding="utf-8")
    page = Template(template, trim_blocks=True)
    given = dict(profile=profile, claims=rows, counts=counts, pages=_pages(board, profile))
    return page.render(signed=signed, ours=ours, **given) + "\n"


def title(notebook: Mapping) -> str:
    """Return the first heading of a notebook, without its mark."""
    return "".join(notebook["cells"][0]["source"]).splitlines()[0].lstrip("# ")


def _pages(board: pd.DataFrame, profile: str) -> list[dict]:
    """List what each notebook has for the gallery: slug, title, items, on, claims and figures."""
    figures, of, pages = written(profile), items().groupby("notebook")["item"].agg(list), []
    for slug in sorted({record["notebook"] for record in figures}):
        notebook = json.loads((ROOT / "notebooks" / f"{slug}.ipynb").read_text(encoding="utf-8"))
        claimed = board[board["notebook"] == slug]
        measured = claimed.dropna(subset="value")
        pages.append(
            {
                "slug": slug,
                "title": title(notebook),
                "items": of.get(slug, []),
                "on": measured["on"].mode()[0] if len(measured) else "",
                "claims": claimed.to_dict("records"),
                "figures": [record for record in figures if record["notebook"] == slug],
            }
        )
    return pages


def manifest(profile: str) -> str:
    """Return codecheck.yml (CODECHECK 2.0): each file of numbers, its item, and its command."""
    shows = items().set_index("item")["shows"]
    named = lambda record: "; ".join(f"{item}: {shows[item]}" for item in record["items"])
    entries = [
        {
            "file": f"figures/{profile}/{record['name']}.csv",
            "comment": named(record) or "not in the paper",
            "command": f"python -m companion.run {record['notebook']} --profile {profile}",
        }
        for record in written(profile)
    ]
    about = {"version": "https://codecheck.org.uk/spec/config/2.0/", "manifest": entries}
    return yaml.safe_dump(about, sort_keys=False, allow_unicode=True, width=100)


if __name__ == "__main__":
    page, listed = as_markdown("lite"), manifest("lite")
    (results_dir("lite") / "README.md").write_text(page, encoding="utf-8")
    (ROOT / "codecheck.yml").write_text(listed, encoding="utf-8")
