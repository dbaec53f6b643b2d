"""Draw one step of the Relational Memory Core into step.svg, beside this file.

Example: python docs/draw_step.py

The numbers 1 to 6 in the drawing are those of the equations in README.md. Needs matplotlib.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.patches import Circle, FancyBboxPatch, Rectangle

MEMORY, INPUT, GATE, LINE, PANEL = "#2f6db3", "#e07b00", "#2e8b57", "#444444", "#eef0f3"
WIDTH, HEIGHT, INCHES = 100, 143, 5.0  # size in drawing units, y downwards; width in inches
FONT = 10.5
FEATURES, CELL = 8, 3.4  # features of a memory row; size of one cell
LEFT = 33.0  # left and right edge of the main column, and its centre
RIGHT = LEFT + FEATURES * CELL
CENTRE = (LEFT + RIGHT) / 2
SKIP = 27.5  # x of the residual connections


def matrix(
    axes: Axes, x: float, y: float, colours: Sequence[str], columns: int, cell: float = CELL, shift: int = 0
) -> None:
    """Draw a matrix with its top left corner at (x, y): one colour per row, in shades that shift varies."""
    for row, colour in enumerate(colours):
        for column in range(columns):
            strength = 0.2 + 0.06 * ((7 * row + 4 * column + 3 * row * column + columns + shift) % 11)
            shade = tuple(1 - strength * (1 - part) for part in to_rgb(colour))
            place = (x + column * cell, y + row * cell)
            axes.add_patch(Rectangle(place, cell, cell, facecolor=shade, edgecolor="white", linewidth=0.8))
        frame = Rectangle(
            (x, y + row * cell), columns * cell, cell, fill=False, edgecolor=colour, linewidth=1
        )
        axes.add_patch(frame)


def write(axes: Axes, x: float, y: float, text: str, colour: str = "black", align: str = "left") -> None:
    """Write text at (x, y), centred vertically."""
    axes.text(x, y, text, color=colour, ha=align, va="center_baseline", fontsize=FONT, zorder=4)


def box(
    axes: Axes, y: float, text: str, x: float = LEFT, width: float = RIGHT - LEFT, colour: str = LINE
) -> None:
    """Draw an operation as a rounded box, 5 units high, with its top left corner at (x, y)."""
    style = {"boxstyle": "round,pad=0,rounding_size=1.2", "facecolor": "white", "edgecolor": colour}
    axes.add_patch(FancyBboxPatch((x, y), width, 5, **style))
    write(axes, x + width / 2, y + 2.5, text, align="center")


def operator(axes: Axes, x: float, y: float, symbol: str, colour: str = LINE) -> None:
    """Draw an operator in a circle of radius 2.2 around (x, y)."""
    axes.add_patch(Circle((x, y), 2.2, facecolor="white", edgecolor=colour, zorder=3))
    write(axes, x, y, symbol, align="center")


def path(axes: Axes, *points: tuple[float, float], colour: str = LINE, branch: bool = False) -> None:
    """Draw a line through the points, with an arrowhead at the last one; a branch begins with a dot."""
    xs, ys = zip(*points, strict=True)
    if branch:
        axes.add_patch(Circle(points[0], 0.7, facecolor=colour, edgecolor="none"))
    axes.plot(xs[:-1], ys[:-1], color=colour, linewidth=1.3, solid_joinstyle="miter")
    arrow = {
        "arrowstyle": "-|>",
        "color": colour,
        "linewidth": 1.3,
        "shrinkA": 0,
        "shrinkB": 0,
        "mutation_scale": 9,
    }
    axes.annotate("", points[-1], points[-2], arrowprops=arrow)


def number(axes: Axes, x: float, y: float, digit: int, text: str = "") -> None:
    """Draw the number of an equation, with the name of what it does."""
    axes.add_patch(Circle((x, y), 2.5, facecolor=LINE, edgecolor="none"))
    write(axes, x, y, str(digit), "white", "center")
    write(axes, x + 4, y, text)


def draw(axes: Axes) -> None:
    """Draw the step from top to bottom."""
    # 1: the projected input becomes one more row.
    row = 2 + 3 * CELL + 0.8  # top of the input's row
    number(axes, 3.5, 4.5, 1, "append input")
    matrix(axes, LEFT, 2, [MEMORY] * 3, FEATURES)
    matrix(axes, LEFT, row, [INPUT], FEATURES)
    matrix(axes, 6, row, [INPUT], 4)
    write(axes, 5, row + CELL / 2, "$x$", INPUT, "right")
    path(axes, (6 + 4 * CELL + 0.6, row + CELL / 2), (LEFT - 0.4, row + CELL / 2), colour=INPUT)
    write(axes, RIGHT + 2, 4.4, "memory $M$", MEMORY)
    write(axes, RIGHT + 2, row - 1, "row $r$", INPUT)

    # 2: attention between all rows.
    panel = {"boxstyle": "round,pad=0,rounding_size=2", "facecolor": PANEL, "edgecolor": "none"}
    axes.add_patch(FancyBboxPatch((24, 18), RIGHT + 4 - 24, 70.5, **panel))
    axes.text(67.4, 54.5, "once per block", rotation=90, ha="center", va="center", fontsize=FONT, color=LINE)
    number(axes, 3.5, 44, 2, "attend")
    path(axes, (CENTRE, row + CELL), (CENTRE, 24))
    box(axes, 24, "linear, norm")
    for shift, name in enumerate("qkv"):
        x = LEFT + 10 * shift
        path(axes, (x + 3.6, 29), (x + 3.6, 33.6))
        matrix(axes, x, 33.6, [MEMORY] * 3 + [INPUT], 3, 2.4, 5 * shift)
        write(axes, x + 5, 31.2, f"${name}$")
    weights = LEFT + 3  # left edge of the attention weights
    path(axes, (LEFT + 3.6, 43.2), (LEFT + 3.6, 45.4), (weights + 3.6, 48))
    path(axes, (LEFT + 13.6, 43.2), (LEFT + 13.6, 45.4), (weights + 7.6, 48))
    matrix(axes, weights, 48, [LINE] * 4, 4, 2.8, 2)
    write(axes, weights - 1.2, 53.6, "$A$", align="right")
    mix = LEFT + 23.6
    path(axes, (weights + 11.2, 53.6), (mix - 2.2, 53.6))
    path(axes, (mix, 43.2), (mix, 51.4))
    operator(axes, mix, 53.6, "@")
    path(axes, (mix, 55.8), (mix, 62.4))
    path(axes, (CENTRE, 20.4), (SKIP, 20.4), (SKIP, 64.9), (LEFT, 64.9), branch=True)
    box(axes, 62.4, "add, norm")

    # 3: an MLP on each row.
    number(axes, 3.5, 74.4, 3, "each row")
    path(axes, (CENTRE, 67.4), (CENTRE, 71.9))
    box(axes, 71.9, "MLP")
    path(axes, (CENTRE, 76.9), (CENTRE, 81.4))
    path(axes, (CENTRE, 68.8), (SKIP, 68.8), (SKIP, 83.9), (LEFT, 83.9), branch=True)
    box(axes, 81.4, "add, norm")

    # 4: the input's row is dropped.
    number(axes, 3.5, 96.6, 4, "keep $N$ rows")
    path(axes, (CENTRE, 86.4), (CENTRE, 91.5))
    matrix(axes, LEFT, 91.5, [MEMORY] * 3, FEATURES, shift=4)
    dropped = (LEFT, 91.5 + 3 * CELL + 0.8)
    axes.add_patch(Rectangle(dropped, RIGHT - LEFT, CELL, fill=False, edgecolor=INPUT, linestyle=":"))
    write(axes, RIGHT + 1.5, 91.5 + 1.5 * CELL, "$C$", MEMORY)
    write(axes, RIGHT + 1.5, dropped[1] + CELL / 2, "dropped", INPUT)

    # 5: the gates read the memory before the step and the input's row.
    number(axes, 69, 96.6, 5)
    box(axes, 94.1, "gates", 73.5, 21, GATE)
    path(axes, (RIGHT, row + CELL / 2), (79, row + CELL / 2), (79, 94.1), colour=INPUT)
    path(axes, (RIGHT, 2 + 1.5 * CELL), (97.5, 2 + 1.5 * CELL), (97.5, 126), (91.2, 126), colour=MEMORY)
    path(axes, (97.5, 88), (89, 88), (89, 94.1), colour=MEMORY, branch=True)
    path(axes, (79, 99.1), (79, 118), (CENTRE + 2.2, 118), colour=GATE)
    path(axes, (89, 99.1), (89, 123.8), colour=GATE)
    write(axes, 77.5, 103, "$i$", GATE, "right")
    write(axes, 87.5, 103, "$f$", GATE, "right")

    # 6: the gated sum is the new memory.
    number(axes, 3.5, 122, 6, "write")
    path(axes, (CENTRE, 91.5 + 3 * CELL), (CENTRE, 107.6))
    box(axes, 107.6, "tanh", CENTRE - 7, 14)
    path(axes, (CENTRE, 112.6), (CENTRE, 115.8))
    operator(axes, CENTRE, 118, "×")
    path(axes, (CENTRE, 120.2), (CENTRE, 123.8))
    operator(axes, 89, 126, "×")
    path(axes, (86.8, 126), (CENTRE + 2.2, 126))
    operator(axes, CENTRE, 126, "+")
    path(axes, (CENTRE, 128.2), (CENTRE, 131))
    matrix(axes, LEFT, 131, [MEMORY] * 3, FEATURES, shift=8)
    write(axes, RIGHT + 2, 133.4, "new memory $M$′", MEMORY)
    write(axes, RIGHT + 2, 138.6, "= output")


def main(argv: Sequence[str] | None = None) -> None:
    """Write the drawing to the path given, step.svg by default."""
    arguments = sys.argv[1:] if argv is None else argv
    target = Path(arguments[0]) if arguments else Path(__file__).with_name("step.svg")
    matplotlib.rcParams.update(
        {"svg.hashsalt": "step", "font.family": "DejaVu Sans", "mathtext.fontset": "stix"}
    )
    figure = plt.figure(figsize=(INCHES, INCHES * HEIGHT / WIDTH), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(HEIGHT, 0))
    axes.axis("off")
    draw(axes)
    figure.savefig(target, dpi=160, metadata={"Date": None} if target.suffix == ".svg" else None)
    print(f"wrote {target}")


if __name__ == "__main__":
    main()
