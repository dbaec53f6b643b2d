"""Draw one step of the relational memory core as an SVG, in the symbols of the README.

Example: python docs/draw_step.py docs/step.svg
"""

import random
import re
import sys
from pathlib import Path

WIDTH, HEIGHT = 370, 500
N, D = 3, 6  # rows and columns of the memory in the picture
BLUE, ORANGE, GREEN, PURPLE, GRAY = "#3b6fb6", "#e8833a", "#3f9b6c", "#7a5ba6", "#6b7280"
# Opaque, so that it is legible in dark mode too.
START = f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}">
<title>One step of the relational memory core</title>
<style>
text {{ font: 14px Georgia, 'Times New Roman', serif; fill: #1f2430 }}
.note {{ font: 11px Helvetica, Arial, sans-serif; fill: #5b6270 }}
.number {{ font: bold 11px Helvetica, Arial, sans-serif; fill: #fff }}
.line {{ fill: none; stroke: {GRAY}; stroke-width: 1.3; marker-end: url(#head) }}
.box {{ fill: #f4f5f8; stroke: #d5d8e0 }}
</style>
<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">
<path d="M0 0L8 4L0 8z" fill="{GRAY}"/></marker></defs>
<rect width="{WIDTH}" height="{HEIGHT}" rx="10" fill="#fff"/>"""
BOXES = [(8, 146), (168, 88), (270, 30), (314, 56), (384, 30), (428, 64)]  # top and height
FORMULAS = [  # x, y, text
    (44, 25, "M"), (184, 25, "x"), (268, 38, "r"), (184, 80, "r = x W_in + b_in"), (184, 118, "Z = [M; r]"),
    (44, 187, "A"), (140, 188, "Q, K, V = LN(Z W_qkv)"), (140, 217, "A = softmax(Q K&#7488; / &#8730;d_k)"),
    (140, 246, "Z &#8592; LN(Z + A V)"), (44, 290, "Z &#8592; LN(Z + MLP(Z))"),
    (140, 338, "C = first N rows of Z"), (44, 404, "i, f = &#963;(tanh(M) W_M + r W_r + b)"),
]  # fmt: skip
NOTES = [
    (62, 25, "memory, N &#215; D"), (196, 25, "input"), (278, 38, "1 &#215; D"),
    (252, 118, "(N + 1) &#215; D"), (57, 187, "for each head"), (210, 290, "each row on its own"),
    (140, 357, "candidate; the input row is dropped"), (284, 404, "gates"),
]  # fmt: skip
ARROWS = ["83 154V166", "83 256V268", "83 300V312", "83 72V90", "239 51H264", "349 51H354V137H125"]
# x, y, a color for each row, columns, size of a cell, seed of the shades
GRIDS = [
    (44, 32, [BLUE] * N, D, 13, 1), (184, 45, [GRAY], 4, 13, 0), (268, 45, [ORANGE], D, 13, 2),
    (44, 92, [BLUE] * N, D, 13, 1), (44, 131, [ORANGE], D, 13, 2), (44, 322, [GREEN] * N, D, 13, 7),
    (44, 194, [PURPLE] * (N + 1), N + 1, 13, 5),
]  # fmt: skip
UPDATE = [("M&#8242;", BLUE, 9, "="), ("i", GRAY, 11, "&#8727;"), ("tanh(C)", GREEN, 7, "+"),
          ("f", GRAY, 13, "&#8727;"), ("M", BLUE, 1, "")]  # fmt: skip


def symbol(match: re.Match) -> str:
    """Return a name of a formula, in italics if it is one letter, with its index."""
    name, index = match.groups()
    low = f'<tspan dy="4" font-size="10">{index}</tspan><tspan dy="-4">&#8203;</tspan>' if index else ""
    return f'<tspan font-style="{"italic" if len(name) == 1 else "normal"}">{name}</tspan>{low}'


def text(x: float, y: float, content: str, anchor: str = "start", style: str = "") -> str:
    """Return a text; without a style it is a formula."""
    content = content if style else re.sub("([A-Za-z]+)(?:_([A-Za-z]+))?", symbol, content)
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" class="{style}">{content}</text>'


def grid(x: float, y: float, colors: list[str], columns: int, cell: int, seed: int) -> str:
    """Return a matrix whose entries differ in opacity."""
    draw, size = random.Random(seed), cell - 1
    return "\n".join(
        f'<rect x="{x + j * cell}" y="{y + i * cell}" width="{size}" height="{size}" rx="1.5" '
        f'fill="{color}" opacity="{draw.uniform(0.35, 1):.2f}"/>'
        for i, color in enumerate(colors)
        for j in range(columns)
    )


def main() -> None:
    """Write the picture to the file on the command line."""
    parts = [START]
    for number, (y, height) in enumerate(BOXES, start=1):
        parts.append(f'<rect class="box" x="10" y="{y}" width="350" height="{height}" rx="6"/>')
        parts.append(f'<circle cx="25" cy="{y + 15}" r="8" fill="#4b5563"/>')
        parts.append(text(25, y + 19, str(number), "middle", "number"))
    parts += [text(*formula) for formula in FORMULAS] + [text(*note, "start", "note") for note in NOTES]
    parts += [f'<path class="line" d="M{path}"/>' for path in ARROWS] + [grid(*given) for given in GRIDS]
    for x, (name, color, seed, sign) in zip(range(40, 370, 65), UPDATE, strict=False):
        parts += [text(x + 23, 449, name, "middle"), text(x + 56, 474, sign, "middle")]
        parts.append(grid(x, 457, [color] * N, D, 8, seed))
    Path(sys.argv[1]).write_text("\n".join([*parts, "</svg>\n"]), encoding="utf-8")


if __name__ == "__main__":
    main()
