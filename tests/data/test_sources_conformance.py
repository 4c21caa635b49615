"""Our own datasets keep what `hovle plugin test` asks of anyone's."""

import io
import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from hovle_core.testing.conformance import DatasetTests
from hovle_data.schema import Sample
from hovle_data.shards import write_shards

TURNS = [{"from": "human", "value": "<image>\nwhat is this?"}, {"from": "gpt", "value": "a red square"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The same four pictures in every form."""
    folder = tmp_path_factory.mktemp("sources")
    (folder / "pictures").mkdir()
    samples, rows = [], []
    for n, colour in enumerate(("red", "green", "blue", "white")):
        out = io.BytesIO()
        Image.new("RGB", (20, 20), colour).save(out, "PNG")
        (folder / "pictures" / f"{n}.png").write_bytes(out.getvalue())
        (folder / "pictures" / f"{n}.txt").write_text(f"a {colour} square")
        samples.append(Sample(f"s{n}", images=(out.getvalue(),), text=f"a {colour} square"))
        rows.append({"id": n, "image": f"{n}.png", "conversations": TURNS})
    write_shards(samples, folder / "shards", samples_per_shard=3)
    (folder / "llava.json").write_text(json.dumps(rows))
    (folder / "prose.txt").write_text("one\n\ntwo\nstill two\n\nthree\n")
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    columns = {"image": [sample.images[0] for sample in samples], "text": [sample.text for sample in samples]}
    pq.write_table(pa.table(columns), folder / "table.parquet", row_group_size=3)
    datasets.Dataset.from_dict(columns).save_to_disk(folder / "saved")
    return folder


def suite(kind: str, path: str, **options: str) -> type[DatasetTests]:
    class Tests(DatasetTests):
        name = kind

        @pytest.fixture(scope="class")
        @classmethod
        def arguments(cls, folder):
            return {
                "path": str(folder / path),
                **{key: str(folder / value) for key, value in options.items()},
            }

    return Tests


class TestShards(suite("webdataset", "shards")): ...


class TestImages(suite("images", "pictures")): ...


class TestText(suite("text", "prose.txt")): ...


class TestLlava(suite("llava", "llava.json", root="pictures")): ...


class TestParquet(suite("parquet", "table.parquet")): ...


class TestDatasets(suite("datasets", "saved")): ...


class TestInternVLRows(suite("internvl", "rows.jsonl", root="pictures")): ...


# --- the suite notices ------------------------------------------------------------------------------------------


class Source(list):
    def __getitem__(self, i):
        return super().__getitem__(i)


class Endless(Source):
    def __getitem__(self, i):
        return super().__getitem__(i % len(self))


class Running(Source):
    """Reads on from wherever it is, whatever it is asked for."""

    place = -1

    def __getitem__(self, i):
        self.place = (self.place + 1) % len(self)
        return super().__getitem__(self.place)


def texts(*keys: str) -> list[Sample]:
    return [Sample(key, text=f"text {key}") for key in keys]


@pytest.mark.parametrize(
    ("source", "test", "message"),
    [
        (Source(), "test_holds_samples", "the source is empty"),
        (Source([{"key": "a"}]), "test_holds_samples", "sample 0 is a dict without"),
        (Source(texts("a", "b", "a")), "test_keys_are_unique", r"several samples: \['a'\]"),
        (Endless(texts("a")), "test_ends_where_it_says", "instead of IndexError"),
        (Running(texts("a", "b", "c")), "test_threads_read_the_same", "come out differently"),
        (Source([Sample("a", images=("a.png",))]), "test_pictures_can_be_decoded", "is str, not file bytes"),
    ],
)
def test_a_source_that_breaks_a_promise_is_told(source, test, message) -> None:
    run = getattr(DatasetTests(), test)
    run(Source(texts("a", "b")))
    with pytest.raises(AssertionError, match=message):
        run(source)
