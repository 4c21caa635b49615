"""The commands of docs/data.md, run as they stand there on small files of those names."""

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

from hovle_core.cli import main
from hovle_data.shards import ShardSource, write_shards

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
TALK = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "That."}]


@pytest.fixture
def files(tmp_path, monkeypatch, png, pairs):
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    from hovle_core.testing import tiny_processor

    monkeypatch.chdir(tmp_path)
    Path("pictures").mkdir()
    Path("pictures/a.png").write_bytes(png(1))
    Path("pictures/a.txt").write_text("a stamp")
    row = {"id": 1, "image": "a.png", "conversations": TALK}
    Path("rows.jsonl").write_text(json.dumps(row) + "\n")
    Path("meta.json").write_text(
        json.dumps({"s": {"root": "pictures", "annotation": "rows.jsonl", "repeat_time": 2}})
    )
    Path("llava.json").write_text(json.dumps([row]))
    Path("prose.txt").write_text("One.\n\nTwo.\n")
    pq.write_table(pa.table({"image": [png(2)], "caption": ["two"]}), "table.parquet")
    datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": ["a", "b"]})}).save_to_disk("saved")
    write_shards(pairs(3), tmp_path / "tars")
    tiny_processor().save_pretrained("checkpoint")
    Path("my.yaml").write_text(re.search(r"```yaml\n(.*?)```", PAGE, re.S)[1])
    return tmp_path


def test_every_command_runs(files):
    commands = re.findall(r"`(hovle data [^`]+)`", PAGE.split("## What a build promises")[0])
    commands += [line.split("#")[0] for line in re.search(r"```bash\n(.*?)```", PAGE, re.S)[1].splitlines()]
    local = [command for command in commands if "s3://" not in command and len(command.split()) > 3]
    assert len(local) == 7 + 3
    for command in local:
        assert (
            main([*shlex.split(command)[1:], *(["--workers", "1"] if "inspect" not in command else [])]) == 0
        ), command
    built = {folder.name: len(ShardSource(folder)) for folder in sorted(files.glob("out-*"))}
    assert built == {
        "out-datasets": 2, "out-internvl": 2, "out-llava": 1, "out-parquet": 1, "out-pictures": 1, "out-tars": 3,
        "out-text": 2,
    }  # fmt: skip
    assert len(ShardSource(files / "shards")) == 3
    assert (files / "sheet.html").stat().st_size > 1000


def test_the_worked_figures_follow_from_the_measured_ones():
    cells = {row[0].strip(): [cell.strip() for cell in row[1:]] for row in (
        line.strip("|").split("|") for line in PAGE.splitlines() if line.startswith("|"))}  # fmt: skip
    samples = [500e6, 50e6, 7e6]
    rates = [n / s for n, s in zip(samples, (7 * 86400, 86400, 43200), strict=True)]

    def numbers(name: str) -> list[float]:
        return [float(re.match(r"[\d,.]+", cell)[0].replace(",", "")) for cell in cells[name]]

    assert numbers("storage, n·b") == pytest.approx([n * 106e3 / 1e12 for n in samples], rel=0.01)
    assert numbers("index, 71·n") == pytest.approx([n * 71 / 1e9 for n in samples], rel=0.05)
    assert numbers("core hours to build, n / 169 / 3600") == pytest.approx(
        [n / 169 / 3600 for n in samples], rel=0.02
    )
    assert numbers("samples/s") == pytest.approx(rates, rel=0.01)
    assert numbers("bandwidth, samples/s · b") == pytest.approx([r * 106e3 / 1e6 for r in rates], rel=0.02)
    assert numbers("cores that prepare it, samples/s / c") == pytest.approx([r / 20 for r in rates], abs=0.5)
    total = sum(samples)
    assert round(total * 106e3 / 1e12) == 59
    assert "$1,360" in cells["storage, 59 TB"][0]
    assert round(total * 106e3 / 1e9 * 0.023, -1) == 1360
    assert yaml.safe_load(re.search(r"```yaml\n(.*?)```", PAGE, re.S)[1])["samples_per_shard"] == 1000
