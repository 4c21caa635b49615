"""Everyone's files as samples: what each format says, and what is wrong with a row, with file and line."""

import json
import pickle
import sys
from pathlib import Path

import pytest

from hovle_core.cli import main
from hovle_core.hookspecs import hookimpl
from hovle_core.plugins import load_plugins
from hovle_data import plugin
from hovle_data.schema import BadSample, Sample
from hovle_data.sources.chats import AnnotationSource, InternVLSource
from hovle_data.sources.pictures import ImageFolderSource
from hovle_data.sources.texts import TextSource
from hovle_data.spec import guess_kind, load_spec, open_sources

TALK = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cat."}]
MESSAGES = (
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
    {"role": "assistant", "content": "A cat."},
)


@pytest.fixture
def registry():
    return load_plugins().registry


def write_jsonl(path: Path, rows) -> Path:
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def reasons(source) -> dict[str, str]:
    """The last part of each place -> why the row there is bad."""
    found = {}
    for i in range(len(source)):
        try:
            source[i].validate(source.where(i))
        except BadSample as bad:
            found[bad.source.rpartition("/")[2]] = bad.reason
    return found


@pytest.fixture
def pictures(tmp_path, png):
    folder = tmp_path / "pictures"
    (folder / "sub").mkdir(parents=True)
    for i, name in enumerate(("a.png", "b.png", "sub/c.png")):
        (folder / name).write_bytes(png(i))
    return folder


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_annotation_rows(tmp_path, pictures, png, suffix):
    rows = [
        {"id": 7, "image": "a.png", "conversations": TALK},
        {"image": ["a.png", "sub/c.png"], "conversations": [
            {"from": "system", "value": "Be brief."},
            {"from": "human", "value": "Compare <image> and\n<image>"}, {"from": "gpt", "value": "Same."}]},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]},
        {"image": "b.png", "conversations": [{"from": "human", "value": "Tag?"}, {"from": "gpt", "value": "No."}]},
        {"images": ["b.png"], "messages": [
            {"role": "user", "content": "<image>"}, {"role": "assistant", "content": "B"}]},
        {"image": "b.png", "caption": "a bee"},
    ]  # fmt: skip
    path = tmp_path / f"rows.{suffix}"
    if suffix == "json":
        path.write_text(json.dumps(rows, indent=2), encoding="utf-8-sig")
    else:
        write_jsonl(path, rows)
    source = AnnotationSource(path, root=pictures)
    samples = [source[i].validate() for i in range(len(source))]
    assert samples[0] == Sample("00000000", (png(0),), None, MESSAGES, {"id": "7"})
    assert samples[1].images == (png(0), png(2))
    assert samples[1].messages[1]["content"] == [
        {"type": "text", "text": "Compare "}, {"type": "image"}, {"type": "text", "text": " and"}, {"type": "image"},
    ]  # fmt: skip
    assert (samples[2].images, samples[2].messages[0]["content"]) == ((), "Hi")
    assert samples[3].messages[0]["content"] == [{"type": "image"}, {"type": "text", "text": "Tag?"}]
    assert samples[4].messages[0] == {"role": "user", "content": [{"type": "image"}]}
    assert (samples[5].kind, samples[5].text) == ("pair", "a bee")
    lines = [int(source.where(i).rpartition(":")[2]) for i in range(6)]
    written = path.read_text("utf-8-sig").splitlines()
    assert lines == [n for n, line in enumerate(written, 1) if line.startswith(("  {", "{"))]
    assert pickle.loads(pickle.dumps(source))[0] == samples[0]


def test_every_bad_row_is_named_by_line(tmp_path, pictures):
    talk = {"conversations": TALK}
    rows = [
        {"image": "a.png", **talk},
        {"image": "nowhere.png", **talk},
        {"image": ["a.png", "b.png"], **talk},
        b"",
        {"image": "a.png", "conversations": [{"from": "robot", "value": "Hi"}]},
        b'{"image": "a.png", "conversations": [{"from": "human", "value": "\xff"}]}',
        b'{"image": ',
        [1],
        {"image": 3, **talk},
        {"image": "http://example.org/a.png", **talk},
        {"video": "v.mp4", **talk},
        {"image": "sub", **talk},
        {"image": "a\0.png", **talk},
        {"conversations": "hi"},
        {"conversations": [{"from": "human"}]},
        {"conversations": [{"from": ["human"], "value": "Hi"}]},
        {"image": "b.png", **talk},
    ]
    found = reasons(AnnotationSource(write_jsonl(tmp_path / "r.jsonl", rows), root=pictures))
    assert {where: reason.partition(":")[0] for where, reason in found.items()} == {
        "r.jsonl:2": "missing image",
        "r.jsonl:3": "image tags and images differ",
        "r.jsonl:5": "unknown role",
        "r.jsonl:6": "not UTF-8",
        "r.jsonl:7": "bad json",
        "r.jsonl:8": "bad json",
        "r.jsonl:9": "bad image name",
        "r.jsonl:10": "image is a URL",
        "r.jsonl:11": "videos are not read",
        "r.jsonl:12": "unreadable image",
        "r.jsonl:13": "unreadable image",
        "r.jsonl:14": "bad conversation",
        "r.jsonl:15": "turn without text",
        "r.jsonl:16": "unknown role",
    }


@pytest.mark.parametrize(
    ("text", "good", "line", "reason"),
    [
        (b'[{"text": "a"},\n{"text": "b"}\n{"text": "c"}]', 2, 3, "no comma"),
        (b'[{"text": "a"},\n{"text": b}]', 1, 2, "Expecting value"),
        (b'[{"text": "a"},\n{"text": "\xff"},\n{"text": "c"}]', 2, 2, "not UTF-8"),
        (b'[{"text": "a"}', 1, 1, "no comma"),
        (b'[{"text": "a"},]', 1, 1, "Expecting value"),
        (b"[" * 100_000, 0, 1, "recursion"),
        (b"[", 0, 1, "Expecting value"),
        (b"[]", 0, None, None),
    ],
)
def test_json_list_is_read_up_to_the_damage(tmp_path, text, good, line, reason):
    path = tmp_path / "l.json"
    path.write_bytes(text)
    source = AnnotationSource(path)
    found = reasons(source)
    assert len(source) - len(found) == good
    if line is None:
        assert found == {}
    else:
        assert list(found) == [f"l.json:{line}"]
        assert reason in found[f"l.json:{line}"]


def test_internvl_meta(tmp_path, pictures):
    rows = [{"id": i, "image": "a.png", "conversations": TALK} for i in range(4)]
    (tmp_path / "ann").mkdir()
    write_jsonl(tmp_path / "ann" / "one.jsonl", rows)
    write_jsonl(tmp_path / "ann" / "two.jsonl", rows[:2])
    write_jsonl(tmp_path / "ann" / "none.jsonl", [])
    meta = {
        "one set": {"root": "pictures", "annotation": "ann/one.jsonl", "repeat_time": 0.5, "length": 4},
        "two": {
            "root": str(pictures),
            "annotation": "ann/two.jsonl",
            "repeat_time": 3,
            "data_augment": False,
        },
    }
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    source = InternVLSource(tmp_path / "meta.json")
    assert (len(source), source.num_unique) == (2 + 6, 4)
    read = [(source[i].key, source[i].meta["id"], source.where(i).rpartition("/")[2]) for i in range(8)]
    once = [
        ("one-set-00000000", "0", "one.jsonl:1"), ("one-set-00000001", "1", "one.jsonl:2"),
        ("two-00000000", "0", "two.jsonl:1"), ("two-00000001", "1", "two.jsonl:2"),
    ]  # fmt: skip
    assert read == [*once, *once[2:], *once[2:]]
    with pytest.raises(IndexError):
        source[8]
    for bad, message in (
        ({"x": {"root": "."}}, "set 'x' has no 'annotation'"),
        ({"x": {"annotation": "ann/one.jsonl", "repeat_time": 1.5}}, "repeat_time=1.5"),
        ({"x": {"annotation": "ann/one.jsonl", "repeat_time": float("nan")}}, "repeat_time=nan"),
        ({"x": {"annotation": "ann/one.jsonl", "repeat_time": float("inf")}}, "repeat_time=inf"),
        ({"x": {"annotation": "ann/one.jsonl", "repeat_time": 0.2}}, "repeat_time=0.2 .* none of its 4 rows"),
        ({"x": {"annotation": "ann/none.jsonl"}}, "set 'x': .*none.jsonl holds no rows"),
        ([], "not a meta file"),
    ):
        (tmp_path / "bad.json").write_text(json.dumps(bad))
        with pytest.raises(ValueError, match=message):
            InternVLSource(tmp_path / "bad.json")


def test_folder_of_pictures_with_and_without_text(pictures, png):
    (pictures / "a.txt").write_text(" a caption\n", encoding="utf-8")
    (pictures / "sub" / "c.json").write_text(json.dumps({"image": "other.png", "conversations": TALK}))
    (pictures / "d.jpg").write_bytes(png(9))
    (pictures / "d.txt").write_bytes(b"\xff\xfe")
    (pictures / "e.png").write_bytes(png(9))
    (pictures / "e.json").write_text("{")
    source = ImageFolderSource(pictures)
    assert [s.rpartition("pictures/")[2] for s in map(source.where, range(len(source)))] == [
        "a.png", "b.png", "d.jpg", "e.png", "sub/c.png",
    ]  # fmt: skip
    assert source[0] == Sample("00000000", (png(0),), "a caption", None, {"id": "a.png"})
    assert source[1].kind == "image"
    (pictures / "b.png").rename(pictures / "b.PNG")
    (pictures / "b.TXT").write_text("from a camera")
    assert ImageFolderSource(pictures)[1].text == "from a camera"
    assert source[4].messages == MESSAGES
    for i, where, reason in ((2, "d.txt", "not UTF-8"), (3, "e.json", "bad json")):
        with pytest.raises(BadSample) as caught:
            source[i]
        assert (caught.value.source.rpartition("/")[2], caught.value.category) == (where, reason)
    assert source.problems == []
    (pictures / "f.HEIC").write_bytes(b"f")
    (pictures / "sub" / "g.txt").write_text("whose?")
    assert [problem.rpartition("pictures/")[2] for problem in ImageFolderSource(pictures).problems] == [
        "f.HEIC: format is not read", "sub/g.txt: text without a picture",
    ]  # fmt: skip
    assert main(["data", "validate", str(pictures), "--workers", "1"]) == 1
    alone = ImageFolderSource(pictures, sidecars=False)
    assert [s.kind for s in map(alone.__getitem__, range(5))] == ["image"] * 5
    assert len(alone.problems) == 1


def test_text_by_paragraph_line_file_and_row(tmp_path):
    folder = tmp_path / "texts"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.txt").write_bytes("\ufeffEins\nzwei\n \t\n\n\nDrei ü\n".encode())
    (folder / "sub" / "b.md").write_bytes(b"good\n\n\xff bad\n\nlast")
    write_jsonl(folder / "z.jsonl", [{"id": 3, "text": "row"}, {"no": 1}, b"{"])
    source = TextSource(folder)
    good = {}
    for i in range(len(source)):
        if source.where(i).rpartition("/")[2] not in reasons(source):
            good[source.where(i).removeprefix(f"{folder}/")] = source[i].text
    assert good == {
        "a.txt:1": "Eins\nzwei", "a.txt:6": "Drei ü", "sub/b.md:1": "good", "sub/b.md:5": "last", "z.jsonl:1": "row",
    }  # fmt: skip
    assert {w: r.partition(":")[0] for w, r in reasons(source).items()} == {
        "b.md:3": "not UTF-8", "z.jsonl:2": "no text", "z.jsonl:3": "bad json",
    }  # fmt: skip
    lines = TextSource(folder / "a.txt", split="line")
    assert [lines[i].text for i in range(3)] == ["Eins", "zwei", "Drei ü"]
    assert TextSource(folder / "a.txt", split="file")[0].text == "Eins\nzwei\n \t\n\n\nDrei ü"
    with pytest.raises(ValueError, match="split='word'"):
        TextSource(folder, split="word")


def test_kinds_are_guessed(tmp_path, pictures, texts):
    from hovle_data.shards import write_shards

    write_shards(texts(1), tmp_path / "shards")
    (tmp_path / "meta.json").write_text('{"x": {"annotation": "a.jsonl"}}')
    (tmp_path / "llava.json").write_text(' [{"conversations": []}]')
    write_jsonl(tmp_path / "talk.jsonl", [b"", {"conversations": TALK}])
    write_jsonl(tmp_path / "text.jsonl", [{"text": "t"}])
    (tmp_path / "t.txt").write_text("t")
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "a.parquet").touch()
    guessed = {
        name: guess_kind(tmp_path / name)
        for name in (
            "shards", "shards/shard-000000.tar", "meta.json", "llava.json", "talk.jsonl", "text.jsonl", "t.txt",
            "pictures", "some",
        )
    }  # fmt: skip
    assert list(guessed.values()) == [
        "webdataset", "webdataset", "internvl", "llava", "internvl", "text", "text", "images", "parquet",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="say so with --kind"):
        guess_kind(write_jsonl(tmp_path / "odd.jsonl", [b"{"]))


def test_spec_errors_name_the_key_that_was_meant(tmp_path, pictures, registry):
    spec = tmp_path / "spec.yaml"
    spec.write_text("sources:\n- {pat: pictures, name: images}\nsample_per_shard: 3\n")
    with pytest.raises(ValueError) as caught:
        load_spec(spec)
    assert "sources.0.pat: unknown key, did you mean 'path'?" in str(caught.value)
    assert "sample_per_shard: unknown key, did you mean 'samples_per_shard'?" in str(caught.value)
    spec.write_text("sources:\n- {path: pictures, name: image}\n")
    with pytest.raises(ValueError, match="there is no dataset 'image'; did you mean 'images'"):
        open_sources(load_spec(spec), registry)
    spec.write_text("sources:\n- {path: pictures, name: images, options: {sidecar: false}}\n")
    with pytest.raises(ValueError, match="did you mean 'sidecars'"):
        open_sources(load_spec(spec), registry)
    spec.write_text("sources:\n" + "- {path: pictures, name: images}\n" * 2)
    with pytest.raises(ValueError, match="sources share the name 'pictures'"):
        open_sources(load_spec(spec), registry)
    spec.write_text(
        "sources:\n- {path: pictures, name: images}\n- {path: pictures, name: images, options: {name: b}}\n"
    )
    assert [source.name for source in open_sources(load_spec(spec), registry)] == ["pictures", "b"]
    spec.write_text("sources:\n- {path: gone, name: llava}\n")
    with pytest.raises(ValueError, match=r"sources\.0 .*gone\): No such file"):
        open_sources(load_spec(spec), registry)
    spec.write_text("- a\n")
    with pytest.raises(ValueError, match="must be a mapping"):
        load_spec(spec)


class Numbers:
    """A third party's source."""

    name = "numbers"

    def __init__(self, path: str, count: int = 3) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> Sample:
        return Sample(str(i), text=f"number {i}")


def test_a_third_party_adds_a_source(tmp_path, monkeypatch):
    from hovle_core.registry import Provider, Registry, Spec

    class Plugin:
        @staticmethod
        @hookimpl
        def hovle_datasets():
            return [Spec("numbers", "their_module:Numbers", {"count": 5})]

    monkeypatch.setitem(sys.modules, "their_module", sys.modules[Numbers.__module__])

    registry = Registry()
    registry.add_all([("dataset", spec) for spec in Plugin.hovle_datasets()], Provider("theirs", "1"))
    spec = load_spec(tmp_path, kind="numbers", options={"count": 2})
    (source,) = open_sources(spec, registry)
    assert [source[i].text for i in range(len(source))] == ["number 0", "number 1"]


def test_our_sources_are_registered():
    names = {spec.name: spec.load() for spec in plugin.hovle_datasets()}
    assert list(names) == ["webdataset", "internvl", "llava", "images", "text", "parquet", "datasets"]
