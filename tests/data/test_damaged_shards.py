"""Records, tars and indices that are broken: each is named, and the rest stays readable."""

import gzip
import io
import json
import pickle
import tarfile

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tars import write_tar

from hovle_data.index import scan_shard
from hovle_data.schema import BadSample, Sample
from hovle_data.shards import ShardSource, write_shards
from hovle_data.validate import validate

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
