"""Heat maps of pairs of features and grids of images: arrays in, a `Figure` out; nothing is read or
written here.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import seaborn
from matplotlib.colors import Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from PIL import Image

from companion.figures.style import NAMES, VERDICTS, WIDE, colour, contrast, figure


def cka_heatmaps(matrices: Mapping[str, tuple[Sequence[str], np.ndarray]]) -> Figure:
    """Fig. 2, top: linear CKA of each pair of features; `matrices` maps a title to (labels, (n, n)
    array).
    """
    shade = {
        title: np.where(np.tri(len(m), dtype=bool), m, np.nan) for title, (_, m) in matrices.items()
    }
    return _triangles(matrices, shade, Normalize(0, 1), "Blues", ".2f", "linear CKA")[0]


def pair_matrix(
    acc: Mapping[str, tuple[Sequence[str], np.ndarray]],
    combined: Mapping[str, float] | None = None,
    reference: str = "E",
) -> Figure:
    """Fig. 2, bottom: kNN accuracy of each feature (diagonal) and pair; `acc` maps a title to
    (labels, (n, n)).

    Colour is the difference from the `reference` feature alone; `combined` gives, for each title,
    the accuracy of all features together, drawn as the framed cell in the empty corner.
    """
    numbers, shade = {}, {}
    for title, (labels, matrix) in acc.items():
        full = np.where(np.tri(len(labels), dtype=bool), matrix, np.nan)
        full[0, -1] = (combined or {}).get(title, np.nan)
        at = list(labels).index(reference)
        numbers[title], shade[title] = (labels, full), full - full[at, at]
    reach = max([0.1, *(np.nan_to_num(np.abs(s)).max() for s in shade.values())])
    label = f"points above {NAMES.get(reference, reference)} alone"
    fig, axes = _triangles(numbers, shade, Normalize(-reach, reach), "RdBu", ".1f", label)
    for ax, (labels, full) in zip(axes, numbers.values(), strict=True):
        if not np.isnan(full[0, -1]):
            n = len(labels)
            ax.add_patch(
                Rectangle(
                    (n - 1, 0),
                    1,
                    1,
                    facecolor="none",
                    edgecolor="black",
                    linewidth=1.2,
                    clip_on=False,
                )
            )
            ax.text(n - 1.12, 0.5, "all", ha="right", va="center_baseline", size=7.5)
    return fig


def source_layers(df: pd.DataFrame) -> Figure:
    """Fig. 8: accuracy of the gradients at every linear layer, a column of panels for each
    objective.

    `df`: features, kind (which layer of a block), block (from 1), value, low, high (percent), base
    (the embedding's accuracy). Above a heat map of the difference from the embedding with the
    accuracy written in, below lines.
    """
    kinds, objectives = list(df["kind"].unique()), list(df["features"].unique())
    blocks = sorted(df["block"].unique())
    inks = dict(zip(kinds, ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00"), strict=False))
    size = {"height": 1.3 + 0.3 * len(kinds) + 2.2, "height_ratios": [0.3 * len(kinds) + 0.2, 2.0]}
    fig, axes = figure(2, len(objectives), sharex="row", sharey="row", **size)
    reach = max(0.1, (df["value"] - df["base"]).abs().max())
    for (top, bottom), name in zip(axes.T, objectives, strict=True):
        here = df[df["features"] == name]
        wide = here.pivot(index="kind", columns="block", values="value").loc[kinds, blocks]
        base = here["base"].iloc[0]
        mesh = top.pcolormesh(
            wide - base, norm=Normalize(-reach, reach), cmap="RdBu", edgecolors="white", linewidth=1
        )
        for i, j in np.ndindex(wide.shape):
            ink = contrast(mesh.to_rgba(wide.iloc[i, j] - base))
            text = f"{wide.iloc[i, j]:.0f}"
            top.text(j + 0.5, i + 0.5, text, ha="center", va="center_baseline", size=7, color=ink)
        top.set(ylim=(len(kinds), 0), title=f"{NAMES[name]} gradient")
        top.set_xticks(np.arange(len(blocks)) + 0.5, blocks)
        top.set_yticks(np.arange(len(kinds)) + 0.5, kinds)
        top.spines[:].set_visible(False)
        top.tick_params(length=0)
        for kind in kinds:
            part = here[here["kind"] == kind].sort_values("block")
            bottom.fill_between(
                part["block"], part["low"], part["high"], color=inks[kind], alpha=0.1, linewidth=0
            )
            bottom.plot(
                part["block"], part["value"], color=inks[kind], marker="o", markersize=3, label=kind
            )
        bottom.axhline(
            base, color=colour("E"), linewidth=1, linestyle=(0, (4, 3)), label="embedding"
        )
        bottom.set(xlabel="block", xticks=blocks)
        bottom.grid(axis="y")
    axes[1, 0].set_ylabel("accuracy (%)")
    bar = fig.colorbar(mesh, ax=axes[0], aspect=8, pad=0.02, label="points above\nthe embedding")
    bar.outline.set_visible(False)
    fig.legend(
        *axes[1, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(kinds) + 1
    )
    return fig


def image_grid(
    images: Sequence,
    titles: Sequence[str] | None = None,
    ncols: int = 8,
    frames: Sequence[bool | None] | None = None,
) -> Figure:
    """Images (PIL, or arrays (H, W) or (H, W, 3)) in rows of `ncols`.

    `frames`: True for right (blue), False for wrong (vermillion), None for no frame.
    """
    if not len(images):
        raise ValueError("nothing to show: no images")
    ncols = min(ncols, len(images))
    rows, side = -(-len(images) // ncols), min(1.1, WIDE / ncols)
    lines = 1 + max(t.count("\n") for t in titles) if titles else 0
    fig, axes = figure(rows, ncols, width=side * ncols, height=rows * (side + 0.13 * lines))
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
    for i, (ax, image) in enumerate(zip(axes.flat, images, strict=False)):
        pixels = np.asarray(image)
        ax.imshow(pixels, cmap="gray" if pixels.ndim == 2 else None, interpolation="nearest")
        if titles:
            ax.set_title(titles[i], loc="center", size=7, pad=3)
        if frames:
            _framed(ax, frames[i])
    return fig


MASKS = (
    "#88CCEE",
    "#DDCC77",
    "#AA4499",
    "#7A7A7A",
    "#EE7733",
    "#117733",
    "#CC6677",
    "#44AA99",
    "#332288",
    "#882255",
    "#111111",
    "#999933",
)  # after Tol's muted scheme, safe for colour-blind readers


def class_colours(classes: int) -> np.ndarray:
    """A colour for each class, (classes, 3) in [0, 1]; beyond a dozen hues alternate in lightness."""
    if classes <= len(MASKS):
        return np.array([to_rgb(ink) for ink in MASKS[:classes]])
    light, dark = (np.array(seaborn.husl_palette(classes, s=0.85, l=tone)) for tone in (0.72, 0.45))
    order = np.argsort(
        np.arange(classes) * 0.618 % 1
    )  # neighbours in the list are far apart in hue
    return np.where(np.arange(classes)[:, None] % 2 == 0, light, dark)[order]


def painted(image, mask: np.ndarray, classes: int) -> np.ndarray:
    """A mask over its image in grey, borders between classes dark, void as the grey image; RGB in
    [0, 1].
    """
    fine = -(-400 // mask.shape[1])  # small images are enlarged, so that a border stays a thin line
    image, mask = (np.repeat(np.repeat(x, fine, 0), fine, 1) for x in (np.asarray(image), mask))
    grey = np.asarray(Image.fromarray(image).convert("L"))[..., None] / 255
    known = (mask < classes)[..., None]
    colours = class_colours(classes)[np.where(mask < classes, mask, 0)]
    out = np.where(known, 0.78 * colours + 0.22 * grey, 0.35 + 0.65 * grey)
    border = np.zeros(mask.shape, bool)
    border[:, 1:] |= mask[:, 1:] != mask[:, :-1]
    border[1:] |= mask[1:] != mask[:-1]
    return np.where(border[..., None], 0.08, out)


def mask_rows(rows: Sequence[Mapping], names: Sequence[str]) -> Figure:
    """Fig. 7: image, mask from the embedding, from FUNGI, and the truth, a row an image; the same
    colours everywhere.

    Each of `rows`: title, image (H, W, 3) uint8, masks {title: (H, W) class indices, else void};
    `names`: classes.
    """
    wide, high = np.asarray(rows[0]["image"]).shape[1::-1]
    columns = 1 + len(rows[0]["masks"])
    cell = WIDE / columns
    seen = np.unique(
        np.concatenate([np.unique(mask) for row in rows for mask in row["masks"].values()])
    )
    shown = [int(c) for c in seen if c < len(names)]
    lines = -(-len(shown) // 6)
    height = len(rows) * (cell * high / wide + 0.2) + 0.25 + 0.18 * lines
    fig, axes = figure(len(rows), columns, width=WIDE, height=height)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
    for line, row in zip(axes, rows, strict=True):
        line[0].imshow(row["image"])
        line[0].set_title(row["title"], size=7.5, pad=3)
        for ax, (title, mask) in zip(line[1:], row["masks"].items(), strict=True):
            ax.imshow(painted(row["image"], mask, len(names)), interpolation="nearest")
            ax.set_title(title, size=7.5, pad=3)
    colours = class_colours(len(names))
    handles = [
        Patch(facecolor=colours[c], edgecolor="#333333", linewidth=0.5, label=names[c])
        for c in shown
    ]
    if len(shown) < len(seen):
        handles.append(
            Patch(
                facecolor="#CFCFCF", edgecolor="#333333", linewidth=0.5, label="void (not scored)"
            )
        )
    fig.legend(
        handles=handles, loc="outside lower center", ncols=6, handlelength=1.2, columnspacing=1.2
    )
    return fig


def neighbours(query: Mapping, found: Mapping[str, Sequence[Mapping]]) -> Figure:
    """An image and, a row a feature set, what is nearest to it.

    `query` and each neighbour: image (H, W, 3) uint8, title; `right`: True, False or None as in
    `image_grid`; `box` (left, top, side): a patch of the image is meant, and of a neighbour only
    what is around it is shown.
    """
    count = max(map(len, found.values()))
    side = min(1.5, (WIDE - 1.9) / count)
    lines = 1 + max(one["title"].count("\n") for some in found.values() for one in some)
    height, ratios = len(found) * (side + 0.12 + 0.14 * lines) + 0.1, [1.9 / side, *[1] * count]
    fig, axes = figure(
        len(found), count + 1, width=2 + count * side, height=height, width_ratios=ratios
    )
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
    grid = axes[0, 0].get_gridspec()
    for ax in axes[:, 0]:
        ax.remove()
    tiles = [(fig.add_subplot(grid[:, 0]), query, None)]
    for line, (name, some) in zip(axes, found.items(), strict=True):
        line[1].set_ylabel(name)
        tiles += [(ax, one, 3.5) for ax, one in zip(line[1:], some, strict=False)]
    for ax, one, reach in tiles:
        patch = "box" in one
        ax.imshow(one["image"], interpolation="nearest" if reach and patch else "bilinear")
        if patch:
            left, top, width = one["box"]
            for ink, line in (("white", 2.6), ("black", 1.2)):
                frame = {"facecolor": "none", "edgecolor": ink, "linewidth": line}
                ax.add_patch(Rectangle((left - 0.5, top - 0.5), width, width, **frame))
            if reach:  # the patch and what is around it
                ax.set_xlim(left - reach * width, left + (reach + 1) * width)
                ax.set_ylim(top + (reach + 1) * width, top - reach * width)
        ax.set(xticks=[], yticks=[])
        ax.set_title(one["title"], size=7, pad=3, loc="center" if reach else "left")
        ax.spines[:].set_visible(False)
        _framed(ax, one.get("right"))
    return fig


def spectrograms(query: Mapping, found: Mapping[str, Sequence[Mapping]]) -> Figure:
    """A clip and, a row a feature set, the clips nearest to it, as log-mel spectrograms: time to
    the right, low bands below, each from its quietest to its loudest cell.

    `query` and each neighbour: bank (T, F), title, and `right` (True: blue frame, False:
    vermillion, None: no frame).
    """
    count = max(map(len, found.values()))
    fig, axes = figure(len(found), count + 1, height=1.45 * len(found) + 0.1)
    grid = axes[0, 0].get_gridspec()
    for ax in axes[:, 0]:
        ax.remove()
    tiles = [(fig.add_subplot(grid[:, 0]), query)]
    for line, (name, some) in zip(axes, found.items(), strict=True):
        line[1].set_ylabel(name)
        tiles += zip(line[1:], some, strict=False)
    for ax, one in tiles:
        ax.imshow(
            one["bank"].T, origin="lower", aspect="auto", cmap="magma", interpolation="nearest"
        )
        ax.set(xticks=[], yticks=[])
        ax.set_title(one["title"], size=7, pad=3, loc="center")
        verdict = {True: "agrees", False: "disagrees"}.get(one.get("right"))
        ax.spines[:].set(visible=bool(verdict), linewidth=2.5, color=VERDICTS.get(verdict, "none"))
    return fig


def changes(rows: Sequence[Mapping], title: str) -> Figure:
    """Images that a feature puts right (blue) or wrong (vermillion) where the embedding did not, a
    row an image.

    Each of `rows`: image, better (put right?), found {feature set: [(image, of the same class?),
    ...]}, two of them, and votes {feature set: neighbours of its class among all that vote}.
    """
    names, count = list(rows[0]["found"]), len(next(iter(rows[0]["found"].values())))
    gap, side = 0.3, WIDE / (2 * count + 1.9)
    ratios = [1.3, gap, *[1] * count, gap, *[1] * count]
    fig, axes = figure(
        len(rows), len(ratios), height=len(rows) * (side + 0.18) + 0.35, width_ratios=ratios
    )
    fig.get_layout_engine().set(w_pad=0.01, wspace=0)
    fig.suptitle(title, size=8, x=0.01, ha="left")
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
    for line, row in zip(axes, rows, strict=True):
        line[0].imshow(row["image"])
        line[0].set_title("put right" if row["better"] else "put wrong", size=7, pad=3)
        _framed(line[0], row["better"])
        for at, name in zip((2, 2 + count + 1), names, strict=True):
            label = f"{NAMES.get(name, name)}: {row['votes'][name]} votes for its class"
            above = {
                "transform": line[at].transAxes,
                "va": "bottom",
                "in_layout": False,
            }  # runs over the images beside
            line[at].text(0, 1.06, label, size=7, **above)
            for ax, (image, right) in zip(line[at:], row["found"][name], strict=False):
                ax.imshow(image)
                _framed(ax, right)
    return fig


def pairs(images: Sequence, titles: Sequence[str], ncols: int = 4) -> Figure:
    """Images two by two, (first, second) of each pair under one title; `ncols` pairs a row."""
    if not len(images):
        raise ValueError("nothing to show: no pairs")
    count = len(images) // 2
    ncols = min(ncols, count)
    rows, gap = -(-count // ncols), 0.25
    width_ratios = [1, 1, gap] * (ncols - 1) + [1, 1]
    fig, axes = figure(
        rows, 3 * ncols - 1, width=1.7 * ncols, height=1.1 * rows, width_ratios=width_ratios
    )
    fig.get_layout_engine().set(w_pad=0.01, wspace=0)
    for ax in axes.flat:
        ax.axis("off")
    for i in range(count):
        left, right = axes[i // ncols, 3 * (i % ncols) : 3 * (i % ncols) + 2]
        left.imshow(np.asarray(images[2 * i]))
        right.imshow(np.asarray(images[2 * i + 1]))
        left.set_title(titles[i], size=7, pad=3)
    return fig


def image_map(
    places: np.ndarray,
    images: Sequence,
    labels: Sequence[int] | None = None,
    names: Sequence[str] = (),
) -> Figure:
    """A 2-D map of images, (N, 2) places: a thumbnail wherever there is room for one, else a dot.

    `labels` (N,), `names`: a frame in the colour of its class around each; more than twelve share
    colours, and no legend is drawn.
    """
    fig, [[ax]] = figure(height=5.2)
    places = np.asarray(places, float)
    low, high = places.min(0), places.max(0)
    spread = np.where(high > low, high - low, 1)
    x, y = ((places - low) / spread * [WIDE - 0.6, 4.4]).T  # inches
    inks = None if labels is None else class_colours(max(len(names), 1))[np.asarray(labels)]
    ax.scatter(x, y, s=14, c="#888888" if inks is None else inks, linewidths=0)
    side, taken = 0.42, np.empty((0, 2))
    for i in range(len(places)):
        at = np.array([x[i], y[i]])
        if len(taken) and (np.abs(taken - at).max(1) < side).any():
            continue
        taken = np.vstack([taken, at])
        pixels = np.asarray(Image.fromarray(np.asarray(images[i])).convert("RGB").resize((96, 96)))
        box = (x[i] - side / 2, x[i] + side / 2, y[i] - side / 2, y[i] + side / 2)
        ax.imshow(pixels, extent=box, interpolation="bilinear", zorder=2)
        edge = "#888888" if inks is None else inks[i]
        ax.add_patch(
            Rectangle(
                box[::2], side, side, facecolor="none", edgecolor=edge, linewidth=1.6, zorder=3
            )
        )
    ax.set(
        xlim=(-side / 2, WIDE - 0.6 + side / 2),
        ylim=(-side / 2, 4.4 + side / 2),
        xticks=[],
        yticks=[],
    )
    ax.set_aspect("equal")
    ax.spines[:].set_visible(False)
    if labels is not None and len(names) <= 16:
        colours = class_colours(len(names))
        handles = [
            Patch(facecolor=ink, label=name) for ink, name in zip(colours, names, strict=True)
        ]
        columns = 6
        fig.legend(
            handles=handles,
            loc="outside lower center",
            ncols=columns,
            handlelength=1.2,
            columnspacing=1.2,
        )
    return fig


def _framed(ax, right: bool | None) -> None:
    """A frame for right (blue) or wrong (vermillion), none for None."""
    if right is not None:
        ax.spines[:].set(
            visible=True, linewidth=2.5, color=VERDICTS["agrees" if right else "disagrees"]
        )


def gradient_panels(
    image, matrices: Mapping[str, np.ndarray], blocks: Mapping[str, np.ndarray]
) -> Figure:
    """One image, its gradient matrix for each objective (D_out, D_in + 1), and below the vectors
    that are kept.

    `matrices` and `blocks` ((d,) each, unit length) are keyed by letter; `blocks` starts with the
    embedding, "E".
    """
    fig, axes = figure(2, 1 + len(matrices), height=3.4, height_ratios=[2, 1])
    axes[0, 0].imshow(np.asarray(image), interpolation="nearest")
    axes[0, 0].set_title("image")
    axes[0, 0].spines[:].set_visible(False)
    for ax, (letter, matrix) in zip(axes[0, 1:], matrices.items(), strict=True):
        reach = np.percentile(np.abs(matrix), 99)  # a few entries are far larger than the rest
        seaborn.heatmap(
            matrix, ax=ax, cmap="RdBu", vmin=-reach, vmax=reach, cbar=False, rasterized=True
        )
        ax.set(
            xlabel="input unit, bias last",
            ylabel="output unit" if letter == next(iter(matrices)) else "",
        )
        ax.set_title(f"{NAMES[letter]}, rank {np.linalg.matrix_rank(matrix)}")
    top = max(np.abs(vector).max() for vector in blocks.values())
    for ax, (letter, vector) in zip(axes[1], blocks.items(), strict=True):
        ax.bar(np.arange(len(vector)), vector, width=1, color=colour(letter))
        ax.spines["bottom"].set_visible(False)
        ax.set(ylim=(-top, top), xlabel=f"{len(vector)} entries")
        ax.set_title(NAMES[letter] + (", projected" if letter != "E" else ""))
        ax.margins(x=0)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
    return fig


def _triangles(
    panels: Mapping[str, tuple[Sequence[str], np.ndarray]],
    shade: Mapping,
    norm,
    cmap: str,
    fmt: str,
    label: str,
) -> tuple[Figure, list]:
    """Annotated heat maps in a grid, coloured by `shade` where it is not NaN, with one colour bar."""
    if not panels:
        raise ValueError("nothing to plot: no matrices")
    cols = min(len(panels), min((4, 3), key=lambda c: (-len(panels) % c, -c)))
    rows = -(-len(panels) // cols)
    side, tall = min(2.0, (WIDE - 0.6) / cols), 1 + max(t.count("\n") for t in panels)
    fig, axes = figure(rows, cols, width=side * cols + 0.6, height=rows * (side + 0.13 * tall))
    for ax in axes.flat[len(panels) :]:
        ax.axis("off")
    for ax, (title, (labels, numbers)) in zip(axes.flat, panels.items(), strict=False):
        n = len(labels)
        mesh = ax.pcolormesh(
            np.ma.masked_invalid(shade[title]),
            norm=norm,
            cmap=cmap,
            edgecolors="white",
            linewidth=1,
        )
        for i, j in zip(*np.nonzero(~np.isnan(shade[title])), strict=True):
            ink, text = contrast(mesh.to_rgba(shade[title][i, j])), format(numbers[i][j], fmt)
            ax.text(j + 0.5, i + 0.5, text, ha="center", va="center_baseline", size=7.5, color=ink)
        ax.set(ylim=(n, 0), aspect="equal")
        ax.set_xticks(np.arange(n) + 0.5, labels)
        ax.set_yticks(np.arange(n) + 0.5, labels)
        ax.spines[:].set_visible(False)
        ax.tick_params(length=0)
        ax.set_title(title)
    bar = fig.colorbar(mesh, ax=axes, shrink=0.8, aspect=18, pad=0.02, label=label)
    bar.outline.set_visible(False)
    return fig, list(axes.flat[: len(panels)])
