"""Shards: round trip, plain webdataset reads them and is read, and what is no folder of shards is refused."""

import json
import multiprocessing
import pickle
import tarfile
from concurrent.futures import ThreadPoolExecutor

import pytest
from tars import write_tar

from hovle_data.index import ShardIndex
from hovle_data.schema import BadSample, Sample
from hovle_data.shards import ShardSource, write_shards


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


def test_tars_without_an_index_are_hashed_once(tmp_path, samples, monkeypatch):
    write_shards(samples, tmp_path / "out", samples_per_shard=2)
    (tmp_path / "out" / "index.json").unlink()
    source = ShardSource(tmp_path / "out")
    first = source.manifest()
    monkeypatch.setattr("hovle_data.shards.file_sha256", lambda path: pytest.fail(f"{path} is read again"))
    assert source.manifest() == first


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
