"""The demo's results as a table for the terminal and as one HTML file that needs nothing else."""

import base64
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from hovle_demo.chart import describe, draw_chart, read_lines

COLUMNS = ("Measured", "Result", "Unit", "To compare", "Items")
BROWSER_FORMATS = ("PNG", "JPEG", "GIF", "WEBP")
TINY = 160  # pixels: smaller pictures are enlarged as squares, not blurred


@dataclass(frozen=True)
class Row:
    """One result. `value` is None where nothing was measured, `baseline` says what to compare with ("chance 0.10")."""

    group: str
    name: str
    value: float | None
    unit: str
    baseline: str
    count: int

    def cells(self) -> tuple[str, ...]:
        """The texts of COLUMNS."""
        if self.value is None:
            shown = "not measured"
        else:
            shown = f"{self.value:.3f}" if abs(self.value) < 10 else f"{self.value:,.1f}"
        return (self.name, shown.replace("-", "−"), self.unit, self.baseline, f"{self.count:,}")


@dataclass(frozen=True)
class Example:
    """One test picture as in the data set (PNG, JPEG, GIF or WebP bytes), and what the model said about it."""

    image: bytes
    question: str
    answer: str
    truth: str
    group: str = "test pictures"  # neighbours of one group stand under its name, with their own count

    @property
    def correct(self) -> bool:
        """Letter case and white space around the answer do not count."""
        return self.answer.strip().casefold() == self.truth.strip().casefold()


def results_table(rows: Sequence[Row]) -> Table:
    """The report's table for the terminal: neighbouring rows of one group stand under its name."""
    table = Table(title="Results", title_justify="left")
    for column in COLUMNS:
        table.add_column(column, justify="right" if column in ("Result", "Items") else "left")
    for group, members in groupby(rows, lambda row: row.group):
        table.add_section()
        table.add_row(Text(group, style="bold"))
        for row in members:
            # Text, so that a "[...]" in a name is shown and not taken for markup.
            name, *others = row.cells()
            table.add_row(Padding(Text(name), (0, 0, 0, 2)), *map(Text, others))
    return table


def write_report(
    path: Path,
    title: str,
    rows: Sequence[Row],
    curves: Mapping[str, Sequence[Mapping[str, Any]]],
    examples: Sequence[Example],
    facts: Mapping[str, str],
    notes: Sequence[str],
) -> None:
    """Replaces `path` by the report, or raises and leaves what was there.

    Args:
        curves: stage -> its metrics records, each with `step` and any of loss, image_cosine and text_cosine.
        facts: how it was made: machine, commit, wall time, ...
        notes: what a reader should keep in mind, one remark each.

    Raises ValueError naming the example if its picture is none that browsers show, the stage if a record has no step.
    """
    page = _page(title, rows, curves, examples, facts, notes)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        partial.write_text(page, encoding="utf-8", errors="replace")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _page(
    title: str,
    rows: Sequence[Row],
    curves: Mapping[str, Sequence[Mapping[str, Any]]],
    examples: Sequence[Example],
    facts: Mapping[str, str],
    notes: Sequence[str],
) -> str:
    sections = (
        ("Results", _results(rows) if rows else "<p>Nothing was measured.</p>"),
        ("Notes", f"<ul>{_each('li', notes)}</ul>" if notes else ""),
        (
            "Training",
            f'<div class="charts">{"".join(_curve(*item) for item in curves.items())}</div>'
            if curves
            else "",
        ),
        ("Examples", _examples(examples)),
        ("How it was made", f"<dl>{_definitions(facts.items())}</dl>" if facts else ""),
    )
    body = "\n".join(
        f'<section aria-labelledby="section-{number}"><h2 id="section-{number}">{name}</h2>\n{content}\n</section>'
        for number, (name, content) in enumerate(sections, start=1)
        if content
    )
    # The policy is a second lock: should a text ever come through unescaped, nothing in it may run or load.
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<header><h1>{escape(title)}</h1></header>
<main>
{body}
</main>
</body>
</html>
"""


def _results(rows: Sequence[Row]) -> str:
    head = "".join(f'<th scope="col">{column}</th>' for column in COLUMNS)
    groups = []
    for group, members in groupby(rows, lambda row: row.group):
        lines = [f'<tr><th scope="rowgroup" colspan="{len(COLUMNS)}">{escape(group)}</th></tr>']
        for row in members:
            name, *others = row.cells()
            lines.append(f'<tr><th scope="row">{escape(name)}</th>{_each("td", others)}</tr>')
        groups.append("<tbody>" + "\n".join(lines) + "</tbody>")
    caption = "<caption>Every result with its unit, what to compare it with and how many items were measured.</caption>"
    table = f"<table>{caption}<thead><tr>{head}</tr></thead>\n" + "\n".join(groups) + "</table>"
    # On a very narrow screen the table scrolls, not the page; the tab index lets a keyboard scroll it.
    return f'<div class="scroll" role="region" aria-label="Table of results" tabindex="0">{table}</div>'


def _curve(stage: str, records: Sequence[Mapping[str, Any]]) -> str:
    lines = read_lines(stage, records)
    chart, said = (draw_chart(stage, lines), describe(lines)) if lines else ("", "no metrics were logged")
    return f"<figure>{chart}<figcaption><b>{escape(stage)}</b><br>{escape(said)}</figcaption></figure>\n"


def _examples(examples: Sequence[Example]) -> str:
    groups = []
    for name, members in groupby(enumerate(examples, start=1), lambda item: item[1].group):
        shown = list(members)
        right = sum(example.correct for _, example in shown)
        pictures = "\n".join(_example(*item) for item in shown)
        groups.append(
            f'<h3>{escape(name)}: {right} of {len(shown)} correct</h3><div class="examples">{pictures}</div>'
        )
    return "\n".join(groups)


def _example(number: int, example: Example) -> str:
    try:
        with Image.open(io.BytesIO(example.image), formats=BROWSER_FORMATS) as image:
            media, (width, height) = Image.MIME[str(image.format)], image.size
    except UnidentifiedImageError:
        raise ValueError(
            f"examples[{number - 1}].image ({example.question!r}) is none of {', '.join(BROWSER_FORMATS)}; "
            "give the bytes of such a file"
        ) from None
    tiny = ' class="tiny"' if max(width, height) <= TINY else ""
    source = f"data:{media};base64,{base64.b64encode(example.image).decode()}"
    said = {"Question": example.question, "Answer": example.answer, "Truth": example.truth}
    name, mark = ("correct", "✓") if example.correct else ("wrong", "✗")
    return (
        f'<figure class="{name}"><img{tiny} src="{source}" width="{width}" height="{height}" '
        f'alt="test picture {number}, {width} by {height} pixels, of which is asked: {escape(example.question)}">'
        f"<figcaption><dl>{_definitions(said.items())}</dl>"
        f'<p class="verdict"><span aria-hidden="true">{mark}</span> {name}</p></figcaption></figure>'
    )


def _each(tag: str, texts: Iterable[str]) -> str:
    return "".join(f"<{tag}>{escape(text)}</{tag}>" for text in texts)


def _definitions(items: Iterable[tuple[str, str]]) -> str:
    return "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>" for name, text in items)


# Dark colours are for screens alone: paper stays white.
STYLE = """
:root { color-scheme: light; --page: #fff; --ink: #1b1f24; --soft: #57606a; --line: #d0d7de; --card: #f6f8fa;
  --good: #116329; --bad: #b3261e; --loss: #1f6fc4; --image: #b4500b; --text: #0f766e; }
@media screen and (prefers-color-scheme: dark) { :root { color-scheme: dark; --page: #14171b; --ink: #e6e9ed;
  --soft: #a3acb6; --line: #39414a; --card: #1d2127; --good: #6fd08c; --bad: #ff9d94; --loss: #74b3ff;
  --image: #f5a25d; --text: #4fd1b5; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 62rem; background: var(--page); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: .5rem 0 0; }
h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1.25rem 0 .5rem; }
figure, dl, dd { margin: 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
caption, figcaption, dt { color: var(--soft); font-size: .875rem; }
caption { text-align: left; padding-bottom: .5rem; }
th, td { padding: .3rem .6rem .3rem 0; text-align: left; vertical-align: baseline;
  border-bottom: 1px solid var(--line); }
th[scope=row] { font-weight: normal; padding-left: .8rem; }
th[scope=rowgroup] { padding-top: 1rem; }
tr > :nth-child(2), tr > :nth-child(5) { text-align: right; font-variant-numeric: tabular-nums; }
td:nth-child(2) { font-weight: 600; }
tr > :last-child { padding-right: 0; }
.charts { display: grid; gap: 1.5rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); }
.chart { display: block; width: 100%; max-width: 35rem; height: auto; }
.chart text { fill: var(--soft); font-size: 12px; }
.grid { stroke: var(--line); }
.tick { stroke: var(--soft); }
.line { fill: none; stroke-width: 1.75; stroke-linejoin: round; }
.loss { stroke: var(--loss); } .image_cosine { stroke: var(--image); stroke-dasharray: 7 3; }
.text_cosine { stroke: var(--text); stroke-dasharray: 2 3; }
.dot.loss { fill: var(--loss); } .dot.image_cosine { fill: var(--image); } .dot.text_cosine { fill: var(--text); }
.examples { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 10rem), 1fr)); }
.examples figure { display: flex; flex-direction: column; background: var(--card); border: 1px solid var(--line);
  border-radius: .5rem; overflow: hidden; }
.examples img { width: 100%; height: auto; aspect-ratio: 1; object-fit: contain; background: #fff; }
.tiny { image-rendering: pixelated; }
.examples figcaption { flex: 1; display: flex; flex-direction: column; padding: .6rem; color: var(--ink); }
.examples dl { flex: 1; } .examples dt { font-size: .75rem; } .examples dd { margin-bottom: .4rem; line-height: 1.3; }
.verdict { margin: .2rem 0 0; font-weight: 600; }
.correct .verdict { color: var(--good); } .wrong .verdict { color: var(--bad); }
section > dl > div { display: grid; grid-template-columns: 10rem 1fr; gap: 0 1rem; padding: .3rem 0;
  border-bottom: 1px solid var(--line); }
dd { min-width: 0; overflow-wrap: anywhere; }
li { margin: .3rem 0; }
@media (max-width: 34rem) {
  section > dl > div { display: block; }
  th, td { padding-right: .4rem; font-size: .8rem; line-height: 1.35; }
  tr > :first-child { width: 38%; }
  th[scope=row] { padding-left: 0; }
}
@media print { body { max-width: none; padding: 0; font-size: 10pt; } figure, tr { break-inside: avoid; }
  h2, h3 { break-after: avoid; } .examples { grid-template-columns: repeat(5, 1fr); } }
"""
