"""Learning curves of runs: one picture, and one HTML page that holds it and needs nothing else."""

import base64
import io
import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hovle_train.run_table import SHOWN, RunInfo

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Rows of panels: what is drawn in one, and the name of its axis.
PANELS = ((SHOWN, "loss, cosine"), (("lr",), "learning rate"), (("tokens_per_s",), "tokens / s"))


def write_curves(
    out: Path, title: str, runs: Mapping[str, RunInfo], facts: Mapping[str, Mapping[str, str]]
) -> list[Path]:
    """Write `curves.png` and `curves.html` into `out` and return their paths.

    Args:
        runs: label -> a run that has logged metrics; a column of panels each.
        facts: label -> name -> what to say of that run on the page.

    Raises ValueError where matplotlib is not installed.
    """
    figure = _draw(runs)
    png, svg = io.BytesIO(), io.BytesIO()
    figure.savefig(png, format="png", dpi=150)
    figure.savefig(svg, format="svg", metadata={"Date": None})
    out.mkdir(parents=True, exist_ok=True)
    written = {"curves.png": png.getvalue(), "curves.html": _page(title, svg.getvalue(), facts).encode()}
    for name, content in written.items():
        temporary = out / f".{name}-{os.getpid()}"
        temporary.write_bytes(content)
        os.replace(temporary, out / name)
    return [out / name for name in written]


def _draw(runs: Mapping[str, RunInfo]) -> "Figure":
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("drawing curves needs matplotlib: pip install 'hovle-train[plot]'") from None
    figure = Figure(figsize=(4.2 * len(runs), 2.4 * len(PANELS)), layout="constrained")
    axes = figure.subplots(len(PANELS), len(runs), squeeze=False, sharex="col")
    for column, (label, run) in enumerate(runs.items()):
        for row, (names, axis) in enumerate(PANELS):
            panel = axes[row][column]
            for name in names:
                steps, values = _points(run.metrics, name)
                if steps:
                    panel.plot(
                        steps, values, label=name, linewidth=1.2, marker="." if len(steps) == 1 else None
                    )
            if len(panel.lines) > 1:
                panel.legend(fontsize=8)
            panel.grid(alpha=0.3)
            panel.tick_params(labelsize=8)
            panel.set_ylabel(axis if column == 0 else "", fontsize=9)
        axes[0][column].set_title(label, fontsize=10, parse_math=False)
        axes[-1][column].set_xlabel("step", fontsize=9)
    return figure


def _points(records: Sequence[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    found = [(record["step"], record[name]) for record in records if name in record]
    # A value that was not finite is logged as null: a gap in the line.
    return [step for step, _ in found], [float("nan") if value is None else value for _, value in found]


def _page(title: str, svg: bytes, facts: Mapping[str, Mapping[str, str]]) -> str:
    def rows(of: Mapping[str, str]) -> str:
        return "".join(
            f"<tr><th>{escape(name)}</th><td>{escape(text)}</td></tr>" for name, text in of.items()
        )

    tables = "\n".join(f"<h2>{escape(label)}</h2><table>{rows(of)}</table>" for label, of in facts.items())
    picture = base64.b64encode(svg).decode()
    # The policy: nothing is loaded and nothing runs, also not from a name or path that holds markup.
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 80rem; padding: 0 1rem; color: #1b1f24; }}
img {{ max-width: 100%; }} table {{ border-collapse: collapse; }}
th {{ text-align: left; font-weight: normal; color: #57606a; white-space: nowrap; padding-right: 1rem; }}
th, td {{ vertical-align: top; padding-top: .2rem; overflow-wrap: anywhere; }}
</style>
</head>
<body>
<h1>{escape(title)}</h1>
<img alt="loss, learning rate and tokens per second over steps" src="data:image/svg+xml;base64,{picture}">
{tables}
</body>
</html>
"""
