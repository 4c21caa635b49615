"""Parquet and saved Hugging Face datasets: pictures as bytes, structs, names and lists; columns by any name."""

import json
import pickle
import sys

import pytest

from hovle_core.cli import main
from hovle_data.schema import BadSample
from hovle_data.shards import ShardSource
from hovle_data.sources.tables import DatasetsSource, ParquetSource
from hovle_data.storage import FileCache, cache_folder

TALK = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "That."}]


def write_parquet(path, columns, **kwargs):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table(columns), path, **kwargs)


def test_parquet(tmp_path, png):
    (tmp_path / "b.png").write_bytes(png(9))
    folder = tmp_path / "tables"
    folder.mkdir()
    write_parquet(
        folder / "0.parquet",
        {"image": [{"bytes": png(i), "path": None} for i in range(5)], "text": [f"t{i}" for i in range(5)]},
        row_group_size=2,
    )
    write_parquet(folder / "1.parquet", {"image": [{"bytes": png(7), "path": "x"}], "text": ["t7"]})
    source = ParquetSource(folder)
    assert [(source[i].images[0], source[i].text) for i in (5, 0, 4)] == [
        (png(7), "t7"), (png(0), "t0"), (png(4), "t4"),
    ]  # fmt: skip
    assert source.where(4) == f"{folder}/0.parquet:row 4"
    assert pickle.loads(pickle.dumps(source))[3].text == "t3"
    write_parquet(
        tmp_path / "talk.parquet",
        {
            "pic": [["b.png"], ["gone.png"], []],
            "talk": [json.dumps(TALK), json.dumps(TALK), "{"],
            "n": [1, 2, 3],
        },
    )
    talk = ParquetSource(
        tmp_path / "talk.parquet", columns={"images": "pic", "conversations": "talk", "id": "n"}
    )
    assert (talk[0].images, talk[0].meta, talk[0].validate().kind) == ((png(9),), {"id": "1"}, "conversation")
    for i, reason in ((1, "missing image"), (2, "bad json")):
        with pytest.raises(BadSample) as caught:
            talk[i]
        assert (caught.value.category, caught.value.source) == (reason, f"{tmp_path}/talk.parquet:row {i}")
    with pytest.raises(ValueError, match="say which columns"):
        ParquetSource(_odd(tmp_path))
    with pytest.raises(ValueError, match=r"columns=\{'text': 'no'\}"):
        ParquetSource(_odd(tmp_path), columns={"text": "no"})


def _odd(tmp_path):
    write_parquet(tmp_path / "odd.parquet", {"number": [1]})
    return tmp_path / "odd.parquet"


@pytest.mark.parametrize("cell", [lambda p: p, lambda p: {"bytes": p, "path": None}, lambda p: [p]])
def test_a_column_of_pictures_that_nobody_reads_is_refused(tmp_path, png, cell):
    write_parquet(tmp_path / "t.parquet", {"jpg": [cell(png(1))], "caption": ["one"]})
    with pytest.raises(
        ValueError, match=r"column 'jpg' holds bytes .* columns={'caption': 'caption', 'image': 'jpg'}"
    ):
        ParquetSource(tmp_path / "t.parquet")
    assert ParquetSource(tmp_path / "t.parquet", {"caption": "caption"})[0].images == ()
    source = ParquetSource(tmp_path / "t.parquet", {"caption": "caption", "image": "jpg"})
    assert source[0].images == (png(1),)


def test_parquet_builds(tmp_path, png):
    write_parquet(tmp_path / "p.parquet", {"image": [png(i) for i in range(6)], "caption": ["c"] * 6})
    assert main(["data", "build", str(tmp_path / "p.parquet"), str(tmp_path / "out"), "--workers", "1"]) == 0
    source = ShardSource(tmp_path / "out")
    assert (len(source), source[5].images, source[5].text) == (6, (png(5),), "c")


def test_datasets_on_disk(tmp_path, png):
    import datasets

    images = [{"bytes": png(i), "path": None} for i in range(4)]
    rows = {"image": images, "conversations": [TALK] * 4, "id": [*range(4)]}
    features = datasets.Features({
        "image": datasets.Image(), "id": datasets.Value("int64"),
        "conversations": datasets.List({"from": datasets.Value("string"), "value": datasets.Value("string")}),
    })  # fmt: skip
    table = datasets.Dataset.from_dict(rows, features=features)
    table.save_to_disk(tmp_path / "one")
    source = DatasetsSource(tmp_path / "one")
    assert source[2].images == (png(2),)  # the file's bytes: nothing is decoded and encoded again
    assert source[2].validate().kind == "conversation"
    assert pickle.loads(pickle.dumps(source))[3].meta == {"id": "3"}
    datasets.DatasetDict({"train": table}).save_to_disk(tmp_path / "many")
    with pytest.raises(ValueError, match="split=None .* give one of train"):
        DatasetsSource(tmp_path / "many")
    assert len(DatasetsSource(tmp_path / "many", split="train")) == 4
    assert main(["data", "validate", str(tmp_path / "one"), "--workers", "1"]) == 0
    with pytest.raises(ValueError, match="give a folder that Dataset.save_to_disk wrote"):
        DatasetsSource(tmp_path / "nowhere")


def test_tables_behind_a_url(tmp_path, png, monkeypatch):
    import datasets
    import fsspec

    monkeypatch.setenv("HOVLE_CACHE", str(tmp_path / "cache"))
    datasets.Dataset.from_dict({"text": ["a", "b"]}).save_to_disk(tmp_path / "saved")
    (tmp_path / "p").mkdir()
    write_parquet(tmp_path / "p" / "0.parquet", {"image": [png(1)], "caption": ["c"]})
    write_parquet(tmp_path / "p" / "1.parquet", {"image": [png(2)], "caption": ["d"]})
    memory = fsspec.filesystem("memory")
    try:
        memory.put(str(tmp_path / "saved"), "/tables/saved", recursive=True)
        memory.put(str(tmp_path / "p"), "/tables/p", recursive=True)
        assert [DatasetsSource("memory://tables/saved")[i].text for i in range(2)] == ["a", "b"]
        source = ParquetSource("memory://tables/p")
        FileCache(cache_folder() / "files", 0).clear()  # as when many files are more than the cache holds
        assert [(source[i].text, source[i].images[0]) for i in range(2)] == [("c", png(1)), ("d", png(2))]
        assert source.where(1) == "memory://tables/p/1.parquet:row 0"
    finally:
        memory.rm("/tables", recursive=True)


def test_a_damaged_parquet_file_is_named(tmp_path, png):
    (tmp_path / "no.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match="no.parquet is no Parquet file"):
        ParquetSource(tmp_path / "no.parquet")
    write_parquet(tmp_path / "cut.parquet", {"image": [png(i) for i in range(50)], "caption": ["c"] * 50})
    content = bytearray((tmp_path / "cut.parquet").read_bytes())
    content[4:400] = bytes(396)
    (tmp_path / "cut.parquet").write_bytes(content)
    with pytest.raises(BadSample, match="cut.parquet:row 0: 00000000: unreadable row group"):
        ParquetSource(tmp_path / "cut.parquet")[0]


@pytest.mark.parametrize(
    ("source", "module", "extra"),
    [(ParquetSource, "pyarrow.parquet", "parquet"), (DatasetsSource, "datasets", "datasets")],
)
def test_a_missing_extra_is_named(tmp_path, monkeypatch, source, module, extra):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=rf"pip install 'hovle-data\[{extra}\]'"):
        source(tmp_path)
