"""Hostile records and tars: no crash, no hang, nothing lost, nothing twice, and the same answer every time.

The fast suite draws a few hundred inputs; `make test-slow` draws 10,000 and prints what became of them (`-s`).
"""

import io
import json
import logging
import signal
import struct
import tarfile
from collections import Counter
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

from hovle_data.mixture import Mixture
from hovle_data.quarantine import Ledger
from hovle_data.schema import BadSample, Sample
from hovle_data.shards import ShardSource, write_shards
from hovle_data.streams import PairStream, TextStream

pytestmark = pytest.mark.filterwarnings(
    "ignore::hypothesis.errors.HypothesisWarning"
)  # large inputs are meant
FAST = settings(max_examples=75, suppress_health_check=list(HealthCheck))
SLOW = settings(FAST, max_examples=5_000, phases=[Phase.generate, Phase.shrink])


@contextmanager
def at_most(seconds):
    """A hang is a failure that names the line."""

    def hangs(*_):
        raise AssertionError(f"hangs: more than {seconds} s")

    before = signal.signal(signal.SIGALRM, hangs)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(autouse=True)
def _quiet():
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def tar_bytes(members, format=tarfile.USTAR_FORMAT):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def outcome(read):
    try:
        return read()
    except BadSample as bad:
        return bad.args


def read_all(folder):
    """What every sample of a folder comes to, twice the same: a Sample or (key, shard, reason)."""
    with at_most(5):
        source = ShardSource(folder)
        first = [outcome(lambda i=i: source[i].validate(source.where(i))) for i in range(len(source))]
        again = ShardSource(folder)
        assert first == [outcome(lambda i=i: again[i].validate(again.where(i))) for i in range(len(again))]
    return source, first


# ---- records ---------------------------------------------------------------------------------------------------


def picture(format):
    out = io.BytesIO()
    Image.fromarray(np.arange(12 * 10 * 3, dtype=np.uint8).reshape(12, 10, 3)).save(out, format)
    return out.getvalue()


PICTURES = [picture(format) for format in ("PNG", "JPEG", "GIF", "WEBP", "BMP")]
words = st.sampled_from(["", " ", "a cat", "<image>", "\ufeffx", "\ud800", "\0", "é" * 40, "1 " * 300])
numbers = st.one_of(st.integers(), st.floats(), st.booleans(), st.none())
json_values = st.recursive(
    st.one_of(words, numbers),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(words, inner, max_size=3)),
    max_leaves=6,
)
parts = st.one_of(
    st.just({"type": "image"}),
    st.fixed_dictionaries({"type": st.just("text"), "text": words}),
    st.fixed_dictionaries({"type": st.sampled_from(["video", "text", "image"]), "text": json_values}),
    json_values,
)
messages = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "bot", None, 3, []])},
    optional={"content": st.one_of(words, st.lists(parts, max_size=3), json_values)},
)
turns = st.fixed_dictionaries(
    {"from": st.sampled_from(["human", "gpt", "bot", []]), "value": st.one_of(words, json_values)}
)
objects = st.fixed_dictionaries(
    {},
    optional={
        "text": st.one_of(words, json_values),
        "caption": st.one_of(words, json_values),
        "conversations": st.one_of(st.lists(st.one_of(turns, json_values), max_size=4), json_values),
        "messages": st.one_of(st.lists(st.one_of(messages, json_values), max_size=4), json_values),
        "images": st.one_of(st.integers(-1, 3), json_values),
        "meta": json_values,
    },
)


@st.composite
def mutated(draw, content):
    content = bytearray(content)
    for _ in range(draw(st.integers(0, 4))):
        if content:
            at = draw(st.integers(0, len(content) - 1))
            content[at] = draw(st.integers(0, 255))
    return bytes(content[: draw(st.one_of(st.just(len(content)), st.integers(0, len(content))))])


whole_json = st.one_of(
    objects.map(lambda value: json.dumps(value).encode()),
    st.one_of(objects, json_values).map(lambda value: json.dumps(value).encode()),
    objects.map(lambda value: json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")),
    objects.map(lambda value: b"\xef\xbb\xbf" + json.dumps(value).encode()),
)
json_files = st.one_of(whole_json, whole_json, whole_json.flatmap(mutated))
text_files = st.one_of(st.binary(max_size=40), words.map(lambda text: text.encode("utf-8", "surrogatepass")))
picture_files = st.one_of(st.sampled_from(PICTURES), st.sampled_from(PICTURES).flatmap(mutated), st.just(b""))
members = st.one_of(
    st.tuples(st.just("json"), json_files),
    st.tuples(st.just("txt"), text_files),
    st.tuples(
        st.sampled_from(["png", "0.png", "1.jpg", "2.JPEG", "10.webp", "²٣.gif", "cls", "mp4"]), picture_files
    ),
)
one_each = st.lists(members, min_size=1, max_size=4, unique_by=lambda member: member[0])
files = st.one_of(one_each, one_each, one_each, st.lists(members, min_size=1, max_size=4))
records = st.lists(files, min_size=1, max_size=4)


class Listed(list):
    name = "src"


def check_records(drawn, processor, folder, counts):
    folder.mkdir()
    named = [(f"k{i}", fields) for i, fields in enumerate(drawn)]
    content = [(f"{key}.{name}", data) for key, fields in named for name, data in fields]
    content = [("before.txt", b"1"), *content, ("zafter.txt", b"2")]
    (folder / "a.tar").write_bytes(tar_bytes(content, tarfile.PAX_FORMAT))
    source, read = read_all(folder)
    assert source.problems == []
    keys = [sample.key if isinstance(sample, Sample) else sample[0] for sample in read]
    assert keys == ["before", *(key for key, _ in named), "zafter"]  # each once, in order
    assert [read[0].text, read[-1].text] == ["1", "2"]
    for (_, fields), sample in zip(named, read[1:-1], strict=True):
        if isinstance(sample, Sample):  # whatever is good has all that was written
            names = [name for name, _ in fields]
            assert len(set(names)) == len(names)
            assert sorted(sample.images) == sorted(d for n, d in fields if n not in ("json", "txt", "cls"))
        counts["readable" if isinstance(sample, Sample) else sample[2].partition(":")[0]] += 1
    for kind in (PairStream, TextStream):
        ledger = Ledger(folder / f"{kind.__name__}.jsonl", max_share=1)
        stream = kind(Mixture([(source, 1)], 0), processor, 0, 64, ledger)
        got = [stream.get(k) for k in range(len(source))]
        used = [encoded.key for encoded in got if encoded is not None]
        bad = (
            [json.loads(line)["key"] for line in ledger.path.read_text().splitlines()]
            if ledger.num_bad
            else []
        )
        assert sorted([*used, *(f"{source.name}/{key}" for key in bad)]) == sorted(
            f"{source.name}/{key}" for key in keys
        )
        counts[f"used by {kind.__name__}"] += len(used) - 2


@FAST
@given(drawn=records)
def test_records(drawn, processor, tmp_path_factory):
    check_records(drawn, processor, tmp_path_factory.mktemp("fuzz") / "out", Counter())


# ---- tars ------------------------------------------------------------------------------------------------------

BLOCK = 512
SAMPLES = [
    Sample("a0", text="one"),
    Sample("b1", (PICTURES[0],), "two"),
    Sample("c2", text="three " * 200),
    Sample("d3", (PICTURES[1], PICTURES[2]), messages=(
        {"role": "user", "content": [{"type": "image"}, {"type": "image"}]}, {"role": "assistant", "content": "4"},
    )),
    Sample("e4", text="five"),
]  # fmt: skip
SIZES = [0, 1, -1, -512, -(2**40), 511, 4096, 2**33, 2**62, 2**63 - 1, -(2**63)]


def with_checksum(header):
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return header


class Damaged:
    """content: bytes of a tar; first: where its first damage begins."""

    def __init__(self, content, first):
        self.content, self.first = content, first

    def __repr__(self):
        return f"{len(self.content)} bytes, damaged from {self.first} on"


@st.composite
def damages(draw, content):
    """A tar, damaged."""
    content = bytearray(content)
    blocks = len(content) // BLOCK
    first = len(content)
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(
            st.sampled_from(
                ["byte", "byte", "size", "type", "name", "cut", "drop", "repeat", "swap", "insert"]
            )
        )
        at = draw(st.integers(0, max(0, len(content) // BLOCK - 1))) * BLOCK
        header = bytearray(content[at : at + BLOCK])
        if len(header) < BLOCK:
            continue
        if kind == "byte":
            at += draw(st.integers(0, BLOCK - 1))
            content[at] = draw(st.integers(0, 255))
        elif kind == "size":  # as base 256, which can say anything, also negative numbers
            size = draw(st.sampled_from(SIZES))
            header[124:136] = (b"\xff\xff\xff\xff" if size < 0 else b"\x80\0\0\0") + struct.pack(">q", size)
            content[at : at + BLOCK] = with_checksum(header)
        elif kind == "type":
            header[156] = draw(st.sampled_from(b"0123456789LKxgXSDNMVA\0"))
            content[at : at + BLOCK] = with_checksum(header)
        elif kind == "name":
            name = draw(
                st.sampled_from([b"", b".", b"/", b"a0.json", b"../x.txt", b"\xff\xfe.txt", b"q" * 100])
            )
            header[:100] = name.ljust(100, b"\0")
            content[at : at + BLOCK] = with_checksum(header)
        elif kind == "cut":
            at += draw(st.integers(0, BLOCK - 1))
            del content[at:]
        elif kind == "drop":
            del content[at : at + BLOCK]
        elif kind == "repeat":
            content[at:at] = header * draw(st.sampled_from([1, 2, 1500]))
        elif kind == "swap":
            other = draw(st.integers(0, blocks - 1)) * BLOCK
            content[at : at + BLOCK], at = content[other : other + BLOCK], min(at, other)
        else:
            content[at:at] = draw(st.binary(min_size=1, max_size=BLOCK))
        first = min(first, at)
    return Damaged(bytes(content), first)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Shards a (SAMPLES) and b (one sample) with their index, and where each sample of a ends."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    index = write_shards(
        [*SAMPLES, Sample("other", text="untouched")], folder, samples_per_shard=len(SAMPLES)
    )
    ends = [record.end() for record in index.shards[0].records]
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    return files, index.shards[0].name, ends


def check_tar(data, with_index, whole, folder, counts):
    files, name, ends = whole
    damaged = data.draw(damages(files[name]))
    content, first = damaged.content, damaged.first
    folder.mkdir()
    for other, original in files.items():
        if with_index or other.endswith(".tar"):
            (folder / other).write_bytes(content if other == name else original)
    source, read = read_all(folder)
    good = [sample for sample in read if isinstance(sample, Sample)]
    assert good[-1] == Sample("other", text="untouched")  # the shard beside it
    # All that lies before the damage is there, once and as it was; to the last of it a damaged name may add a file.
    intact = max(0, sum(end <= first for end in ends) - 1)
    assert read[:intact] == SAMPLES[:intact]
    assert all(bad[0] and bad[1].startswith("out/") and bad[2] for bad in read if not isinstance(bad, Sample))
    keys = [sample.key for sample in good]
    if with_index and intact:  # else another tar may have taken its place
        told = {*keys, *(bad[0] for bad in read if not isinstance(bad, Sample))}
        assert {sample.key for sample in SAMPLES} <= told or source.problems
    lost = len(SAMPLES) - (len(good) - 1)
    if lost > 0:
        assert len(good) < len(read) or source.problems or content != files[name]
    counts["whole" if lost <= 0 and len(good) == len(read) else "damage named"] += 1
    counts["samples read"] += len(good)
    counts["samples named as bad"] += len(read) - len(good)


@FAST
@given(data=st.data(), with_index=st.booleans())
def test_tars(data, with_index, whole, tmp_path_factory):
    check_tar(data, with_index, whole, tmp_path_factory.mktemp("fuzz") / "out", Counter())


# ---- ten thousand of them ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_ten_thousand_inputs(processor, whole, tmp_path):
    counts = {"records": Counter(), "tars": Counter()}
    numbers = {"records": 0, "tars": 0}

    def folder(kind):
        numbers[kind] += 1
        parent = tmp_path / f"{kind}-{numbers[kind]}"
        parent.mkdir()
        return parent / "out"

    @SLOW
    @given(drawn=records)
    def many_records(drawn):
        check_records(drawn, processor, folder("records"), counts["records"])

    @SLOW
    @given(data=st.data(), with_index=st.booleans())
    def many_tars(data, with_index):
        check_tar(data, with_index, whole, folder("tars"), counts["tars"])

    many_records()
    many_tars()
    assert sum(numbers.values()) >= 10_000
    print(
        json.dumps(
            {"inputs": numbers, **{kind: dict(c.most_common()) for kind, c in counts.items()}}, indent=1
        )
    )
