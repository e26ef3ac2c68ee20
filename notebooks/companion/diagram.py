"""FUNGI in one picture (what the paper's Figs 1 and 4 explain), drawn in its own units."""

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from companion.figures.style import COLOURS, FUNGI, WIDE, figure

INK, GREY, WIDTH, HEIGHT = "#333333", "#767676", 6.8, 3.5
ROWS = {"K": 2.88, "D": 2.38, "S": 1.88}  # heights of the three objectives' lanes


def method_diagram() -> Figure:
    """The method from an image to a neighbour search: three objectives, one layer's gradient, one
    feature.
    """
    fig, [[ax]] = figure(
        width=WIDE, height=HEIGHT * WIDE / WIDTH
    )  # drawn in its own units: the text gains on the rest
    fig.set_layout_engine("none")
    ax.set(position=[0, 0, 1, 1])
    picture = _toadstool()
    _views(ax, picture)
    _transformer(ax)
    _losses(ax)
    _features(ax)
    ax.set(xlim=(0, WIDTH), ylim=(0, HEIGHT), aspect="equal")
    ax.axis("off")
    fig.set_label(
        "The method in eight steps: views of one image, a frozen transformer, losses on random heads, the gradient of "
        "each at the last attention's output projection, its projection by signs, joined with the embedding, PCA, kNN."
    )
    return fig


def _views(ax, picture: np.ndarray) -> None:
    _step(ax, 1, 0.12, 3.3, "views of one image")
    n = len(picture)
    _tile(ax, picture, 0.12, 2.38, 0.8)
    for lane, y in ROWS.items():
        _arrow(ax, (0.95, 2.38 + 0.25 * (y - 2.38)), (1.32, y + 0.06), COLOURS[lane])
        _arrow(
            ax, ({"K": 1.72, "D": 2.42, "S": 2.38}[lane], y + 0.06), (2.72, y + 0.06), COLOURS[lane]
        )
    _tile(ax, picture, 1.36, ROWS["K"] + 0.06, 0.3)
    for i, (top, left) in enumerate(
        [(0, 0), (n // 4, n // 4)]
    ):  # two global crops, then local ones
        _tile(
            ax,
            picture[top : top + 3 * n // 4, left : left + 3 * n // 4],
            1.36 + 0.33 * i,
            ROWS["D"] + 0.06,
            0.3,
        )
    for i, (top, left) in enumerate([(n // 12, n // 3), (n // 3, n // 2), (n // 2, n // 3)]):
        _tile(
            ax,
            picture[top : top + n // 3, left : left + n // 3],
            2.02 + 0.1 * i,
            ROWS["D"] + 0.13 - 0.07 * i,
            0.14,
        )
    for i in range(6):
        patch = picture[n // 4 : 3 * n // 4, i * n // 12 : n // 2 + i * n // 12]
        _tile(ax, patch, 1.36 + 0.145 * i, ROWS["S"] + 0.06, 0.24)
    for lane, label in {
        "K": "KL: the image",
        "D": "DINO: 12 crops",
        "S": "SimCLR: 49 patches",
    }.items():
        ax.text(1.36, ROWS[lane] - 0.115, label, size=6.8, va="top", color=INK)


def _transformer(ax) -> None:
    _step(ax, 2, 2.75, 3.3, "frozen transformer")
    _box(ax, 2.75, 1.62, 1.62, 1.5, "#F4F4F4", "#BBBBBB")
    for x in (2.85, 3.02, 3.19):
        _box(ax, x, 1.82, 0.11, 1.2, "white", "#999999")
    ax.text(2.85, 1.67, "blocks", size=6.8, color=GREY)
    _box(ax, 3.4, 1.77, 0.87, 1.3, "white", "#777777")
    ax.text(3.88, 1.67, "last block", size=6.2, color=GREY)
    for x, y, name in (
        (3.46, 2.42, "attention"),
        (3.72, 2.42, "output projection"),
        (3.98, 2.63, "MLP"),
    ):
        target = name == "output projection"  # the layer whose gradient is taken
        _box(
            ax,
            x,
            1.83,
            0.22,
            1.18,
            "#F0E442" if target else "#E8E8E8",
            "black" if target else "#999999",
        )
        ax.text(x + 0.115, y, name, rotation=90, ha="center", va="center", size=7, color="black")


def _losses(ax) -> None:
    _step(ax, 3, 4.85, 3.3, "losses on random heads")
    losses = {
        "K": "KL to the uniform",
        "D": "cross-entropy, 2 × 12 views",
        "S": "InfoNCE, fixed negatives",
    }
    for lane, y in ROWS.items():
        _arrow(ax, (4.27, y + 0.06), (4.85, y + 0.06), COLOURS[lane])
        _arrow(ax, (4.85, y - 0.08), (3.94, y - 0.08), COLOURS[lane], dashed=True)
        _box(ax, 4.87, y - 0.17, 1.8, 0.34, "white", COLOURS[lane])
        ax.text(5.77, y, losses[lane], ha="center", va="center_baseline", size=7.5, color=INK)
    note = "dashed: back-propagation,\nonly as far as one layer"
    ax.text(6.67, 1.52, note, ha="right", va="center", size=6.8, color=GREY)


def _features(ax) -> None:
    rng = np.random.default_rng(3)
    middle = 0.62
    ax.plot([3.83, 3.83, 0.75, 0.75], [1.83, 1.45, 1.45, 1.33], color=INK, linewidth=1)
    _arrow(ax, (0.75, 1.36), (0.75, 1.3), INK)
    _step(ax, 4, 0.12, 1.2, "its gradient")
    d, a = rng.uniform(0.15, 1, (2, 7))
    for i, lane in enumerate("KDS"):
        _cells(
            ax, np.outer(d, a), 0.42 + 0.09 * i, middle - 0.19 - 0.06 * i, 0.5, 0.5, COLOURS[lane]
        )
    _cells(ax, d[:, None], 0.26, middle - 0.19, 0.08, 0.5, INK)
    _cells(ax, a[None], 0.42, middle + 0.34, 0.5, 0.08, INK)
    ax.text(0.19, middle + 0.06, "d", ha="center", va="center", style="italic")
    ax.text(1.0, middle + 0.38, "a", ha="center", va="center", style="italic")
    ax.text(0.7, 0.11, r"$G = \Sigma\; d\,[a;\,1]^\top$", ha="center", size=7.5)
    _arrow(ax, (1.22, middle), (1.62, middle), INK)
    _step(ax, 5, 1.72, 1.2, "projection by signs")
    _cells(ax, rng.integers(0, 2, (6, 16)), 1.72, middle - 0.2, 1.06, 0.4, INK)
    ax.text(2.25, 0.11, r"$g = R\,\mathrm{vec}(G),\; R_{ij} = \pm 1$", ha="center", size=7.5)
    _arrow(ax, (2.86, middle), (3.26, middle), INK)
    _step(ax, 6, 3.36, 1.2, "normalise, join")
    for i, lane in enumerate("KDSE"):
        x, ink = 3.36 + 0.38 * i, "black" if lane == "K" else "white"
        ax.fill_between([x, x + 0.36], middle - 0.1, middle + 0.1, color=COLOURS[lane], linewidth=0)
        ax.text(x + 0.18, middle, lane, ha="center", va="center_baseline", color=ink, weight="bold")
    ax.text(4.12, 0.11, r"$\phi = [g_K,\, g_D,\, g_S,\, e]$", ha="center", size=7.5)
    ax.plot([4.38, 4.68], [1.72, 1.72], color=COLOURS["E"], linewidth=1)
    _arrow(ax, (4.68, 1.727), (4.68, middle + 0.12), COLOURS["E"])
    ax.text(4.62, 1.5, "embedding", size=6.8, color=COLOURS["E"], ha="right", va="center")
    _arrow(ax, (4.94, middle), (5.24, middle), INK)
    _step(ax, 7, 5.26, 1.2, "PCA")
    ax.fill_between([5.3, 5.64], middle - 0.1, middle + 0.1, color=FUNGI, linewidth=0)
    ax.text(5.47, 0.11, "FUNGI", ha="center", size=7.5, weight="bold", color=FUNGI)
    _arrow(ax, (5.7, middle), (5.98, middle), INK)
    _step(ax, 8, 5.9, 1.2, "kNN")
    query, around = (
        np.array([6.36, middle + 0.02]),
        np.array([[-0.14, 0.16], [0.15, 0.12], [0.1, -0.19]]),
    )
    far = np.array(
        [[-0.3, 0.3], [-0.24, -0.2], [0.3, 0.29], [0.33, -0.08], [-0.05, 0.38], [0.27, -0.33]]
    )
    for x, y in query + around:
        ax.plot([query[0], x], [query[1], y], color=GREY, linewidth=0.8)
    ax.plot(*(query + far).T, "o", color=COLOURS["S"], markersize=4)
    ax.plot(*(query + around).T, "o", color=COLOURS["D"], markersize=4)
    ax.plot(*query, "*", color=FUNGI, markersize=9)
    ax.text(6.36, 0.11, "neighbours vote", ha="center", size=7)


def _step(ax, number: int, x: float, y: float, text: str) -> None:
    ax.text(
        x + 0.07,
        y,
        str(number),
        ha="center",
        va="center_baseline",
        size=7,
        color="white",
        weight="bold",
        bbox={"boxstyle": "circle,pad=0.2", "facecolor": INK, "edgecolor": "none"},
    )
    ax.text(x + 0.2, y, text, va="center_baseline", size=8, weight="bold", color=INK)


def _box(ax, x: float, y: float, width: float, height: float, fill: str, edge: str) -> None:
    corners = "round,pad=0,rounding_size=0.04"
    ax.add_patch(
        FancyBboxPatch((x, y), width, height, boxstyle=corners, facecolor=fill, edgecolor=edge)
    )


def _arrow(ax, start: tuple, end: tuple, ink: str, dashed: bool = False) -> None:
    style = {
        "arrowstyle": "-|>,head_length=0.3,head_width=0.15",
        "shrinkA": 0,
        "shrinkB": 0,
        "color": ink,
    }
    ax.annotate("", end, start, arrowprops=style | ({"linestyle": (0, (3, 2))} if dashed else {}))


def _tile(ax, picture: np.ndarray, x: float, y: float, side: float) -> None:
    """A square picture with its left edge at x, centred on height y."""
    ax.imshow(picture, extent=(x, x + side, y - side / 2, y + side / 2), zorder=2)
    corners = np.array([[0, 0], [1, 0], [1, 1], [0, 1], [0, 0]]) * side + [x, y - side / 2]
    ax.plot(*corners.T, color="white", linewidth=0.8, zorder=2)


def _cells(
    ax, values: np.ndarray, x: float, y: float, width: float, height: float, ink: str
) -> None:
    """A small matrix, white to `ink`, with its lower left corner at (x, y)."""
    rows, cols = values.shape
    shade = (values / values.max())[..., None]
    rgb = np.array([int(ink[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    edges = {"edgecolor": "white", "linewidth": 0.4}
    colours = (1 - shade) * [0.95, 0.95, 0.95] + shade * rgb
    ax.pcolormesh(
        np.linspace(x, x + width, cols + 1),
        np.linspace(y + height, y, rows + 1),
        colours,
        **edges,
        zorder=2,
    )


def _toadstool(n: int = 192) -> np.ndarray:
    """A (n, n, 3) uint8 picture to cut views from: a toadstool on a meadow."""
    y, x = np.mgrid[1 : -1 : n * 1j, -1 : 1 : n * 1j]
    image = np.where((y < -0.55 + 0.08 * np.sin(5 * x))[..., None], [110, 160, 80], [190, 220, 240])
    image[(np.abs(x) < 0.17 + 0.08 * (y < -0.4)) & (y < 0.1) & (y > -0.75)] = [245, 235, 215]
    cap = ((x / 0.78) ** 2 + ((y - 0.02) / 0.68) ** 2 < 1) & (y > 0.02)
    image[cap] = [200, 45, 35]
    dots = [
        (-0.4, 0.28, 0.11),
        (0.0, 0.45, 0.13),
        (0.42, 0.22, 0.1),
        (0.12, 0.16, 0.07),
        (-0.12, 0.14, 0.06),
    ]
    for cx, cy, r in dots:
        image[((x - cx) ** 2 + (y - cy) ** 2 < r**2) & cap] = [250, 245, 235]
    return image.astype(np.uint8)
