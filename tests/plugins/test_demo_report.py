"""hovle-demo's report: one file that needs nothing else, shows what was measured and runs nothing it was given."""

import base64
import io
import math
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from hovle_demo.chart import describe, draw_chart, format_ticks, read_lines, round_ticks
from hovle_demo.report import COLUMNS, Example, Row, results_table, write_report

VOID = {"meta", "img", "br", "link", "input", "hr"}
EVIL = "<script>alert(1)</script>\"' onload=x &amp; https://example.org [red]"
ROWS = (
    Row("easy-VQA", "open questions", 0.9116, "accuracy", "blind 0.233", 2000),
    Row("easy-VQA", "yes/no", None, "accuracy", "chance 0.50", 0),
    Row("Language", "held-out prose", 1234.56, "perplexity", "", 231),
    Row("Language", "difference", -0.125, "nats a token", "", 26),
)


class Page(HTMLParser):
    """Elements with their attributes and the text inside; every tag must be closed by its own end tag."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[tuple[str, str]] = []  # (innermost tag, text)
        self.open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"{tag} has an attribute twice"
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self.open[-1], data))

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def text(self, tag: str) -> list[str]:
        return [text for name, text in self.texts if name == tag]


def picture(size: tuple[int, int] = (8, 6), kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, "red").save(out, kind)
    return out.getvalue()


def records(*losses: float | None) -> list[dict[str, Any]]:
    return [{"step": 10 * number, "loss": loss, "lr": 1e-3} for number, loss in enumerate(losses, start=1)]


def report(folder: Path, **given: Any) -> Page:
    """A report with `given` and nothing else in it."""
    content: dict[str, Any] = {
        "title": "A report", "rows": (), "curves": {}, "examples": (), "facts": {}, "notes": (),
    }  # fmt: skip
    path = folder / "runs" / "demo" / "report.html"
    write_report(path, **(content | given))
    return Page(path)


def full(folder: Path, text: str = "plain") -> Page:
    """A report with all there can be, `text` in every place that takes one."""
    return report(
        folder,
        title=text,
        rows=[*ROWS, Row(text, text, 0.5, text, text, 3)],
        curves={text: [{"step": 1, "loss": 2.0, "image_cosine": 0.5}, {"step": 2, "loss": 1.0}]},
        examples=[
            Example(picture(), text, text, text),
            Example(picture((300, 20), "JPEG"), text, "no", "yes", text),
        ],
        facts={text: text},
        notes=[text],
    )


def test_every_text_is_escaped(tmp_path: Path) -> None:
    page = full(tmp_path, EVIL)
    assert page.all("script") == []
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    for tag in ("title", "h1", "td", "th", "b", "dt", "dd", "li"):
        assert EVIL in page.text(tag), tag
    assert f"{EVIL}: 0 of 1 correct" in page.text("h3")
    assert page.all("svg")[0]["aria-label"].startswith(EVIL)


def test_needs_no_other_file(tmp_path: Path) -> None:
    page = full(tmp_path)
    content = (tmp_path / "runs/demo/report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:|//|@import|url\(", re.sub(r"base64,[\w+/=]+", "", content))
    assert {tag for tag, _ in page.elements}.isdisjoint({"script", "link", "iframe", "object", "embed"})
    assert all(image["src"].startswith("data:image/") for image in page.all("img"))
    policy = next(meta["content"] for meta in page.all("meta") if "http-equiv" in meta)
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_table_shows_values_with_headers(tmp_path: Path) -> None:
    page = report(tmp_path, rows=ROWS)
    assert page.text("td") == [
        *("0.912", "accuracy", "blind 0.233", "2,000"),
        *("not measured", "accuracy", "chance 0.50", "0"),
        *("1,234.6", "perplexity", "231"),
        *("−0.125", "nats a token", "26"),
    ]
    scopes = [header["scope"] for header in page.all("th")]
    assert scopes == ["col"] * len(COLUMNS) + ["rowgroup", "row", "row"] * 2
    assert len(page.text("caption")) == 1


def test_terminal_shows_the_same_table() -> None:
    console = Console(width=120, file=io.StringIO(), record=True)
    console.print(results_table([*ROWS, Row("[bold]", "[red]name", 0.5, "u", "b", 1)]))
    shown = console.export_text()
    for row in ROWS:
        assert all(cell in shown for cell in row.cells())
    assert shown.count("easy-VQA") == 1
    assert "[bold]" in shown
    assert "[red]name" in shown


def test_examples(tmp_path: Path) -> None:
    png, jpeg = picture(), picture((300, 20), "JPEG")
    assert Example(png, "?", " Red\n", "red").correct
    assert not Example(png, "?", "red shape", "red").correct
    page = report(tmp_path, examples=[Example(png, "which?", "Red", "red"), Example(jpeg, "what?", "1", "2")])
    first, second = page.all("img")
    assert first["src"] == "data:image/png;base64," + base64.b64encode(png).decode()
    assert second["src"].startswith("data:image/jpeg;")
    assert (first["alt"], second["alt"]) == (
        "test picture 1, 8 by 6 pixels, of which is asked: which?",
        "test picture 2, 300 by 20 pixels, of which is asked: what?",
    )
    assert (first.get("class"), second.get("class")) == ("tiny", None)
    assert page.text("dd") == ["which?", "Red", "red", "what?", "1", "2"]
    assert page.text("span") == ["✓", "✗"]
    assert [text.strip() for text in page.text("p")][1:] == ["correct", "wrong"]
    assert page.text("h3") == ["test pictures: 1 of 2 correct"]


def test_examples_are_counted_by_group(tmp_path: Path) -> None:
    examples = [
        Example(picture(), "?", answer, "1", group)
        for group, answer in (("a", "1"), ("a", "2"), ("<b>", "2"))
    ]
    page = report(tmp_path, examples=examples)
    assert page.text("h3") == ["a: 1 of 2 correct", "<b>: 0 of 1 correct"]


@pytest.mark.parametrize("image", [b"", b"no picture", picture(kind="BMP")])
def test_picture_no_browser_shows(tmp_path: Path, image: bytes) -> None:
    with pytest.raises(ValueError, match=r"examples\[0\].image \('what\?'\) is none of PNG, JPEG"):
        report(tmp_path, examples=[Example(image, "what?", "", "")])


def test_curves(tmp_path: Path) -> None:
    distillation = [
        {"step": step, "loss": -step / 10, "image_cosine": step / 20, "text_cosine": step / 20}
        for step in range(1, 8)
    ]
    page = report(tmp_path, curves={"alignment": records(3.0, 2.0, 1.0), "distillation": distillation})
    lines = page.all("polyline")
    assert [line["class"] for line in lines] == [
        "line loss",
        "line loss",
        "line image_cosine",
        "line text_cosine",
    ]
    assert [len(line["points"].split()) for line in lines] == [3, 7, 7, 7]
    labels = page.text("text")
    assert "loss in nats a token" in labels
    assert labels.count("step") == 2
    # The legend is in the chart with several lines alone.
    assert [labels.count(name) for name in ("loss", "image cosine", "text cosine")] == [1, 1, 1]
    assert "loss: 3.000 at step 10 to 1.000 at step 30" in page.text("figcaption")
    assert page.all("svg")[0]["role"] == "img"


def test_points_lie_where_the_ticks_say() -> None:
    svg = draw_chart("s", read_lines("s", records(3.0, 2.0, 1.0)))
    points = [tuple(map(float, at.split(","))) for at in re.findall(r'points="([^"]*)"', svg)[0].split()]
    rows = {text: float(at) - 4 for at, text in re.findall(r'y="([\d.]+)" text-anchor="end">([\d.]+)<', svg)}
    assert points[0][1] == pytest.approx(rows["3.0"])
    assert points[1][1] == pytest.approx(rows["2.0"])
    assert points[2][1] == pytest.approx(rows["1.0"])
    assert points[1][0] - points[0][0] == pytest.approx(points[2][0] - points[1][0], abs=0.2)


@pytest.mark.parametrize("missing", [None, math.nan, math.inf, -math.inf])
def test_missing_values_are_gaps(missing: float | None) -> None:
    lines = read_lines("s", records(missing, 5.0, 4.0, missing, 3.0, missing, 2.0, 1.0))
    assert [[point.value for point in run] for run in lines["loss"]] == [[5, 4], [3], [2, 1]]
    svg = draw_chart("s", lines)
    assert [len(at.split()) for at in re.findall(r'points="([^"]*)"', svg)] == [2, 2]
    assert svg.count("<circle") == 1
    assert not re.search(r"nan|inf", svg)
    assert describe(lines) == "loss: 5.000 at step 20 to 1.000 at step 80"


@pytest.mark.parametrize("given", [[], [{"step": 3}], records(None), [{"step": 1, "lr": 0.1}]])
def test_stage_without_values_has_no_chart(tmp_path: Path, given: list[dict[str, Any]]) -> None:
    page = report(tmp_path, curves={"alignment": given})
    assert page.all("svg") == []
    assert page.text("b") == ["alignment"]
    assert page.text("figcaption") == ["no metrics were logged"]


@pytest.mark.parametrize("loss", [0.0, 2.5, -1.5, 1e-9, 1e12])
def test_single_record_is_a_dot(loss: float) -> None:
    svg = draw_chart("s", read_lines("s", records(loss)))
    assert svg.count("<circle") == 1
    assert "<polyline" not in svg


def test_record_without_step() -> None:
    with pytest.raises(ValueError, match=r"curves\['alignment'\]\[1\] has no 'step'"):
        read_lines("alignment", [{"step": 1, "loss": 1.0}, {"loss": 1.0}])


@pytest.mark.parametrize(
    "low, high, labels",
    [
        (0.0, 1.0, ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        (2.04, 7.6, ["2", "3", "4", "5", "6", "7", "8"]),
        (-1.83, 0.98, ["−2.0", "−1.5", "−1.0", "−0.5", "0.0", "0.5", "1.0"]),
        (0, 3000, ["0", "500", "1,000", "1,500", "2,000", "2,500", "3,000"]),
        (1e6, 4e6, ["1e+06", "1.5e+06", "2e+06", "2.5e+06", "3e+06", "3.5e+06", "4e+06"]),
    ],
)
def test_ticks_are_round(low: float, high: float, labels: list[str]) -> None:
    assert format_ticks(round_ticks(low, high)) == labels


@pytest.mark.parametrize("low", [-3.7, 0.0, 0.013, 41.0, 9e5])
@pytest.mark.parametrize("room", [0.0, 1e-3, 0.3, 1.0, 7.7, 123.0, 1e5])
def test_ticks_are_few_and_enclose(low: float, room: float) -> None:
    ticks = round_ticks(low, low + room)
    assert 3 <= len(ticks) <= 9
    assert ticks[0] <= low + 1e-6
    assert ticks[-1] >= low + room - 1e-6
    assert len(set(format_ticks(ticks))) == len(ticks)


def test_steps_have_no_fractions() -> None:
    assert format_ticks(round_ticks(1, 3, 1)) == ["1", "2", "3"]


def test_empty_report(tmp_path: Path) -> None:
    page = report(tmp_path)
    assert page.text("h2") == ["Results"]
    assert page.text("p") == ["Nothing was measured."]


def test_headings_name_their_sections(tmp_path: Path) -> None:
    page = full(tmp_path)
    assert page.text("h2") == ["Results", "Notes", "Training", "Examples", "How it was made"]
    assert [part["aria-labelledby"] for part in page.all("section")] == [
        part["id"] for part in page.all("h2")
    ]
    assert page.all("html") == [{"lang": "en"}]
    assert all(image["alt"] for image in page.all("img"))


def test_odd_characters_are_written(tmp_path: Path) -> None:
    assert report(tmp_path, notes=["é 🇫🇷 \ud800 x"]).text("li") == ["é 🇫🇷 ? x"]


def test_failure_keeps_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report(tmp_path, notes=["old"])
    with pytest.raises(ValueError):
        report(tmp_path, notes=["new"], examples=[Example(b"", "", "", "")])

    def fail(source: Path, target: Path) -> None:
        assert "new" in Path(source).read_text(encoding="utf-8")
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        report(tmp_path, notes=["new"])
    folder = tmp_path / "runs" / "demo"
    assert Page(folder / "report.html").text("li") == ["old"]
    assert [path.name for path in folder.iterdir()] == ["report.html"]
