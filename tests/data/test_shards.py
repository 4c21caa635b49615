"""Shards: round trip, plain webdataset reads them, and damage is named while the rest stays readable."""

import gzip
import io
import json
import multiprocessing
import pickle
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hovle_data.index import ShardIndex, scan_shard
from hovle_data.schema import BadSample, Sample
from hovle_data.shards import ShardSource, write_shards
from hovle_data.validate import validate


def conversation(key: str, images: tuple[bytes, ...]) -> Sample:
    parts = [{"type": "image"} for _ in images] + [{"type": "text", "text": "What is this?"}]
    messages = ({"role": "user", "content": parts}, {"role": "assistant", "content": "Zwölf 🐈"})
    return Sample(key=key, images=images, messages=messages, meta={"split": "train", "n": 3})


@pytest.fixture
def samples(png, encode_image_file):
    from PIL import Image

    jpg = encode_image_file(Image.new("RGB", (5, 5)), "JPEG")
    return [
        Sample(key="picture", images=(png(1),)),
        Sample(key="prose", text="Ein Satz – mit Ümlaut"),
        Sample(key="pair", images=(jpg,), text="a caption"),
        conversation("talk-0", tuple(png(i) for i in range(12))),  # more than ten: 10.png sorts after 9.png
        conversation("talk-1", ()),
    ]


def write_tar(path: Path, members: list[tuple[str, bytes]], format: int = tarfile.USTAR_FORMAT) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def test_round_trip(tmp_path, samples):
    seen = []
    index = write_shards(samples, tmp_path / "out", samples_per_shard=2, progress=seen.append)
    assert [shard.name for shard in index.shards] == [f"shard-{i:06d}.tar" for i in range(3)]
    assert [len(shard.records) for shard in index.shards] == [2, 2, 1]
    assert seen == [1, 2, 3, 4, 5]
    source = ShardSource(tmp_path / "out")
    assert len(source) == index.num_samples == 5
    assert list(source) == samples
    assert [s.validate().kind for s in source] == ["image", "text", "pair", "conversation", "conversation"]
    assert source[-1] == samples[-1]
    assert source.key(3) == "talk-0"
    assert source.where(3) == "out/shard-000001.tar"
    assert source.problems == []
    with pytest.raises(IndexError):
        source[5]


def test_index_and_scan_agree(tmp_path, samples):
    index = write_shards(samples, tmp_path / "out", samples_per_shard=2)
    assert ShardIndex.load(tmp_path / "out") == index
    manifest = ShardSource(tmp_path / "out").manifest()
    (tmp_path / "out" / "index.json").unlink()
    scanned = ShardSource(tmp_path / "out")
    assert list(scanned) == samples
    assert scanned.manifest() == manifest == {"shards": 3, "samples": 5, "sha256": index.sha256}


def test_same_samples_same_bytes(tmp_path, samples):
    one, two = (write_shards(samples, tmp_path / name) for name in ("a", "b"))
    assert one == two


@pytest.fixture
def webdataset(monkeypatch):
    """The plain library; with WDS_SECURE=1, as the suite sets it, it would open no local file by path."""
    import webdataset

    monkeypatch.setattr(webdataset.utils, "enforce_security", False)
    return webdataset


def test_plain_webdataset_reads_ours(tmp_path, samples, webdataset):
    write_shards(samples, tmp_path / "out", samples_per_shard=2)
    tars = sorted(str(path) for path in (tmp_path / "out").glob("*.tar"))
    read = list(webdataset.WebDataset(tars, shardshuffle=False))
    assert [record["__key__"] for record in read] == [sample.key for sample in samples]
    assert read[0]["0.png"] == samples[0].images[0]
    assert read[2]["0.jpg"] == samples[2].images[0]
    assert json.loads(read[3]["json"])["messages"] == list(samples[3].messages)
    assert [read[3][f"{i}.png"] for i in range(12)] == list(samples[3].images)


def test_we_read_what_plain_webdataset_writes(tmp_path, png, webdataset):
    with webdataset.ShardWriter(str(tmp_path / "x-%d.tar"), maxcount=2, verbose=0) as writer:
        for i in range(3):
            writer.write(
                {
                    "__key__": f"dir/{i:03d}",
                    "jpg": png(i),
                    "txt": f"caption {i}",
                    "cls": 7,
                    "pyd": {"never": 1},
                }
            )
    source = ShardSource(tmp_path)
    assert [s.key for s in source] == ["dir/000", "dir/001", "dir/002"]
    assert source[1] == Sample(
        key="dir/001", images=(png(1),), text="caption 1"
    )  # a PNG under the suffix .jpg


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names(tmp_path, png, format):
    key = "a" * 150 + "/ü"
    write_tar(tmp_path / "t.tar", [(f"{key}.png", png(3)), (f"{key}.txt", b"hi"), ("z.txt", b"end")], format)
    assert list(ShardSource(tmp_path)) == [Sample(key, (png(3),), "hi"), Sample("z", (), "end")]


@pytest.mark.parametrize("key", ["", "a.b", "a/b", "a\\b", "x" * 81, "ü" * 41, "a\nb"])
def test_keys_that_webdataset_would_cut_are_refused(tmp_path, key):
    with pytest.raises(BadSample, match="bad key"):
        write_shards([Sample(key=key, text="t")], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("sample", "reason"),
    [
        (Sample(key="a"), "no content"),
        (Sample(key="a", text="  "), "empty text"),
        (Sample(key="a", text="\ud800"), "text is not Unicode"),
        (Sample(key="a", text="t", messages=({"role": "user", "content": "x"},)), "both text and messages"),
        (Sample(key="a", messages=()), "no content"),
        (Sample(key="a", messages=({"role": "bot", "content": "x"},)), "unknown role"),
        (Sample(key="a", messages=({"role": "user"},)), "message without content"),
        (Sample(key="a", messages=({"role": "user", "content": 3},)), "message content is neither"),
        (
            Sample(key="a", messages=({"role": "user", "content": [{"type": "video"}]},)),
            "unknown message part",
        ),
        (
            Sample(key="a", messages=({"role": "user", "content": [{"type": "image"}]},)),
            "image tags and images differ: 1 tags, 0 images",
        ),
        (Sample(key="a", images=(b"what",), text="t"), "not a known image format"),
        (Sample(key="a", images=(b"",), text="t"), "not a known image format"),
        (Sample(key="a", text="t", meta={"x": object()}), "does not fit into json"),
    ],
)
def test_unusable_samples_are_not_written(tmp_path, sample, reason):
    with pytest.raises(BadSample) as caught:
        write_shards([sample], tmp_path / "out")
    assert caught.value.reason.startswith(reason)
    assert list(tmp_path.iterdir()) == []


def test_the_folder_appears_whole_or_not_at_all(tmp_path):
    def stopping():
        yield Sample(key="a", text="t")
        assert not (tmp_path / "out").exists()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(stopping(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(BadSample, match="key given twice"):
        write_shards([Sample(key="a", text="t")] * 2, tmp_path / "out")
    with pytest.raises(ValueError, match="no samples"):
        write_shards([], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    write_shards(
        [Sample(key="a", text="t")], tmp_path / "100%d #1" / "out"
    )  # formats and URLs are not read into paths
    with pytest.raises(ValueError, match="name='a/b'"):
        write_shards([Sample(key="a", text="t")], tmp_path / "x", name="a/b")
    with pytest.raises(ValueError, match="exists"):
        write_shards([Sample(key="a", text="t")], tmp_path / "100%d #1" / "out")


def test_source_refuses_what_is_no_folder_of_tars(tmp_path):
    with pytest.raises(ValueError, match="is no folder"):
        ShardSource(tmp_path / "none")
    with pytest.raises(ValueError, match=r"holds no \.tar"):
        ShardSource(tmp_path)
    (tmp_path / "index.json").write_text("[1]")
    (tmp_path / "index.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"index\.json: not a shard index"):
        ShardSource(tmp_path)
    (tmp_path / "index.safetensors").unlink()
    with pytest.raises(ValueError, match=r"index\.json: not a shard index"):
        ShardSource(tmp_path)


def test_index_files_that_do_not_belong_together(tmp_path, texts):
    for name in "ab":
        write_shards(texts(3 if name == "a" else 4), tmp_path / name)
    records = tmp_path / "a" / "index.safetensors"
    content = records.read_bytes()
    records.write_bytes((tmp_path / "b" / "index.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"index\.safetensors belongs to another index\.json"):
        ShardSource(tmp_path / "a")
    records.unlink()
    with pytest.raises(ValueError, match=r"No such file.*index\.safetensors"):
        ShardSource(tmp_path / "a")
    records.write_bytes(content[:100])
    with pytest.raises(ValueError, match="not a shard index"):
        ShardSource(tmp_path / "a")
    index = tmp_path / "a" / "index.json"
    index.write_text(index.read_text().replace('"version": 2', '"version": 1'))
    assert list(ShardSource(tmp_path / "a")) == texts(3)  # an older index: the tars are scanned
    index.write_text(index.read_text().replace('"version": 1', '"version": 3'))
    with pytest.raises(ValueError, match="version 3, this hovle-data reads 2"):
        ShardSource(tmp_path / "a")


BROKEN = [
    ([("k.json", b'{"text": '), ("k.0.png", b"x")], "bad json"),
    ([("k.json", b"[1, 2]")], "bad json: list where an object belongs"),
    ([("k.json", b"[" * 100_000)], "bad json"),
    ([("k.json", b'{"text": "\xff"}')], "json is not UTF-8"),
    ([("k.json", b'{"text": 7}')], "text is no string: int"),
    ([("k.json", b'{"messages": "hi"}')], "bad json: messages is str"),
    ([("k.json", b'{"text": "t", "meta": 3}')], "bad json: meta is int"),
    ([("k.json", b'{"text": "t", "images": 2}'), ("k.0.png", b"x")], "missing image: 1 of 2"),
    ([("k.json", b"")], "bad json"),
    ([("k.txt", b"\xff\xfe")], "txt is not UTF-8"),
    ([("k.json", b"{}")], "no content"),
    ([("k.cls", b"3")], "no content"),
    (
        [("k.json", b'{"messages": [{"role": "user", "content": [{"type": "image"}]}]}')],
        "image tags and images differ: 1 tags, 0 images",
    ),
    ([("k.json", b'{"text": "\\ud83d"}')], "text is not Unicode"),
    ([("k.heic", b"x"), ("k.txt", b"t")], "format is not read: k.heic"),
    ([("k.mp4", b"x"), ("k.json", b'{"caption": "t"}')], "format is not read: k.mp4"),
    ([("k.json", b'{"caption": 7}')], "text is no string: int"),
    ([("k.json", b'{"conversations": [{"from": "bot", "value": "t"}]}')], "unknown role: 'bot'"),
]


def test_others_captions_and_conversations_are_read(tmp_path, png):
    talk = json.dumps({"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]})
    two = talk.replace('"Q"', '"<image> and <image>?"')
    write_tar(
        tmp_path / "d" / "s.tar",
        [
            *[("a.jpg", png(1)), ("a.json", b'{"caption": "in json", "url": "u"}')],
            *[("b.jfif", png(2)), ("b.json", b'{"caption": "in json"}'), ("b.txt", b"in txt")],
            *[("c.png", png(3)), ("c.json", talk.encode())],
            *[("d.0.png", png(4)), ("d.1.png", png(5)), ("d.json", two.encode())],
        ],
    )
    one, other, conversation, pictures = ShardSource(tmp_path / "d")
    assert [(s.kind, s.text, len(s.images)) for s in (one, other)] == [
        ("pair", "in json", 1),
        ("pair", "in txt", 1),
    ]
    assert conversation.validate().messages[0]["content"] == [
        {"type": "image"},
        {"type": "text", "text": "Q"},
    ]
    assert [part["type"] for part in pictures.validate().messages[0]["content"]] == [
        "image",
        "text",
        "image",
        "text",
    ]


@pytest.mark.parametrize(("members", "reason"), BROKEN)
def test_broken_records_are_named_the_same_way_every_time(tmp_path, members, reason):
    write_tar(tmp_path / "d" / "s.tar", [("a.txt", b"before"), *members, ("z.txt", b"after")])
    said = []
    for _ in range(2):
        source = ShardSource(tmp_path / "d")
        assert [source[i].text for i in (0, 2)] == ["before", "after"]
        with pytest.raises(BadSample) as caught:
            source[1].validate(source.where(1))
        assert (caught.value.key, caught.value.source) == ("k", "d/s.tar")
        assert caught.value.reason.startswith(reason)
        said.append(str(caught.value))
    assert said[0] == said[1]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_a_member_without_bytes_of_its_own_costs_its_sample_by_name(tmp_path, png, kind):
    """Left out, the pair would be a text; followed, a link would read this machine's files."""
    path = tmp_path / "d" / "s.tar"
    path.parent.mkdir()
    with tarfile.open(path, "w") as tar:
        for name, content in (
            ("a.txt", b"before"),
            ("a.png", png()),
            ("b.txt", b"a pair"),
            ("z.txt", b"after"),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
            if name == "b.txt":
                special = tarfile.TarInfo("b.png")
                special.type, special.linkname = kind, "/etc/passwd" if kind == tarfile.SYMTYPE else "a.png"
                tar.addfile(special)
                folder = tarfile.TarInfo("c.d")
                folder.type = tarfile.DIRTYPE
                tar.addfile(folder)
    source = ShardSource(tmp_path / "d")
    good, bad = readable(source)
    assert good == ["a", "z"]
    assert [(b.key, b.reason) for b in bad] == [("b", "no plain file in the tar: b.png")]


def test_a_compressed_tar_says_what_to_do(tmp_path, png):
    write_tar(tmp_path / "d" / "s.tar", [("a.png", png())])
    packed = gzip.compress((tmp_path / "d" / "s.tar").read_bytes())
    (tmp_path / "d" / "s.tar").write_bytes(packed)
    assert ShardSource(tmp_path / "d").problems == [
        "d/s.tar: unreadable shard: compressed, decompress it first"
    ]


def test_names_that_lead_out_of_a_folder_stay_names(tmp_path, png):
    write_tar(
        tmp_path / "d" / "s.tar", [("../../out.png", png()), ("/abs.txt", b"text"), ("a/../b.txt", b"c")]
    )
    source = ShardSource(tmp_path / "d")
    assert readable(source) == (["../../out", "/abs", "a/../b"], [])
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["d", "s.tar"]


def test_a_member_larger_than_any_picture_is_not_read(tmp_path, png, monkeypatch):
    write_tar(tmp_path / "d" / "s.tar", [("a.png", png()), ("b.png", bytes(2000))])
    monkeypatch.setattr("hovle_data.shards.MAX_FILE_BYTES", 1000)
    good, bad = readable(ShardSource(tmp_path / "d"))
    assert (good, [b.reason for b in bad]) == (["a"], ["file too large: b.png"])


def readable(source: ShardSource) -> tuple[list[str], list[BadSample]]:
    good, bad = [], []
    for i in range(len(source)):
        try:
            good.append(source[i].validate().key)
        except BadSample as error:
            bad.append(error)
    return good, bad


@pytest.mark.parametrize("with_index", [True, False])
def test_truncated_tar_is_named_and_the_rest_stays(tmp_path, pairs, with_index):
    samples = pairs(10)
    write_shards(samples, tmp_path / "out", samples_per_shard=5)
    path = tmp_path / "out" / "shard-000000.tar"
    third = scan_shard(path)[0][2]
    with path.open("r+b") as file:
        file.truncate(third.end() - 10)
    if not with_index:
        (tmp_path / "out" / "index.json").unlink()
    source = ShardSource(tmp_path / "out")
    assert len(source.problems) == 1
    assert "shard-000000.tar" in source.problems[0]
    good, bad = readable(source)
    assert good == [s.key for s in samples[:2] + samples[5:]]
    assert {(b.source, b.category) for b in bad} == {("out/shard-000000.tar", "truncated shard")}
    # With the index every lost sample is known; without it, only the one that is cut.
    assert [b.key for b in bad] == [s.key for s in (samples[2:5] if with_index else samples[2:3])]


@pytest.mark.parametrize("keep", [0, 100, 512, 700, 1536, 4000])
def test_tar_cut_anywhere_is_a_problem_not_a_crash(tmp_path, pairs, keep):
    write_shards(pairs(3), tmp_path / "out")
    path = tmp_path / "out" / "shard-000000.tar"
    with path.open("r+b") as file:
        file.truncate(keep)
    (tmp_path / "out" / "index.json").unlink()
    source = ShardSource(tmp_path / "out")
    assert len(source.problems) == 1
    assert readable(source)[1]


@pytest.mark.parametrize("when", ["before opening", "after opening"])
def test_missing_tar_is_named_and_the_rest_stays(tmp_path, pairs, when):
    samples = pairs(6)
    write_shards(samples, tmp_path / "out", samples_per_shard=2)
    source = ShardSource(tmp_path / "out")
    (tmp_path / "out" / "shard-000001.tar").unlink()
    if when == "before opening":
        source = ShardSource(tmp_path / "out")
        assert source.problems == ["out/shard-000001.tar: missing shard: 2 samples"]
        assert len(source.manifest()["sha256"]) == 64
    good, bad = readable(source)
    assert good == [s.key for s in samples[:2] + samples[4:]]
    assert [str(b) for b in bad] == [f"out/shard-000001.tar: s000{i}: missing shard" for i in (2, 3)]


def test_not_a_tar_at_all(tmp_path, pairs):
    write_shards(pairs(2), tmp_path / "out")
    (tmp_path / "out" / "junk.tar").write_bytes(b"not a tar" * 500)
    with tarfile.open(tmp_path / "out" / "zipped.tar", "w:gz"):
        pass
    source = ShardSource(tmp_path / "out")
    assert len(source.problems) == 2
    good, bad = readable(source)
    assert len(good) == 2
    assert [b.source for b in bad] == ["out/junk.tar", "out/zipped.tar"]


def test_stale_index_is_noticed(tmp_path, pairs, texts):
    write_shards(pairs(4), tmp_path / "out")
    write_shards(texts(7), tmp_path / "new")
    tar = tmp_path / "out" / "shard-000000.tar"
    tar.write_bytes((tmp_path / "new" / "shard-000000.tar").read_bytes())
    assert [s.key for s in ShardSource(tmp_path / "out")] == [s.key for s in texts(7)]  # other size: scanned
    (tmp_path / "new" / "shard-000000.tar").rename(tmp_path / "out" / "shard-000001.tar")
    assert len(ShardSource(tmp_path / "out")) == 14  # a tar the index does not know


def test_samples_that_a_whole_tar_lacks_are_bad_by_name(tmp_path, texts):
    """A tar cut between two samples and padded is sound in itself: only the index knows what is gone."""
    write_shards(texts(3), tmp_path / "out")
    tar = tmp_path / "out" / "shard-000000.tar"
    tar.write_bytes(tar.read_bytes()[:2048] + bytes(10240))
    source = ShardSource(tmp_path / "out")
    assert source.problems == ["out/shard-000000.tar: lacks 1 samples that index.json names"]
    good, bad = readable(source)
    assert good == ["t0000", "t0001"]
    assert [(error.key, error.reason) for error in bad] == [
        ("t0002", "named by index.json, not in its shard")
    ]


def test_bytes_that_changed_are_noticed_where_all_are_read(tmp_path, texts):
    write_shards(texts(3), tmp_path / "out")
    tar = tmp_path / "out" / "shard-000000.tar"
    assert list(ShardSource(tmp_path / "out").changed()) == []
    whole = tar.read_bytes()
    text = next(sample.text for sample in texts(3)).encode()
    tar.write_bytes(whole.replace(text, text[::-1], 1))
    (line,) = ShardSource(tmp_path / "out").changed()
    assert line == "out/shard-000000.tar: changed since it was indexed: its SHA-256 is another"
    assert line.partition(": ")[2] in [
        problem.reason for problem in validate([ShardSource(tmp_path / "out")]).problems
    ]


def test_index_that_points_elsewhere_is_a_bad_sample(tmp_path, texts):
    write_shards(texts(3), tmp_path / "out")
    index = tmp_path / "out" / "index.safetensors"
    index.write_bytes(index.read_bytes().replace(b"t0001", b"t9999"))
    good, bad = readable(ShardSource(tmp_path / "out"))
    assert good == ["t0000", "t0002"]
    assert bad[0].reason.startswith("shard and index differ")


def test_nothing_is_ever_unpickled(tmp_path, monkeypatch):
    class Boom:
        def __reduce__(self):
            return (pytest.fail, ("unpickled",))

    write_tar(tmp_path / "d" / "s.tar", [("k.pyd", pickle.dumps(Boom())), ("k.txt", b"text")])
    assert ShardSource(tmp_path / "d")[0] == Sample(key="k", text="text")


def _read_all(source: ShardSource) -> list[str]:
    return [sample.key for sample in source]


def test_source_pickles_forks_and_threads(tmp_path, pairs):
    write_shards(pairs(20), tmp_path / "out", samples_per_shard=3)
    source = ShardSource(tmp_path / "out")
    expected = [source[i].key for i in range(20)]
    assert _read_all(pickle.loads(pickle.dumps(source))) == expected
    with ThreadPoolExecutor(8) as threads:
        assert all(keys == expected for keys in threads.map(_read_all, [source] * 16))
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(_read_all, [source] * 2) == [expected] * 2


def test_bad_sample_pickles():
    bad = pickle.loads(pickle.dumps(BadSample("k", "s", "r: d")))
    assert (bad.key, bad.source, bad.reason, bad.category) == ("k", "s", "r: d", "r")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_mutated_tars_never_crash_nor_lose_untouched_shards(tmp_path_factory, pairs, data):
    folder = tmp_path_factory.mktemp("fuzz") / "out"
    write_tar(
        folder / "a.tar", [("a.txt", b"one"), ("b.txt", b"two" * 300), ("c.json", b'{"text": "three"}')]
    )
    write_tar(folder / "b.tar", [("d.txt", b"four")])
    content = bytearray((folder / "a.tar").read_bytes()[:6000])
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (folder / "a.tar").write_bytes(content)
    source = ShardSource(folder)
    good, bad = readable(source)
    assert len(good) + len(bad) == len(source)
    assert good[-1] == "d"
