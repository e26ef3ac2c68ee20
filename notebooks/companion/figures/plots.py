"""The paper's figures as functions: tidy numbers in, a `Figure` out; nothing is read or written
here.

Tidy frames have one row per mark, with these columns (accuracies in percent, differences in
percentage points): `dataset`, `backbone`, `setting` ("full", "5-shot"): the condition, each
optional; `features`: "E", "K", "E+K+D+S"; `value`, `low`, `high`: ours with its 95 % interval (NaN:
not run); `paper`: the published number (NaN: none). Ours are filled marks, the paper's open ones.
"""

import textwrap
from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import (
    FixedLocator,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    NullLocator,
    StrMethodFormatter,
)

from companion.figures.style import (
    COLOURS,
    COLUMN,
    FUNGI,
    NAMES,
    VERDICTS,
    WIDE,
    colour,
    contrast,
    figure,
)

INK, PALE = "#333333", "#888888"
OPEN = {
    "marker": "D",
    "markerfacecolor": "white",
    "linestyle": "none",
    "markersize": 4.5,
    "markeredgewidth": 1.1,
}


def _need(df: pd.DataFrame, *columns: str) -> pd.DataFrame:
    if missing := [c for c in columns if c not in df]:
        raise ValueError(
            f"the plot needs column {missing[0]!r}; the frame has {', '.join(map(str, df.columns))}"
        )
    if df.empty:
        raise ValueError("nothing to plot: the frame has no rows")
    return df.assign(**{c: np.nan for c in ("low", "high", "paper") if c not in df})


def _join(df: pd.DataFrame, *columns: str, by: str = "\n") -> pd.Series:
    """One label a row from those of the columns that the frame has."""
    have = [df[c].astype(str) for c in columns if c in df]
    return have[0].str.cat(have[1:], sep=by) if have else pd.Series("", df.index)


def _interval(ax, x, y, row, ink: str, *, horizontal: bool, **mark) -> None:
    """A filled mark at the value with its interval as a line; nothing where the value is NaN."""
    if np.isnan(row["value"]):
        return
    if not np.isnan(row["low"]):
        ends = [row["low"], row["high"]]
        xy = (ends, [y, y]) if horizontal else ([x, x], ends)
        ax.plot(*xy, color=ink, linewidth=1.4, solid_capstyle="butt", alpha=0.75)
    ax.plot(x, y, marker="o", color=ink, linestyle="none", **mark)


def class_deltas(df: pd.DataFrame) -> Figure:
    """Fig. 3: accuracy of each class with one gradient minus that with the embedding, sorted.

    `df`: features ("K", "D", "S"), class, value (points). Each condition is a row of panels, which
    share their y axis.
    """
    df = _need(df, "features", "class", "value")
    df = df.assign(row=_join(df, "dataset", "backbone", "setting", by=", "))
    rows, kinds = df["row"].unique(), df["features"].unique()
    fig, axes = figure(len(rows), len(kinds), height=0.4 + 1.1 * len(rows), sharey="row")
    for (i, name), (j, kind) in ((a, b) for a in enumerate(rows) for b in enumerate(kinds)):
        ax = axes[i, j]
        delta = np.sort(df.query("row == @name and features == @kind")["value"].to_numpy())[::-1]
        ax.bar(
            np.arange(len(delta)), delta, width=1 if len(delta) > 40 else 0.8, color=colour(kind)
        )
        ax.axhline(0, color=INK, linewidth=0.7)
        ax.spines["bottom"].set_visible(False)
        ax.set(xticks=[], xlabel=f"{len(delta)} classes, sorted" if len(delta) else "not run")
        better, worse = int((delta > 0).sum()), int((delta < 0).sum())
        clear = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5}
        ends = df.loc[df["row"] == name, "value"]
        below = (
            -ends.min() > ends.max()
        )  # sorted bars leave the upper right and the lower left free: the roomier one
        x, y, ha, va = (0.02, 0.02, "left", "bottom") if below else (0.98, 0.99, "right", "top")
        where = {"transform": ax.transAxes, "ha": ha, "va": va, "bbox": clear}
        ax.text(x, y, f"{better} better\n{worse} worse", size=8, **where)
        heads = [name] * (not j) + [f"{NAMES.get(kind, kind)} − embedding"] * (not i)
        ax.set_title("\n".join(filter(None, heads)))
    fig.supylabel("Δ accuracy (points)", size=9)
    return fig


def accuracy_by_features(
    df: pd.DataFrame, label: str = "accuracy (%)", ours: str = "ours, 95 % interval"
) -> Figure:
    """Tables 2 and 8: accuracy as gradients are added, in the frame's order; `df`: features, value,
    ...

    A column of panels for each data set, a row for each (backbone, setting). `paper` is the
    published *gain* over the embedding, in points, drawn as an open mark that far above our own
    embedding.
    """
    df = _need(df, "features", "value")
    df = df.assign(row=_join(df, "backbone", "setting", by=", "), col=_join(df, "dataset"))
    rows, cols, kinds = (list(df[c].unique()) for c in ("row", "col", "features"))
    ticks = [
        "+ " + k.removeprefix(f"{a}+") if k.startswith(f"{a}+") else k
        for a, k in zip(["", *kinds], kinds)
    ]
    crowded = len(kinds) > 4 and max(map(len, ticks)) > 3
    width, height = min(WIDE, COLUMN * len(cols)), 0.5 + 1.5 * len(rows)
    fig, axes = figure(len(rows), len(cols), width=width, height=height, sharex=True)
    for (i, row), (j, col) in ((a, b) for a in enumerate(rows) for b in enumerate(cols)):
        ax, here = axes[i, j], df[(df["row"] == row) & (df["col"] == col)]
        base = here.loc[
            here["features"] == "E", "value"
        ].mean()  # NaN where the embedding was not run
        if not np.isnan(base):
            ax.axhline(base, color=PALE, linewidth=0.7, linestyle=(0, (4, 3)), zorder=0)
        for _, r in here.iterrows():
            x, ink = kinds.index(r["features"]), colour(r["features"])
            _interval(ax, x, r["value"], r, ink, horizontal=False)
            if r["features"] != "E":
                ax.plot(x + 0.25, base + r["paper"], color=ink, **OPEN)
        if here["value"].isna().all():
            ax.text(
                0.5, 0.5, "not run", transform=ax.transAxes, ha="center", va="center", color=PALE
            )
            ax.set_yticks([])
        ax.set_xlim(-0.5, len(kinds) - 0.4)
        ax.set_xticks(range(len(kinds)), ticks, rotation=40 * crowded)
        ax.margins(y=0.12)
        ax.set_title(
            "\n".join(filter(None, [row if not j else "", col]))
        )  # the row's name above its first panel
    for ax in axes[:, 0]:
        ax.set_ylabel(label)
    _legend(
        fig, {ours: {}}, "our embedding + the paper's gain" if df["paper"].notna().any() else None
    )
    return fig


def variants(df: pd.DataFrame, *, against: str, interval: str = "95 % interval") -> Figure:
    """Tables 6, 9, 15, Fig. 10: paired difference of each setting from the one called `against`, in
    the frame's order.

    `df`: column (a column of panels each), variant, features (its colour), value (percent, written
    beside), gain, gain_low, gain_high (points; `interval` says what they are). A row of panels for
    each data set and backbone. `paper`: the published difference, points. A `value` of NaN is
    marked not applicable.
    """
    df = _need(df, "column", "variant", "features", "value", "gain", "gain_low", "gain_high")
    df = df.assign(row=_join(df, "dataset", "backbone", by=", "))
    rows, cols, names = (list(df[c].unique()) for c in ("row", "column", "variant"))
    width = min(WIDE, COLUMN * (0.55 + 0.75 * len(cols)))
    height = 0.75 + len(rows) * (0.4 + 0.2 * len(names))
    fig, axes = figure(len(rows), len(cols), width=width, height=height, sharex="col", sharey=True)
    for (i, row), (j, col) in ((a, b) for a in enumerate(rows) for b in enumerate(cols)):
        ax, here = axes[i, j], df[(df["row"] == row) & (df["column"] == col)]
        beside = {"transform": ax.get_yaxis_transform(), "va": "center_baseline", "size": 7.5}
        for _, r in here.iterrows():
            y, ink = names.index(r["variant"]), colour(r["features"])
            gain = {"value": r["gain"], "low": r["gain_low"], "high": r["gain_high"]}
            _interval(ax, r["gain"], y, gain, ink, horizontal=True, zorder=3)
            ax.plot(r["paper"], y + 0.3, color=ink, **OPEN)
            if np.isnan(r["value"]):
                ax.text(0.5, y, "not applicable", ha="center", color=PALE, **beside)
            else:
                ax.text(1.02, y, f"{r['value']:.1f}", color=INK, **beside)
        ax.axvline(0, color=INK, linewidth=0.7, linestyle=(0, (4, 3)))
        ax.set(yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.4, -0.6))
        ax.tick_params(axis="y", length=0)
        ax.grid(axis="x")
        ax.set_title(f"{row}\n{col}" if row and not j else col)
    fig.supxlabel(f"difference from {against} (points; right: accuracy in %)", size=9)
    _legend(
        fig,
        {f"ours, {interval}": {}},
        "the paper's difference" if df["paper"].notna().any() else None,
    )
    return fig


def curves(df: pd.DataFrame, *, x: str, label: str) -> Figure:
    """Accuracy against the column `x` for each feature set, a panel for each data set and backbone.

    `df`: features, value, `x`; bands are from `low` to `high`, the notebook says what they are.
    """
    df = _need(df, x, "features", "value")
    df = df.assign(panel=_join(df, "dataset", "backbone"))
    panels = list(df["panel"].unique())
    cols = min(3, len(panels))
    rows = -(-len(panels) // cols)
    fig, axes = figure(rows, cols, width=min(WIDE, COLUMN * cols), height=0.35 + 2.1 * rows)
    for ax in axes.flat[len(panels) :]:
        ax.axis("off")
    for ax, panel in zip(axes.flat, panels, strict=False):
        for kind, part in df[df["panel"] == panel].groupby("features", sort=False):
            part = part.sort_values(x)
            ax.fill_between(
                part[x], part["low"], part["high"], color=colour(kind), alpha=0.18, linewidth=0
            )
            ax.plot(part[x], part["value"], **_line(kind))
        ax.set(xlabel=label)
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        ax.grid(axis="y")
        ax.set_title(panel)
    for ax in axes[:, 0]:
        ax.set_ylabel("accuracy (%)")
    _legend(fig, {kind: _line(kind) for kind in df["features"].unique()}, None)
    return fig


def _line(kind: str) -> dict:
    """The embedding's line is dashed: its grey and a dark hue of the same lightness are hard to
    tell apart.
    """
    return {
        "color": colour(kind),
        "marker": "o",
        "markersize": 3,
        "linestyle": (0, (3, 1.5)) if kind == "E" else "-",
    }


def views_and_speed(df: pd.DataFrame) -> Figure:
    """Fig. 12: accuracy (left, a panel for each data set and backbone) and images/s (right) against
    views an image.

    `df`: features, views, value with low and high (percent), speed and floor (images/s). The floor
    is a dashed line.
    """
    df = _need(df, "features", "views", "value", "speed", "floor")
    df = df.assign(panel=_join(df, "dataset", "backbone"))
    panels = list(df["panel"].unique())
    fig, axes = figure(1, len(panels) + 1, width=min(WIDE, 2.5 * (len(panels) + 1)), height=2.8)
    ticks = sorted(df["views"].unique())
    for ax, panel in zip(axes[0], panels, strict=False):
        for kind, part in df[df["panel"] == panel].groupby("features", sort=False):
            ax.fill_between(
                part["views"],
                part["low"],
                part["high"],
                color=colour(kind),
                alpha=0.18,
                linewidth=0,
            )
            ax.plot(part["views"], part["value"], color=colour(kind), marker="o", markersize=3)
        ax.set_title(panel)
        ax.grid(axis="y")
    axes[0, 0].set_ylabel("accuracy (%)")
    speed = axes[0, -1]
    for name, part in df.drop_duplicates(
        ["backbone", "views"] if "backbone" in df else "views"
    ).groupby("backbone" if "backbone" in df else lambda _: "", sort=False):
        speed.plot(part["views"], part["speed"], color=INK, marker="o", markersize=3)
        speed.plot(part["views"], part["floor"], color=PALE, linestyle=(0, (4, 3)))
        if df.get("backbone", pd.Series()).nunique() > 1:
            first = part.iloc[0]
            speed.annotate(
                name, (first["views"], first["speed"]), (5, 3), textcoords="offset points", size=8
            )
    speed.set(yscale="log", ylabel="images/s", title="speed\n(dashed: floor)")
    speed.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
    speed.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    speed.yaxis.set_minor_formatter(NullFormatter())
    for ax in axes[0]:
        ax.set(xlabel="views an image", xscale="log")
        ax.set_xticks(ticks, [str(t) for t in ticks], size=7.5)
        ax.minorticks_off()
    _legend(fig, {NAMES.get(k, k): {"color": colour(k)} for k in df["features"].unique()}, None)
    return fig


def trade_off(df: pd.DataFrame) -> Figure:
    """Accuracy gained over the embedding against images/s, a panel for each data set and backbone;
    what no other point beats in both is joined by a line.

    `df`: features, label (written at the point), native (open mark), speed (images/s), gain,
    gain_low, gain_high.
    """
    df = _need(df, "features", "label", "native", "speed", "gain", "gain_low", "gain_high")
    df = df.assign(panel=_join(df, "dataset", "backbone"))
    panels = list(df["panel"].unique())
    cols = min(2, len(panels))
    rows = -(-len(panels) // cols)
    fig, axes = figure(rows, cols, width=min(WIDE, 1.35 * COLUMN * cols), height=0.6 + 2.7 * rows)
    for ax in axes.flat[len(panels) :]:
        ax.axis("off")
    for ax, panel in zip(axes.flat, panels, strict=False):
        here = df[df["panel"] == panel].sort_values("speed", ascending=False)
        best = here[here["gain"] > here["gain"].cummax().shift(fill_value=-np.inf)]
        ax.plot(best["speed"], best["gain"], color=PALE, linewidth=0.8, zorder=0)
        for _, r in here.iterrows():
            ink = colour(r["features"])
            ax.plot(
                [r["speed"]] * 2, [r["gain_low"], r["gain_high"]], color=ink, linewidth=1, alpha=0.5
            )
            face = "white" if r["native"] else ink
            ax.plot(
                r["speed"], r["gain"], marker="o", color=ink, markerfacecolor=face, linestyle="none"
            )
            below = (
                {"va": "top"} if r["native"] else {}
            )  # the two kinds of SimCLR points lie close together
            at = (3, -4 if r["native"] else 4)
            ax.annotate(
                r["label"],
                (r["speed"], r["gain"]),
                at,
                textcoords="offset points",
                size=8,
                color=ink,
                **below,
            )
        ax.axhline(0, color=PALE, linewidth=0.7, linestyle=(0, (4, 3)), zorder=0)
        ax.set(xscale="log", xlabel="images/s", title=panel)
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        ax.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.minorticks_off()
        ax.margins(x=0.12)
        ax.grid(axis="y")
    for ax in axes[:, 0]:
        ax.set_ylabel("gain over the embedding (points)")
    kinds = {NAMES.get(k, k): {"color": colour(k)} for k in df["features"].unique()}
    _legend(fig, kinds | {"views at their own size": {"markerfacecolor": "white"}}, None)
    return fig


def projections(df: pd.DataFrame) -> Figure:
    """Ways to project the same gradients: accuracy, distortion of distances (percent), seconds for
    1,000 images.

    `df`: kind ("exact" first), size, value with low and high, distortion, seconds; a row of panels
    for each data set and backbone. The exact similarity's accuracy is the dashed line.
    """
    df = _need(df, "kind", "size", "value", "distortion", "seconds")
    df = df.assign(row=_join(df, "dataset", "backbone", by=", "))
    df = df.assign(name=df["kind"] + (", " + df["size"]).where(df["size"] != "", ""))
    rows, names = list(df["row"].unique()), list(df["name"].unique())
    inks = dict(zip(df["kind"].unique(), (INK, "#0072B2", "#D55E00", "#009E73"), strict=False))
    fig, axes = figure(
        len(rows), 3, height=0.5 + len(rows) * (0.65 + 0.19 * len(names)), sharey=True
    )
    for (left, middle, right), row in zip(axes, rows, strict=True):
        here = df[df["row"] == row].set_index("name")
        left.axvline(
            here.loc["exact", "value"], color=INK, linewidth=0.8, linestyle=(0, (4, 3)), zorder=0
        )
        for y, name in enumerate(names):
            r = here.loc[name]
            ink = inks[r["kind"]]
            beside = {"textcoords": "offset points", "va": "center_baseline", "size": 7.5}
            _interval(left, r["value"], y, r, ink, horizontal=True)
            middle.barh(y, r["distortion"], height=0.55, color=ink)
            middle.annotate(f"{r['distortion']:.1f}", (r["distortion"], y), (3, 0), **beside)
            right.plot(r["seconds"], y, marker="o", color=ink, linestyle="none")
            right.annotate(f"{r['seconds']:.2g}", (r["seconds"], y), (5, 0), **beside)
        left.set(
            yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.4, -0.6), title=row
        )
        right.set(xscale="log")
        right.minorticks_off()
        for ax in (left, right):
            ax.grid(axis="x")
        for ax in (left, middle, right):
            ax.tick_params(axis="y", length=0)
    for ax in axes.flat:
        ax.margins(x=0.2)
    axes[-1, 0].set_xlabel("accuracy (%)")
    axes[-1, 1].set_xlabel("error of distances (%)")
    axes[-1, 2].set_xlabel("seconds for 1,000 images")
    return fig


def backbone_bars(df: pd.DataFrame) -> Figure:
    """Figs 5 and 11: embedding ("E") against FUNGI (any other `features`) for each backbone, a
    column for each setting.

    Rows with `paper` instead of, or beside, `value` fill the lower panels: the published numbers of
    their backbones.
    """
    df = _need(df, "backbone", "features", "value")
    settings = list(df["setting"].unique()) if "setting" in df else [""]
    many = "dataset" in df and df["dataset"].nunique() > 1
    df = df.assign(label=_join(df, "backbone", *["dataset"] * many, by=" · "))
    parts = [
        (c, list(df.loc[df[c].notna(), "label"].unique()))
        for c in ("value", "paper")
        if df[c].notna().any()
    ]
    counts = [len(names) for _, names in parts]
    fig, axes = figure(
        len(parts),
        len(settings),
        height=0.9 + 0.24 * sum(counts) + 0.35 * len(parts),
        sharey="row",
        height_ratios=[n + 0.8 for n in counts],
    )
    for (i, (column, names)), (j, setting) in (
        (a, b) for a in enumerate(parts) for b in enumerate(settings)
    ):
        ax, ours = axes[i, j], column == "value"
        here = df[df[column].notna() & (df["setting"] == setting if "setting" in df else True)]
        for y, name in enumerate(names):
            rows = here[here["label"] == name]
            if not ours:
                ax.plot(
                    rows[column],
                    [y] * len(rows),
                    color="#BBBBBB",
                    linewidth=2,
                    zorder=1,
                    solid_capstyle="butt",
                )
            for _, r in rows.iterrows():
                ink = COLOURS["E"] if r["features"] == "E" else FUNGI
                if ours:
                    shift = (
                        0.13 if r["features"] == "E" else -0.13
                    )  # so that neither interval hides the other
                    _interval(ax, r["value"], y + shift, r, ink, horizontal=True, zorder=3)
                else:
                    ax.plot(r["paper"], y, color=ink, zorder=3, **OPEN)
        ax.set(yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.4, -0.6))
        ax.grid(axis="x")
        ax.tick_params(axis="y", length=0)
        ax.set_title(f"{'ours' if ours else 'paper'}{', ' if setting else ''}{setting}")
    for ax in axes[-1]:
        ax.set_xlabel("accuracy (%)")
    keys = {"embedding": {"color": COLOURS["E"]}, "FUNGI": {"color": FUNGI}}
    _legend(fig, keys, "the paper's" if parts[-1][0] == "paper" else None)
    return fig


def miou_by_memory(df: pd.DataFrame) -> Figure:
    """Tables 3 and 7: mIoU of embedding and FUNGI by memory size, and beside it their paired
    difference.

    `df`: memory (patches), share (of the training patches), features ("E" or any other, FUNGI),
    value, low, high, gain, gain_low, gain_high; a row of panels for each data set and backbone.
    `paper`: the published gain, points.
    """
    df = _need(df, "memory", "share", "features", "value", "gain", "gain_low", "gain_high")
    df = df.assign(row=_join(df, "dataset", "backbone", by=", "))
    rows = list(df["row"].unique())
    fig, axes = figure(len(rows), 2, height=0.55 + 1.9 * len(rows), width_ratios=[1.25, 1])
    for (level, gains), row in zip(axes, rows, strict=True):
        here = df[df["row"] == row]
        sizes = sorted(here["memory"].unique())
        for kind, part in here.groupby("features", sort=False):
            part, ink, shift = (
                part.sort_values("memory"),
                *((COLOURS["E"], -0.04) if kind == "E" else (FUNGI, 0.04)),
            )
            level.plot(np.arange(len(part)) + shift, part["value"], color=ink, linewidth=0.9)
            for x, (_, r) in enumerate(part.iterrows()):
                _interval(level, x + shift, r["value"], r, ink, horizontal=False, zorder=3)
                if kind != "E":
                    gain = {"value": r["gain"], "low": r["gain_low"], "high": r["gain_high"]}
                    _interval(gains, x, r["gain"], gain, ink, horizontal=False, zorder=3)
                    gains.plot(x + 0.15, r["paper"], color=ink, **OPEN)
        shares = here.groupby("memory")["share"].first()
        ticks = [f"{size:,}\n({100 * shares[size]:.0f} %)" for size in sizes]
        for ax in (level, gains):
            ax.set_xticks(range(len(sizes)), ticks)
            ax.set_xlim(-0.4, len(sizes) - 0.6)
            ax.grid(axis="y")
        level.set(ylabel="mIoU (%)", title=row)
        gains.axhline(0, color=INK, linewidth=0.7)
        gains.set(ylabel="points", title="FUNGI − embedding")
    for ax in axes[-1]:
        ax.set_xlabel("patches in the memory\n(share of the training patches)")
    keys = {"embedding": {"color": COLOURS["E"]}, "FUNGI": {"color": FUNGI}}
    _legend(fig, keys, "the paper's gain" if df["paper"].notna().any() else None)
    return fig


def class_iou(df: pd.DataFrame, most: int = 24) -> Figure:
    """IoU of each class with the embedding and with FUNGI, sorted by their difference.

    `df`: class, share (of the test pixels, percent), features ("E" or any other, FUNGI), value; a
    panel for each data set and backbone. A class that does not occur in the test images has no bar;
    of more than `most` classes those with the largest gains and losses are drawn.
    """
    df = _need(df, "class", "share", "features", "value").assign(
        panel=_join(df, "dataset", "backbone", by=", ")
    )
    panels = list(df["panel"].unique())
    many = min(most, max(df.groupby("panel")["class"].nunique()))
    cols, rows = min(2, len(panels)), -(-len(panels) // 2)
    fig, axes = figure(
        rows, cols, width=min(WIDE, 4.6 * cols), height=0.3 + (0.5 + 0.25 * many) * rows
    )
    for ax in axes.flat[len(panels) :]:
        ax.axis("off")
    for ax, panel in zip(axes.flat, panels, strict=False):
        wide = df[df["panel"] == panel].assign(
            side=lambda d: np.where(d["features"] == "E", "E", "FUNGI")
        )
        table = wide.pivot_table(
            index=["class", "share"], columns="side", values="value", sort=False
        ).reset_index()
        table = table.assign(gain=table["FUNGI"] - table["E"]).sort_values("gain", ascending=False)
        if len(table) > most:
            table = pd.concat([table.head(most // 2), table.tail(most - most // 2)])
        y = np.arange(len(table))
        ax.barh(y - 0.2, table["E"], height=0.38, color=COLOURS["E"])
        ax.barh(y + 0.2, table["FUNGI"], height=0.38, color=FUNGI)
        for at, (_, r) in zip(y, table.iterrows(), strict=True):
            edge = np.nanmax([r["E"], r["FUNGI"], 0])
            text = f"{r['gain']:+.1f}".replace("-", "−")
            ax.annotate(
                text, (edge, at), (4, 0), textcoords="offset points", va="center_baseline", size=7.5
            )
        ax.set_yticks(
            y,
            [
                f"{c} ({share:.1f} %)"
                for c, share in zip(table["class"], table["share"], strict=True)
            ],
        )
        ax.set(ylim=(len(table) - 0.4, -0.6), xlabel="IoU (%)", title=panel)
        ax.margins(x=0.12)
        ax.grid(axis="x")
        ax.tick_params(axis="y", length=0)
    keys = {
        "embedding": {"color": COLOURS["E"], "marker": "s"},
        "FUNGI": {"color": FUNGI, "marker": "s"},
    }
    _legend(fig, keys, None)
    return fig


def throughput(df: pd.DataFrame) -> Figure:
    """Table 22: images/s of each feature (log axis) and the fraction of its floor that is reached.

    `df`: features, value and floor (images/s; the floor is the stock forward pass divided by the
    number of views), and optionally paper and paper_floor (images/s), low, high.
    """
    df = _need(df, "features", "value", "floor").assign(
        **{"paper_floor": np.nan} if "paper_floor" not in df else {}
    )
    fig, axes = figure(1, 2, height=1.1 + 0.36 * len(df), sharey=True)
    speed, share = axes[0]
    for y, (_, r) in enumerate(df.iterrows()):
        ink = colour(r["features"])
        _interval(speed, r["value"], y, r, ink, horizontal=True)
        speed.plot(
            r["floor"],
            y,
            marker="|",
            color=INK,
            markersize=10,
            markeredgewidth=1.2,
            linestyle="none",
        )
        speed.plot(r["paper"], y, color=ink, **OPEN)
        share.barh(y, r["value"] / r["floor"], height=0.5, color=ink)
        share.plot(r["paper"] / r["paper_floor"], y, color=INK, **OPEN)
        absent = np.isnan(r["value"])
        text = {
            "color": PALE if absent else contrast(ink),
            "va": "center_baseline",
            "textcoords": "offset points",
        }
        share.annotate(
            "not run" if absent else f"{r['value'] / r['floor']:.2f}", (0, y), (4, 0), **text
        )
    names = df["features"].map(lambda f: "embedding" if f == "E" else f"{NAMES.get(f, f)} gradient")
    if "backbone" in df and df["backbone"].nunique() > 1:
        names = names + "\n" + df["backbone"]
    speed.set(
        yticks=range(len(df)),
        yticklabels=names,
        ylim=(len(df) - 0.5, -0.5),
        xscale="log",
        xlabel="images/s",
    )
    speed.xaxis.set_major_locator(LogLocator())
    speed.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    speed.minorticks_off()
    speed.grid(axis="x")
    speed.tick_params(axis="y", length=0)
    share.axvline(1, color=INK, linewidth=0.7, linestyle=(0, (4, 3)))
    share.set(xlabel="fraction of the floor\n(stock forward pass / views)", xlim=(0, None))
    share.tick_params(axis="y", length=0)
    keys = {"ours": {}, "floor": {"marker": "|", "markersize": 9}}
    _legend(fig, keys, "the paper's (A100, ViT-B/16)" if df["paper"].notna().any() else None)
    return fig


def against_published(df: pd.DataFrame) -> Figure:
    """Ours and the published library on the same images: images/s (log axis, the ratio written) and
    peak memory.

    `df`: machine, backbone, features, value, published (images/s), ratio, memory, published_memory
    (GiB).
    """
    df = _need(
        df, "machine", "features", "value", "published", "ratio", "memory", "published_memory"
    )
    many = df["machine"].nunique() > 1
    names = df["features"].map(NAMES) + (", " + df["machine"] if many else "")
    fig, axes = figure(1, 2, height=0.9 + 0.32 * len(df), sharey=True)
    speed, memory = axes[0]
    for y, (_, r) in enumerate(df.iterrows()):
        ink = colour(r["features"])
        speed.plot([r["published"], r["value"]], [y, y], color=ink, linewidth=1, alpha=0.5)
        speed.plot(r["value"], y, marker="o", color=ink)
        speed.plot(r["published"], y, color=ink, **OPEN)
        beside = {"textcoords": "offset points", "va": "center_baseline", "size": 7.5, "color": ink}
        speed.annotate(f"x {r['ratio']:.1f}", (r["value"], y), (6, 0), **beside)
        memory.plot(r["memory"], y, marker="o", color=ink)
        memory.plot(r["published_memory"], y, color=ink, **OPEN)
    speed.set(
        yticks=range(len(df)),
        yticklabels=names,
        ylim=(len(df) - 0.5, -0.5),
        xscale="log",
        xlabel="images/s",
    )
    speed.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
    speed.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    speed.minorticks_off()
    speed.margins(x=0.2)
    memory.set(xlabel="peak memory of the process (GiB)", xlim=(0, None))
    for ax in (speed, memory):
        ax.grid(axis="x")
        ax.tick_params(axis="y", length=0)
    _legend(fig, {"ours": {}}, "the published library")
    return fig


def scoreboard(df: pd.DataFrame) -> Figure:
    """Every claim in a row, grouped by verdict, disagreements first: ours (filled, with interval),
    the paper's (open).

    `df`: item ("Table 2"), claim (a few words), paper, value, low, high (points), verdict (of
    `figures.VERDICTS`), and optionally expected ("+" or "-": the side of zero that the claim
    predicts, shaded).
    """
    df = _need(df, "item", "claim", "paper", "value", "verdict").assign(
        expected=df.get("expected", "")
    )
    if unknown := set(df["verdict"]) - set(VERDICTS):
        raise ValueError(
            f"unknown verdict {sorted(unknown)[0]!r}: use one of {', '.join(VERDICTS)}"
        )
    df = df.assign(order=df["verdict"].map(list(VERDICTS).index)).sort_values(
        "order", kind="stable"
    )
    claims = [
        textwrap.fill(f"{item}: {claim}", 58)
        for item, claim in zip(df["item"], df["claim"], strict=True)
    ]
    heights = np.array([0.19 + 0.135 * c.count("\n") for c in claims])
    starts = (
        df["verdict"] != df["verdict"].shift()
    ).to_numpy()  # a new group: a heading above its first claim
    ys = np.cumsum(heights + 0.27 * starts) - heights / 2
    bottom = ys[-1] + heights[-1] / 2 + 0.05
    fig, [[ax]] = figure(height=bottom + 0.75)
    numbers = df[["paper", "value", "low", "high"]].to_numpy(float)
    left, right = min(0, np.nanmin(numbers)) - 1, max(0, np.nanmax(numbers)) + 1
    ax.set(
        yticks=ys,
        yticklabels=claims,
        ylim=(bottom, 0),
        xlim=(left, right),
        xlabel="difference (points)",
    )
    ax.tick_params(axis="y", length=0, labelsize=7.5)
    text = {
        "xycoords": ax.get_yaxis_transform(),
        "textcoords": "offset points",
        "annotation_clip": False,
    }
    for y, height, start, (_, r) in zip(ys, heights, starts, df.iterrows(), strict=True):
        ink = VERDICTS[r["verdict"]]
        if start:
            head = f"{r['verdict']} ({(df['verdict'] == r['verdict']).sum()})"
            ax.annotate(
                head,
                (0, y - height / 2 - 0.13),
                (-4, 0),
                ha="right",
                va="center",
                weight="bold",
                **text,
            )
        if r["expected"] in ("+", "-"):
            ends = (0, right) if r["expected"] == "+" else (left, 0)
            ax.fill_betweenx(
                [y - height / 2, y + height / 2], *ends, color="#F1F1F1", linewidth=0, zorder=0
            )
        ax.plot([r["paper"], r["value"]], [y, y], color="#BBBBBB", linewidth=1, zorder=1)
        ax.plot(r["paper"], y, color=ink, zorder=3, **OPEN)
        _interval(ax, r["value"], y, r, ink, horizontal=True, zorder=4)
    ax.axvline(0, color=INK, linewidth=0.7)
    ax.spines["left"].set_visible(False)
    shade = {"marker": "s", "markersize": 9, "color": "#DDDDDD"}
    _legend(fig, {"ours, 95 % interval": {}, "side that the claim predicts": shade}, "the paper's")
    return fig


def deltas(df: pd.DataFrame) -> Figure:
    """The paper's difference against ours: a reproduction lies on the diagonal, the other sign in a
    grey quadrant.

    `df`: id, paper, value, low, high (points), verdict; rows without either number are left out.
    The id is written where the paper's number is outside our interval. Both axes are linear to 2
    points and logarithmic beyond.
    """
    df = _need(df, "id", "paper", "value", "verdict")
    df = df[df["paper"].notna() & df["value"].notna()].sort_values("paper")
    if df.empty:
        raise ValueError("nothing to plot: no claim has the paper's number and ours")
    fig, [[ax]] = figure(width=1.6 * COLUMN, height=1.5 * COLUMN)
    numbers = df[["value", "low", "high"]].to_numpy(float)
    end = 2 * max(df["paper"].abs().max(), np.nanmax(np.abs(numbers)))
    for scale in (ax.set_xscale, ax.set_yscale):
        scale("symlog", linthresh=2, linscale=1.2)
    least = lambda values: 1.4 * min(-0.5, np.nanmin(values))
    ax.set(
        xlim=(least(df["paper"]), 1.6 * df["paper"].max()),
        ylim=(least(numbers), 1.4 * np.nanmax(numbers)),
    )
    ax.set(
        xlabel="the paper's difference (points)", ylabel="our difference (points), 95 % interval"
    )
    for low, high in ((-end, 0), (0, end)):
        ax.fill_between(
            [low, high], *((0, end) if low else (-end, 0)), color="#F1F1F1", linewidth=0, zorder=0
        )
    ax.plot([-end, end], [-end, end], color=PALE, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
    for line in (ax.axhline, ax.axvline):
        line(0, color=INK, linewidth=0.7)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(
            FixedLocator([x for x in (-20, -10, -5, -2, -1, 0, 1, 2, 5, 10, 20) if abs(x) < end])
        )
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_minor_locator(NullLocator())
    marks = {"disagrees": "X", "undecided": "s", "agrees": "o"}
    for _, r in df.iterrows():
        ink = VERDICTS[r["verdict"]]
        ax.plot([r["paper"]] * 2, [r["low"], r["high"]], color=ink, linewidth=1.2, alpha=0.7)
        ax.plot(
            r["paper"],
            r["value"],
            marker=marks[r["verdict"]],
            color=ink,
            linestyle="none",
            markersize=6,
        )
    counts = df["verdict"].value_counts()
    keys = {
        f"{v} ({counts[v]})": {"color": VERDICTS[v], "marker": m}
        for v, m in marks.items()
        if v in counts
    }
    _legend(fig, keys, None)
    # so that the axes have their place, and labels can keep clear of each other
    fig.draw_without_rendering()
    taken = []
    for _, r in (
        df[~df["paper"].between(df["low"], df["high"])]
        .sort_values("value", ascending=False)
        .iterrows()
    ):
        over = r["value"] > r["paper"]  # above the diagonal: the label goes up, away from it
        x, y = (
            ax.transData.transform((r["paper"], r["value"])) * 72 / fig.dpi
        )  # in points, as the offsets
        across, up, step = (-5, 4, 9) if over else (5, -4, -9)
        while any(abs(x + across - a) < 60 and abs(y + up - b) < 9 for a, b in taken):
            up += step
        taken.append((x + across, y + up))
        at = {"textcoords": "offset points", "ha": "right" if over else "left", "va": "center"}
        ax.annotate(
            r["id"],
            (r["paper"], r["value"]),
            (across, up),
            size=7.5,
            color=VERDICTS[r["verdict"]],
            **at,
        )
    return fig


def _legend(fig: Figure, keys: Mapping[str, Mapping], paper: str | None) -> None:
    """Key of the marks above the panels: label -> what differs from a filled dark dot, and the
    paper's open mark.
    """
    dot = {"linestyle": "none", "marker": "o", "color": INK}
    handles = [Line2D([], [], **(dot | dict(mark)), label=label) for label, mark in keys.items()]
    if paper:
        handles.append(Line2D([], [], color=INK, label=paper, **OPEN))
    style = {"handletextpad": 0.2, "columnspacing": 1.4, "borderpad": 0.1}
    fig.legend(
        handles=handles,
        loc="outside upper left",
        ncols=len(handles) if fig.get_figwidth() > 5 else 1,
        **style,
    )
