"""Draws the site's diagrams: ``python docs/drawings.py`` writes ``docs/drawings/*.svg``.

The pages inline them, so that text and lines take the theme's colours, light or dark.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path

from calrobust import schedules

INK, FAINT = "var(--color-foreground-primary)", "var(--color-foreground-border)"
BLUE, ORANGE = "var(--color-brand-primary)", "#D55E00"
Matrix = list[list[float]]


def text(x: float, y: float, words: str, *, size: int = 17, anchor: str = "middle", color: str = INK) -> str:
    """One line, its baseline at ``y``."""
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}" fill="{color}">{words}</text>'


def box(x: float, y: float, width: float, height: float, *lines: str, dashed: bool = False) -> str:
    """A frame around some lines."""
    dash = ' stroke-dasharray="5 4"' if dashed else ""
    frame = f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6" fill="none" stroke="{INK}"{dash}/>'
    first = y + height / 2 + 6 - 10 * (len(lines) - 1)
    return frame + "".join(text(x + width / 2, first + 20 * i, line) for i, line in enumerate(lines))


def arrow(x0: float, y0: float, x1: float, y1: float, *, color: str = INK, both: bool = False) -> str:
    """A line with a head at its end, or at both."""
    angle, heads = math.atan2(y1 - y0, x1 - x0), ""
    for (x, y), turn in (((x1, y1), 0.0), ((x0, y0), math.pi))[: 2 if both else 1]:
        wings = [(x - 9 * math.cos(angle + turn + w), y - 9 * math.sin(angle + turn + w)) for w in (-0.4, 0.4)]
        heads += f'<polygon fill="{color}" points="{x:g},{y:g} {" ".join(f"{a:.1f},{b:.1f}" for a, b in wings)}"/>'
    return f'<line x1="{x0:g}" y1="{y0:g}" x2="{x1:g}" y2="{y1:g}" stroke="{color}" stroke-width="1.5"/>{heads}'


def heat_map(x: float, y: float, side: float, values: Matrix, *, color: str = BLUE) -> str:
    """Probabilities as the opacity of cells."""
    cell = side / len(values)
    cells = "".join(
        f'<rect x="{x + cell * j:.1f}" y="{y + cell * i:.1f}" width="{cell:.1f}" height="{cell:.1f}" fill="{color}" '
        f'fill-opacity="{value:.2f}"/>'
        for i, row in enumerate(values)
        for j, value in enumerate(row)
    )
    return f'{cells}<rect x="{x:g}" y="{y:g}" width="{side:g}" height="{side:g}" fill="none" stroke="{FAINT}"/>'


def document(width: int, height: int, title: str, parts: Iterable[str]) -> str:
    """The file."""
    head = f'<svg class="drawing" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">'
    return "\n".join([head, f"<title>{title}</title>", *parts, "</svg>", ""])


def softmax_rows(scores: Matrix) -> Matrix:
    """Of a similarity map."""
    rows = [[math.exp(score) for score in row] for row in scores]
    return [[value / sum(row) for value in row] for row in rows]


def similarities(sharpness: float, noise: float, phase: float, n: int = 6) -> Matrix:
    """A made-up map in which pairs 1 and 2, and 4 and 5, resemble each other."""
    alike = {(1, 2), (2, 1), (4, 5), (5, 4)}
    return [
        [
            sharpness * ((i == j) + 0.55 * ((i, j) in alike)) + noise * math.sin(2.3 * i + 4.1 * j + phase)
            for j in range(n)
        ]
        for i in range(n)
    ]


STUDENT = softmax_rows(similarities(2.6, 0.9, 0.0))
TEACHER = softmax_rows(similarities(3.2, 0.35, 1.0))
HARD = [[float(i == j) for j in range(6)] for i in range(6)]
SMOOTHED = [[0.7 * value + 0.3 / 6 for value in row] for row in HARD]


def overview() -> str:
    """The landing page's picture: what is trained, against what."""
    return document(
        640,
        330,
        "Student and teacher see the same pairs. MCL draws the student's similarity map to the smoothed target, MKD to "
        "the teacher's map. The teacher follows the student by a moving average. After training, T divides the logits.",
        [
            box(2, 104, 96, 58, "images", "and texts"),
            arrow(98, 122, 134, 78),
            arrow(98, 144, 134, 212),
            box(136, 36, 126, 58, "student θ,", "in training"),
            box(136, 194, 126, 58, "teacher ψ,", "frozen", dashed=True),
            arrow(199, 94, 199, 192, color=ORANGE),
            text(208, 140, "moving", anchor="start", size=16, color=ORANGE),
            text(208, 158, "average", anchor="start", size=16, color=ORANGE),
            text(199, 275, "starts as the", size=15),
            text(199, 293, "pre-trained model", size=15),
            arrow(262, 65, 308, 65),
            arrow(262, 223, 308, 223),
            heat_map(312, 16, 98, STUDENT),
            heat_map(312, 174, 98, TEACHER),
            text(361, 292, "similarity maps", size=15),
            arrow(361, 120, 361, 170, color=BLUE, both=True),
            text(372, 151, "MKD", anchor="start", color=BLUE),
            arrow(416, 65, 520, 65, color=BLUE, both=True),
            text(468, 55, "MCL", color=BLUE),
            heat_map(524, 16, 98, SMOOTHED, color=INK),
            text(573, 134, "right pairs,", size=15),
            text(573, 152, "smoothed", size=15),
            arrow(414, 112, 474, 192),
            box(470, 194, 160, 58, "after training:", "logits ÷ T"),
            text(550, 275, "T from", size=15),
            text(550, 293, "held-out data", size=15),
        ],
    )


def targets() -> str:
    """What a row of the map is asked to be."""
    maps = (
        ("hard", HARD, "one right text"),
        ("smoothed", SMOOTHED, "ε for all alike"),
        ("distilled", TEACHER, "what is alike"),
    )
    parts = []
    for i, (name, values, note) in enumerate(maps):
        x = 20 + 215 * i
        parts += [
            text(x + 85, 24, name),
            heat_map(x, 36, 170, values, color=INK if i < 2 else BLUE),
            text(x + 85, 230, note, size=15),
        ]
    title = (
        "Three targets for a batch of six pairs: the identity, the identity smoothed, and a teacher's similarity map."
    )
    return document(640, 244, title, parts)


def teacher() -> str:
    """Of which models the teacher is the mean after 30 updates."""
    updates, parts = 30, []
    panels: tuple[tuple[str, Callable[[int], float]], ...] = (
        ("decay 0.95", schedules.constant(0.95)),
        ("linear_warmup(0.05, 0.9, 10)", schedules.linear_warmup(0.05, 0.9, updates=10)),
    )
    for i, (name, schedule) in enumerate(panels):
        weights = [1.0]
        for n in range(updates):
            weights = [schedule(n) * weight for weight in weights] + [1 - schedule(n)]
        x, width = 20 + 320 * i, 9
        parts.append(text(x + 140, 24, name))
        for k, weight in enumerate(weights):
            height = 500 * weight
            color = ORANGE if k == 0 else BLUE
            place = f'x="{x + width * k:g}" y="{170 - height:.1f}" width="{width - 1}" height="{height:.1f}"'
            parts.append(f'<rect {place} fill="{color}"/>')
        parts += [
            f'<line x1="{x}" y1="170" x2="{x + width * 31}" y2="170" stroke="{FAINT}"/>',
            text(x, 190, f"pre-trained: {100 * weights[0]:.0f} %", anchor="start", size=15, color=ORANGE),
            text(x + width * 31, 190, "last student", anchor="end", size=15, color=BLUE),
        ]
    title = (
        "Weights of the models in the teacher after 30 updates. A constant decay of 0.95 leaves 21 % on the "
        "pre-trained model, the warm-up from 0.05 leaves nothing."
    )
    return document(640, 204, title, parts)


DRAWINGS = {"overview": overview, "targets": targets, "teacher": teacher}

if __name__ == "__main__":
    folder = Path(__file__).parent / "drawings"
    folder.mkdir(exist_ok=True)
    for name, draw in DRAWINGS.items():
        (folder / f"{name}.svg").write_text(draw(), encoding="utf-8")
