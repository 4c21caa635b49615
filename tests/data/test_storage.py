"""The same data behind URLs: memory:// as a file system without a server, and S3 against a server on loopback."""

import json
import os
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from hovle_core.cli import main
from hovle_data import storage
from hovle_data.schema import BadSample
from hovle_data.shards import ShardSource, write_shards
from hovle_data.sources.chats import AnnotationSource
from hovle_data.sources.pictures import ImageFolderSource
from hovle_data.sources.texts import TextSource
from hovle_data.storage import GIB, FileCache, Folder, cache_folder

TALK = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "That."}]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HOVLE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "files"


@pytest.fixture
def memory():
    import fsspec

    fs = fsspec.filesystem("memory")
    yield fs
    fs.rm("/", recursive=True)


def upload(fs, folder, root):
    for path in folder.rglob("*"):
        if path.is_file():
            fs.pipe_file(f"{root}/{path.relative_to(folder)}", path.read_bytes())


@pytest.mark.parametrize("cache_gib", [None, 1])
@pytest.mark.parametrize("with_index", [True, False])
def test_remote_shards_read_like_local_ones(tmp_path, memory, pairs, cache, cache_gib, with_index):
    write_shards(pairs(10), tmp_path / "out", samples_per_shard=4)
    if not with_index:
        (tmp_path / "out" / "index.json").unlink()
        (tmp_path / "out" / "index.safetensors").unlink()
    upload(memory, tmp_path / "out", "/bucket/out")
    source = ShardSource("memory://bucket/out", cache_gib=cache_gib)
    assert list(source) == pairs(10)
    assert source.where(9) == "out/shard-000002.tar"
    assert source.manifest() == ShardSource(tmp_path / "out").manifest()
    one = ShardSource("memory://bucket/out/shard-000001.tar", cache_gib=cache_gib)
    assert [sample.key for sample in one] == [f"s{i:04d}" for i in range(4, 8)]
    if with_index and cache_gib is None:
        assert not list(cache.glob("*.tar"))
    memory.rm("/bucket/out/shard-000001.tar")
    with pytest.raises(BadSample, match="missing shard"):
        ShardSource("memory://bucket/out")[5] if with_index else source[5]


def test_the_cache_is_bounded_forgets_the_oldest_and_sees_changes(tmp_path, memory):
    files = FileCache(tmp_path / "c", max_bytes=250)
    for name in "abc":
        memory.pipe_file(f"/b/{name}", name.encode() * 100)
    first = files.local(memory, "/b/a")
    assert first.read_bytes() == b"a" * 100
    files.local(memory, "/b/b")
    os.utime(first, (1, 1))  # used long ago
    files.local(memory, "/b/c")
    assert not first.exists()
    assert sum(path.stat().st_size for path in (tmp_path / "c").iterdir()) == 200
    memory.pipe_file("/b/c", b"new")
    assert files.local(memory, "/b/c").read_bytes() == b"new"
    assert files.clear() > 0
    assert not (tmp_path / "c").exists()
    assert files.clear() == 0


def one_at_a_time(memory, monkeypatch):
    """fsspec's memory file system hands all threads one file object, whose place in the file they share."""
    lock, plain = threading.Lock(), type(memory).get_file

    def get_file(self, *args, **kwargs):
        with lock:
            return plain(self, *args, **kwargs)

    monkeypatch.setattr(type(memory), "get_file", get_file)


def test_a_copy_that_did_not_arrive_whole_is_fetched_again(tmp_path, memory, pairs, monkeypatch):
    monkeypatch.setattr(storage, "PAUSES", (0.0, 0.0))
    write_shards(pairs(4), tmp_path / "out")
    upload(memory, tmp_path / "out", "/bucket/out")
    source = ShardSource("memory://bucket/out", cache_gib=1)
    plain, cut = type(memory).get_file, [100, 200]

    def get_file(self, path, part, **kwargs):
        plain(self, path, part, **kwargs)
        if cut:
            os.truncate(part, cut.pop())

    FileCache(cache_folder() / "files", 0).clear()
    monkeypatch.setattr(type(memory), "get_file", get_file)
    assert source[2] == pairs(4)[2]
    assert cut == []


def test_a_copy_that_goes_before_it_is_opened_costs_no_sample(tmp_path, memory, pairs, monkeypatch):
    """Threads and ranks share a cache that is too small for them: each makes room while others are about to read."""
    write_shards(pairs(40), tmp_path / "out", samples_per_shard=4)
    upload(memory, tmp_path / "out", "/bucket/out")
    one_at_a_time(memory, monkeypatch)
    source = ShardSource(
        "memory://bucket/out", cache_gib=1 / GIB
    )  # one byte: every shard drives out all others
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(source.__getitem__, [*range(40)] * 5)) == pairs(40) * 5
    copy, rows = cache_folder() / "files", 20 * [{"text": "t"}]
    memory.pipe_file("/d/rows.jsonl", b"".join(json.dumps(row).encode() + b"\n" for row in rows))
    texts = TextSource("memory://d/rows.jsonl")
    assert texts[3].text == "t"
    assert FileCache(copy, 0).clear() > 0
    assert texts[4].text == "t"  # it is fetched again
    memory.rm("/d/rows.jsonl")
    FileCache(copy, 0).clear()
    with pytest.raises(BadSample, match="unreadable file: cannot read memory://d/rows.jsonl"):
        texts[5]


def test_a_stores_hiccup_costs_no_sample(tmp_path, memory, pairs, monkeypatch):
    monkeypatch.setattr(storage, "PAUSES", (0.0, 0.0))
    write_shards(pairs(4), tmp_path / "out")
    upload(memory, tmp_path / "out", "/bucket/out")
    source = ShardSource("memory://bucket/out")
    errors = [ConnectionResetError("reset"), TimeoutError("slow")]

    def flaky(*args, **kwargs):
        if errors:
            raise errors.pop()
        return type(memory).cat_file(memory, *args, **kwargs)

    monkeypatch.setattr(source.folder.fs, "cat_file", flaky)
    assert source[2] == pairs(4)[2]
    assert errors == []
    errors += [ConnectionResetError("reset")] * 3
    with pytest.raises(BadSample, match="unreadable shard: reset"):
        source[2]


def test_a_download_under_way_is_not_cleared_for_room(tmp_path, memory):
    files = FileCache(tmp_path / "c", max_bytes=10)
    (tmp_path / "c").mkdir()
    begun, left = tmp_path / "c" / "x.1-a.part", tmp_path / "c" / "x.2-b.part"
    begun.write_bytes(b"half")
    left.write_bytes(b"half")
    os.utime(left, (1, 1))  # of a process that was killed
    memory.pipe_file("/b/a", b"a" * 10)
    files.local(memory, "/b/a")
    assert begun.exists()
    assert not left.exists()


def test_links_are_followed_and_no_folder_is_walked_twice(tmp_path):
    (tmp_path / "far" / "deep").mkdir(parents=True)
    (tmp_path / "far" / "deep" / "b.png").touch()
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "a.png").touch()
    (tmp_path / "here" / "link").symlink_to(tmp_path / "far")
    (tmp_path / "far" / "deep" / "back").symlink_to(tmp_path / "here")
    assert Folder(tmp_path / "here").walk((".png",)) == ["a.png", "link/deep/b.png"]


def test_what_is_no_file_and_what_is_too_large_is_not_read(tmp_path, monkeypatch):
    """A pipe would keep its reader waiting; a device has no end."""
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    (tmp_path / "large.png").write_bytes(bytes(2000))
    monkeypatch.setattr("hovle_data.storage.MAX_FILE_BYTES", 1000)
    folder = Folder(tmp_path)
    for name in ("pipe.png", "zero.png", "/dev/zero", "."):
        with pytest.raises(OSError, match="is no file"):
            folder.read(name)
    with pytest.raises(OSError, match="file too large"):
        folder.read("large.png")
    assert folder.read("large.png", 0, 2000) == bytes(2000)


def test_a_failed_download_leaves_nothing(tmp_path, memory):
    memory.pipe_file("/b/a", b"x")
    files = FileCache(tmp_path / "c", max_bytes=GIB)

    class Broken(type(memory)):
        cachable = False

        def get_file(self, remote, local, **kwargs):
            with open(local, "wb") as file:
                file.write(b"half")
            raise ConnectionError("lost")

    with pytest.raises(ConnectionError):
        files.local(Broken(), "/b/a")
    assert list((tmp_path / "c").iterdir()) == []


def test_annotations_pictures_and_texts_behind_a_url(memory, png, tmp_path):
    memory.pipe_file("/d/pics/a.png", png(1))
    memory.pipe_file("/d/pics/sub/b.png", png(2))
    memory.pipe_file("/d/pics/sub/b.txt", b"two")
    memory.pipe_file("/d/rows.jsonl", json.dumps({"image": "a.png", "conversations": TALK}).encode())
    memory.pipe_file("/d/t.txt", b"one\n\ntwo")
    rows = AnnotationSource("memory://d/rows.jsonl", root="memory://d/pics")
    assert rows[0].images == (png(1),)
    assert rows.where(0) == "memory://d/rows.jsonl:1"
    pictures = ImageFolderSource("memory://d/pics")
    assert [(s.meta["id"], s.text) for s in (pictures[0], pictures[1])] == [
        ("a.png", None),
        ("sub/b.png", "two"),
    ]
    assert TextSource("memory://d/t.txt")[1].text == "two"
    memory.rm("/d/pics/a.png")
    with pytest.raises(BadSample, match="missing image"):
        rows[0]


def test_errors_name_the_path(capsys):
    with pytest.raises(ValueError, match="path=nothing://x: Protocol not known"):
        ShardSource("nothing://x")
    with pytest.raises(ValueError, match="cannot read memory://no/rows.jsonl"):
        AnnotationSource("memory://no/rows.jsonl")
    with pytest.raises(ValueError, match="is no folder"):
        ShardSource("memory://no/where")
    assert main(["data", "clear-cache"]) == 0
    assert str(cache_folder()) in capsys.readouterr().out


@pytest.fixture(scope="module")
def s3():
    """An S3-compatible server on loopback: storage options for it."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield {"endpoint_url": f"http://{host}:{port}", "key": "k", "secret": "s"}
    server.stop()


@pytest.mark.parametrize("cache_gib", [None, 1])
def test_shards_on_s3(tmp_path, s3, pairs, cache_gib):
    import s3fs

    fs = s3fs.S3FileSystem(**s3)
    bucket = f"bucket-{cache_gib}".lower()
    fs.mkdir(bucket)
    write_shards(pairs(6), tmp_path / "out", samples_per_shard=3)
    fs.put(str(tmp_path / "out"), f"{bucket}/out", recursive=True)
    source = ShardSource(f"s3://{bucket}/out", cache_gib=cache_gib, storage_options=s3)
    assert list(source) == pairs(6)
    assert source.problems == []
    assert list(pickle.loads(pickle.dumps(source))) == pairs(6)  # as processes of a build get it
    command = ["data", "validate", f"s3://{bucket}/out", "--kind", "webdataset", "--workers", "1"]
    assert main([*command, "--option", f"storage_options={json.dumps(s3)}"]) == 0
    built = ["data", "build", f"s3://{bucket}/out", str(tmp_path / "built"), "--kind", "webdataset"]
    assert main([*built, "--workers", "1", "--option", f"storage_options={json.dumps(s3)}"]) == 0
    assert [(s.text, s.images) for s in ShardSource(tmp_path / "built")] == [
        (s.text, s.images) for s in pairs(6)
    ]
    short = fs.cat(f"{bucket}/out/shard-000001.tar")[:3000]
    fs.pipe(f"{bucket}/out/shard-000001.tar", short)
    cut = ShardSource(f"s3://{bucket}/out", cache_gib=cache_gib, storage_options=s3)
    assert cut[3].key == "s0003"
    with pytest.raises(BadSample, match="truncated shard"):
        cut[5]
    fs.rm(f"{bucket}/out/shard-000001.tar")
    fs.invalidate_cache()
    gone = ShardSource(f"s3://{bucket}/out", cache_gib=cache_gib, storage_options=s3)
    assert gone.problems == ["out/shard-000001.tar: missing shard: 3 samples"]
    assert [gone[i].key for i in range(3)] == ["s0000", "s0001", "s0002"]
