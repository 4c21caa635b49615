"""A stage's learning curves as one inline SVG: no script, colours from the page's style sheet."""

import html
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

SERIES = {"loss": "loss", "image_cosine": "image cosine", "text_cosine": "text cosine"}

WIDTH, LEFT, RIGHT = 400, 50, 388
PLOT_HEIGHT, BELOW = 180, 42
STROKE, LETTER, GAP = 30, 7, 16  # of the legend: a stroke, about the width of a letter, the room between two


class Point(NamedTuple):
    step: float
    value: float


# One line is a list of runs: where a value is missing, one run ends and the next begins.
Lines = dict[str, list[list[Point]]]


def read_lines(stage: str, records: Sequence[Mapping[str, Any]]) -> Lines:
    """The series of SERIES that have a value somewhere, as runs of points; None, nan and infinities are gaps.

    Raises ValueError naming the stage if a record has no step.
    """
    lines: Lines = {}
    for series in SERIES:
        runs: list[list[Point]] = [[]]
        for number, record in enumerate(records):
            if "step" not in record:
                raise ValueError(
                    f"curves[{stage!r}][{number}] has no 'step'; give the records of metrics.jsonl"
                )
            value = record.get(series)
            if value is None or not math.isfinite(value):
                runs.append([])
            else:
                runs[-1].append(Point(float(record["step"]), float(value)))
        if runs := [run for run in runs if run]:
            lines[series] = runs
    return lines


def round_ticks(low: float, high: float, smallest: float = 0.0) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten that enclose low..high: a handful, at least `smallest` apart."""
    if high <= low:
        room = abs(low) / 10 or 1.0
        low, high = low - room, high + room
    rough = max((high - low) / 6, smallest)
    power = 10.0 ** math.floor(math.log10(rough))
    # The tolerance keeps a rough step of 0.2 that floats made a little more than 2 x 0.1 at 0.2.
    apart = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / apart + 1e-9), math.ceil(high / apart - 1e-9)
    return [number * apart for number in range(first, last + 1)]


def format_ticks(ticks: Sequence[float]) -> list[str]:
    """With as many decimals as their distance needs; very large and very small ones with an exponent."""
    apart = ticks[1] - ticks[0] if len(ticks) > 1 else 1.0
    decimals = max(0, -math.floor(math.log10(apart) + 1e-9))
    plain = decimals <= 4 and max(map(abs, ticks)) < 1e6
    shown = (f"{tick:,.{decimals}f}" if plain else f"{tick:.3g}" for tick in ticks)
    return [text.replace("-", "−") for text in shown]


def describe(lines: Lines) -> str:
    """The chart in words: "loss: 7.610 at step 9 to 2.100 at step 299; image cosine: ..."."""

    def ends(runs: list[list[Point]]) -> str:
        points = [point for run in runs for point in run]
        shown = points if len(points) == 1 else [points[0], points[-1]]
        return " to ".join(f"{value:.3f} at step {step:,.0f}" for step, value in shown)

    return "; ".join(f"{SERIES[series]}: {ends(runs)}" for series, runs in lines.items()).replace("-", "−")


def draw_chart(stage: str, lines: Lines) -> str:
    """The SVG element. Lines differ in colour and in dashes; a value between two gaps is a dot.

    `lines` is what `read_lines` gives and not empty.
    """
    points = [point for runs in lines.values() for run in runs for point in run]
    steps = [point.step for point in points]
    low_step, high_step = min(steps), max(steps)
    if low_step == high_step:
        low_step, high_step = low_step - 1, high_step + 1
    rows = round_ticks(min(point.value for point in points), max(point.value for point in points))
    columns = [tick for tick in round_ticks(low_step, high_step, 1) if low_step <= tick <= high_step]
    top = 50 if len(lines) > 1 else 30
    bottom = top + PLOT_HEIGHT

    def x(step: float) -> float:
        return LEFT + (RIGHT - LEFT) * (step - low_step) / (high_step - low_step)

    def y(value: float) -> float:
        return bottom - PLOT_HEIGHT * (value - rows[0]) / (rows[-1] - rows[0])

    def parts() -> Iterator[str]:
        name = html.escape(f"{stage}: {describe(lines)}")
        yield f'<svg class="chart" viewBox="0 0 {WIDTH} {bottom + BELOW}" role="img" aria-label="{name}">'
        yield _text(0, 12, _unit(lines), "start")
        if len(lines) > 1:
            yield from _legend(lines)
        for tick, text in zip(rows, format_ticks(rows), strict=True):
            yield f'<path class="grid" d="M{LEFT} {y(tick):.1f}H{RIGHT}"/>' + _text(
                LEFT - 7, y(tick) + 4, text, "end"
            )
        for tick, text in zip(columns, format_ticks(columns), strict=True):
            yield f'<path class="tick" d="M{x(tick):.1f} {bottom}v4"/>' + _text(x(tick), bottom + 18, text)
        yield _text((LEFT + RIGHT) / 2, bottom + 37, "step")
        for series, runs in lines.items():
            for run in runs:
                at = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in run)
                if len(run) > 1:
                    yield f'<polyline class="line {series}" points="{at}"/>'
                else:
                    left, above = at.split(",")
                    yield f'<circle class="dot {series}" cx="{left}" cy="{above}" r="2.5"/>'
        yield "</svg>"

    return "\n".join(parts())


def _unit(lines: Lines) -> str:
    # Where there are cosines, the loss is made of them; otherwise it is a cross-entropy.
    if "loss" not in lines:
        return "cosine"
    return "loss and cosine" if len(lines) > 1 else "loss in nats a token"


def _legend(lines: Lines) -> Iterator[str]:
    left = LEFT
    for series in lines:
        name = SERIES[series]
        yield f'<path class="line {series}" d="M{left} 29h24"/>' + _text(left + STROKE, 33, name, "start")
        left += STROKE + LETTER * len(name) + GAP


def _text(x: float, y: float, text: str, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>'
