"""Every planted fault is found, at its place, and only those; and the sheet shows what is there and fetches nothing."""

import json
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from hovle_core.cli import main
from hovle_data import inspect, sheet
from hovle_data.checks import encode, problems
from hovle_data.schema import Sample
from hovle_data.shards import ShardSource, write_shards
from hovle_data.sources.chats import AnnotationSource, InternVLSource
from hovle_data.validate import validate

TALK = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "That."}]
Q, A = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}


@pytest.fixture
def planted(tmp_path, png, encode_image_file):
    """A JSONL, and line -> categories of its faults."""
    for name, content in {
        "a.png": png(1), "empty.png": b"", "page.png": b"<html>", "cut.png": png(1, (64, 64))[:-60],
        "cut.jpg": encode_image_file(Image.effect_noise((64, 64), 90).convert("RGB"), "JPEG")[:-900],
    }.items():  # fmt: skip
        (tmp_path / name).write_bytes(content)
    human, gpt = TALK
    rows = [
        ({"id": 1, "image": "a.png", "conversations": TALK}, []),
        ({"id": 2, "image": "gone.png", "conversations": TALK}, ["missing image"]),
        ({"id": 3, "image": ["a.png"] * 2, "conversations": TALK}, ["image tags and images differ"]),
        ({"id": 4, "image": "a.png", "conversations": [human, {**gpt, "value": "\n"}]}, ["empty answer"]),
        ({"id": 5, "image": "a.png", "conversations": [{**human, "from": "bot"}, gpt]}, ["unknown role"]),
        ({"id": 6, "image": "a.png", "conversations": [human, human]}, None),
        (b'{"id": 7, "conversations": [{"from": "human", "value": "\xc3("}]}', ["not UTF-8"]),
        ({"id": 8, "image": "cut.jpg", "conversations": TALK}, ["image does not decode"]),
        ({"id": 1, "image": "a.png", "conversations": TALK}, ["duplicate id"]),
        ({"id": 10, "image": "empty.png", "conversations": TALK}, ["empty image file"]),
        ({"id": 11, "image": "page.png", "conversations": TALK}, ["not a known image format"]),
        ({"id": 12, "image": "cut.png", "conversations": TALK}, ["image does not decode"]),
        ({"id": 13, "conversations": [{**human, "value": "hi"}]}, ["no answer"]),
        ({"id": 14, "conversations": [gpt, {**human, "value": "hi"}]}, ["answer before any question"]),
        (b"{", ["bad json"]),
        ({"id": 16, "image": "gone.png", "conversations": [human, {**gpt, "value": ""}]},
         ["missing image", "empty answer"]),
        ({"id": 17, "conversations": [{**human, "value": "last"}, gpt]}, []),
    ]  # fmt: skip
    rows[5] = (rows[5][0], ["image tags and images differ", "no answer", "two turns of one role"])
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row, _ in rows]
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(lines))
    return tmp_path / "rows.jsonl", {n: faults for n, (_, faults) in enumerate(rows, 1) if faults}


@pytest.mark.parametrize("workers", ["1", "2"])
def test_every_fault_is_found_by_line(planted, capsys, workers, monkeypatch):
    from hovle_data import validate

    monkeypatch.setattr(validate, "CHUNK", 5)
    path, faults = planted
    assert main(["data", "validate", str(path), "--json", "--workers", workers]) == 1
    report = json.loads(capsys.readouterr().out)
    found: dict[int, list[str]] = {}
    for problem in report["problems"]:
        place, _, line = problem["source"].rpartition(":")
        assert place == str(path)
        found.setdefault(int(line), []).append(problem["reason"].partition(":")[0])
    assert found == faults
    assert (report["samples"], report["bad_samples"]) == (17, len(faults))
    assert report["reasons"]["missing image"] == 2
    assert "first in" in next(p["reason"] for p in report["problems"] if p["source"].endswith(":9"))


def test_text_output_and_a_sound_file(planted, tmp_path, capsys):
    path, _ = planted
    assert main(["data", "validate", str(path), "--workers", "1"]) == 1
    out = capsys.readouterr().out
    assert f"{path}:2: rows-00000001: missing image: gone.png" in out
    assert "17 samples, 15 with problems" in out
    assert "  2 missing image" in out
    good = tmp_path / "good.jsonl"
    good.write_bytes(path.read_bytes().split(b"\n")[0])
    assert main(["data", "validate", str(good), "--workers", "1"]) == 0
    assert "1 samples, 0 with problems" in capsys.readouterr().out
    assert main(["data", "validate", str(path), "--no-images", "--workers", "1"]) == 1
    assert "does not decode" not in capsys.readouterr().out


def test_repetitions_are_no_duplicates(tmp_path, png):
    (tmp_path / "a.png").write_bytes(png(1))
    (tmp_path / "a.jsonl").write_text(json.dumps({"id": 1, "image": "a.png", "conversations": TALK}))
    (tmp_path / "meta.json").write_text(json.dumps({"s": {"annotation": "a.jsonl", "repeat_time": 4}}))
    assert main(["data", "validate", str(tmp_path / "meta.json"), "--workers", "1"]) == 0


def test_ids_of_different_sets_and_built_repetitions_are_no_duplicates(tmp_path, capsys):
    row = {"id": 1, "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row))
    sets = {n: {"annotation": f"{n}.jsonl", "repeat_time": 2} for n in ("a", "b")}
    (tmp_path / "meta.json").write_text(json.dumps(sets))
    assert main(["data", "validate", str(tmp_path / "meta.json"), "--workers", "1"]) == 0
    assert main(["data", "build", str(tmp_path / "meta.json"), str(tmp_path / "out"), "--workers", "1"]) == 0
    assert main(["data", "validate", str(tmp_path / "out"), "--workers", "1"]) == 0
    assert sorted(s.meta["set"] for s in ShardSource(tmp_path / "out")) == ["a", "a", "b", "b"]
    (tmp_path / "a.jsonl").write_text(f"{json.dumps(row)}\n{json.dumps(row)}")
    capsys.readouterr()
    assert main(["data", "validate", str(tmp_path / "meta.json"), "--workers", "1"]) == 1
    assert "a.jsonl:2: a-00000001: duplicate id: a/1, first in" in capsys.readouterr().out


def test_shards_with_damage_and_a_key_given_twice(tmp_path, pairs, capsys):
    for name in ("a", "b"):
        write_shards(pairs(4), tmp_path / name, name=name)
        (tmp_path / name / f"{name}-000000.tar").rename(tmp_path / f"{name}.tar")
    with (tmp_path / "b.tar").open("r+b") as file:
        file.truncate(4900)
    assert main(["data", "validate", str(tmp_path), "--json", "--workers", "1"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert {p["reason"].partition(":")[0] for p in report["problems"]} == {
        "damaged shard", "truncated shard", "duplicate id",
    }  # fmt: skip
    duplicates = {p["key"] for p in report["problems"] if p["reason"].startswith("duplicate")}
    assert duplicates == {"s0000", "s0001"}  # the third is cut behind its picture: it is no sample


def test_a_processor_finds_what_is_too_long(tmp_path, capsys):
    from hovle_core.testing import tiny_processor

    tiny_processor().save_pretrained(tmp_path / "processor")
    (tmp_path / "t.txt").write_text("short\n\n" + "long " * 50)
    command = ["data", "validate", str(tmp_path / "t.txt"), "--workers", "1"]
    assert main([*command, "--processor", str(tmp_path / "processor"), "--max-tokens", "40"]) == 1
    assert "t.txt:3: 00000001: too long: " in capsys.readouterr().out
    assert main([*command, "--max-tokens", "40"]) == 2


@pytest.mark.parametrize(
    ("messages", "reasons"),
    [
        ((Q, A), []),
        (({"role": "system", "content": "S"}, Q, A, Q, A), []),
        ((Q,), ["no answer"]),
        ((A, Q), ["answer before any question"]),
        ((Q, Q, A), ["two turns of one role"]),
        ((Q, A, {"role": "system", "content": "S"}, Q, A), ["system turn inside the conversation"]),
        ((Q, {**A, "content": []}), ["empty answer"]),
        (({**Q, "content": [{"type": "text", "text": " "}]}, A), ["empty turn"]),
    ],
)
def test_turns(messages, reasons):
    assert [r.partition(":")[0] for r in problems(Sample("k", messages=messages))] == reasons


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags, self.links, self.text, self.open = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [
            value for name, value in attrs if name in ("src", "href", "srcset", "style", "onerror")
        ]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_contact_sheet(tmp_path, encode_image_file, capsys):
    evil = '<script>alert(1)</script> & "quotes" <img src=http://example.org/x.png onerror=alert(2)>'
    picture = encode_image_file(Image.effect_noise((900, 448), 60).convert("RGB"))
    samples = [
        Sample("pair", (picture,), evil),
        Sample("talk", (picture,), messages=(
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": evil}]}, A)),
        Sample("prose", text="plain " * 600),
        Sample("broken", (picture[:200],), "cut"),
    ]  # fmt: skip
    write_shards(samples, tmp_path / "<b>shards")
    html = tmp_path / "sheet.html"
    assert main(["data", "inspect", str(tmp_path / "<b>shards"), "--html", str(html)]) == 0
    assert "sheet.html" in capsys.readouterr().out
    content = html.read_text(encoding="utf-8")
    page = Page()
    page.feed(content)
    assert page.open == []
    assert "script" not in page.tags
    assert page.tags.count("img") == 2 * 2  # the picture and its tiles, of the two that decode
    assert all(link.startswith("data:image/jpeg;base64,") for link in page.links)
    assert page.tags.count("svg") == 3
    text = "".join(page.text)
    assert text.count(evil) == 2
    assert text.count("900x448 in 3 tiles") == 2
    assert "image does not decode" in text
    assert not re.search(
        r"(https?:)?//", re.sub(r"base64,[^\"]*", "", content.replace("http://example.org/x.png", ""))
    )
    assert "default-src 'none'" in content


def test_contact_sheet_with_a_processor(tmp_path, png):
    from hovle_core.testing import tiny_processor

    processor = tiny_processor()
    processor.save_pretrained(tmp_path / "processor")
    write_shards([Sample("a", (png(1),), "a red square"), Sample("b", text="blue")], tmp_path / "out")
    source = ShardSource(tmp_path / "out")
    page = sheet.contact_sheet(source, inspect.look(source), str(tmp_path / "processor"), 5)
    text, picture = (len(encode(processor, source[i]).input_ids) for i in (1, 0))
    assert f"{text} tokens" in page
    assert f"tokens a sample (of those below): mean {(text + picture) / 2:.1f}, median" in page
    # The index of a build with a processor has the tokens of all samples: no processor is needed then.
    command = ["data", "build", str(tmp_path / "out"), str(tmp_path / "built"), "--workers", "1"]
    assert main([*command, "--processor", str(tmp_path / "processor")]) == 0
    built = ShardSource(tmp_path / "built")
    page = sheet.contact_sheet(built, inspect.look(built), None, 1)
    assert f"tokens a sample: mean {(text + picture) / 2:.1f}, median" in page
    assert f"{picture} tokens" in page


def test_histogram_counts_everything():
    bars = re.findall(r"<title>(\d+)</title>", sheet.histogram("lengths", [*range(100), 10_000]))
    assert sum(map(int, bars)) == 101
    assert "and more" in sheet.histogram("lengths", [*range(100), 10_000])
    assert re.findall(r"<title>(\d+)</title>", sheet.histogram("same", [4, 4, 4])) == ["3", "0"]


def test_a_row_without_its_pictures_is_told_all_that_is_wrong_with_it(tmp_path):
    rows = [
        {
            "image": ["gone.png", "lost.png"],
            "conversations": [{"from": "human", "value": "<image> What?"}, {"from": "gpt", "value": ""}],
        }
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = InternVLSource(tmp_path / "rows.jsonl")
    found = validate([source]).problems
    assert {problem.source for problem in found} == {f"{tmp_path}/rows.jsonl:1"}
    assert {problem.key for problem in found} == {"rows-00000000"}  # as the good rows' keys
    assert [problem.reason for problem in found] == [
        f"missing image: gone.png is not in {tmp_path}",
        f"missing image: lost.png is not in {tmp_path}",
        "image tags and images differ: 1 tags, 2 images",
        "empty answer: number 1",
    ]


def test_rows_that_share_a_line_are_told_apart(tmp_path):
    rows = [{"text": ""}, {"text": "fine"}, {"text": ""}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    places = [problem.source for problem in validate([AnnotationSource(tmp_path / "rows.json")]).problems]
    assert places == [f"{tmp_path}/rows.json:1 row 0", f"{tmp_path}/rows.json:1 row 2"]
    (tmp_path / "rows.json").write_text(json.dumps(rows, indent=1))
    places = [problem.source for problem in validate([AnnotationSource(tmp_path / "rows.json")]).problems]
    assert places == [f"{tmp_path}/rows.json:{line}" for line in (2, 8)]
