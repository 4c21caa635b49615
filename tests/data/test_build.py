"""Builds: what is written, the same whoever writes it, and killed ones that end as if nothing had happened."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from hovle_core.cli import main
from hovle_core.plugins import load_plugins
from hovle_data import build as building
from hovle_data.build import build, plan
from hovle_data.quarantine import TooManyBadSamples
from hovle_data.shards import ShardSource
from hovle_data.spec import BuildSpec, SourceSpec, load_spec, open_sources


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def data(tmp_path, png):
    """A folder of pairs and a JSONL of conversations, two of them bad."""
    pictures = tmp_path / "pairs"
    pictures.mkdir()
    for i in range(23):
        (pictures / f"{i:02d}.png").write_bytes(png(i))
        (pictures / f"{i:02d}.txt").write_text(f"caption {i}")
    talk = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "That."}]
    rows = [{"id": f"r{i}", "image": f"{i:02d}.png", "conversations": talk} for i in range(17)]
    rows[4]["image"] = "../gone.png"
    rows[9]["conversations"] = [talk[0], {"from": "gpt", "value": " "}]
    (tmp_path / "talk.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = tmp_path / "spec.yaml"
    spec.write_text(
        "sources:\n- {path: pairs, name: images}\n- {path: talk.jsonl, name: llava, options: {root: pairs}}\n"
        "samples_per_shard: 5\nmax_bad_share: 0.1\n"
    )
    return spec


@pytest.fixture
def registry():
    return load_plugins().registry


def test_what_is_written(data, tmp_path, png, registry):
    spec = load_spec(data)
    index = build(spec, open_sources(spec, registry), tmp_path / "out")
    assert [shard.name for shard in index.shards] == [
        *(f"pairs-{i:06d}.tar" for i in range(5)), *(f"talk-{i:06d}.tar" for i in range(4)),
    ]  # fmt: skip
    source = ShardSource(tmp_path / "out")
    assert source.problems == []
    assert len(source) == 23 + 15 == index.num_samples
    assert source[7].images == (png(7),)
    assert (source[7].key, source[7].text, source[7].meta) == (
        "pairs-00000007", "caption 7", {"id": "07.png", "from": "07.png"},
    )  # fmt: skip
    ids = [source[i].meta["id"] for i in range(23, 38)]
    assert ids == [f"r{i}" for i in range(17) if i not in (4, 9)]
    assert source[23].meta["from"] == "talk.jsonl:1"
    ledger = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    assert [(bad["shard"].rpartition("/")[2], bad["reason"].partition(":")[0]) for bad in ledger] == [
        ("talk.jsonl:5", "missing image"), ("talk.jsonl:10", "empty answer"),
    ]  # fmt: skip
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "pairs", "spec.yaml", "talk.jsonl"]
    with pytest.raises(ValueError, match="exists; remove it"):
        build(spec, open_sources(spec, registry), tmp_path / "out")


def test_the_number_of_workers_changes_nothing(data, tmp_path, registry):
    spec = load_spec(data)
    build(spec, open_sources(spec, registry), tmp_path / "one", workers=1)
    build(spec, open_sources(spec, registry), tmp_path / "two", workers=2)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


SLOW_BUILD = """
import sys, time
from pathlib import Path
from hovle_core.plugins import load_plugins
from hovle_data import build as building
from hovle_data.spec import load_spec, open_sources

spec = load_spec(sys.argv[1])
write = building.build_shard
def slowly(job, task):
    done = write(job, task)
    time.sleep(0.3)
    return done
building.build_shard = slowly
building.build(spec, open_sources(spec, load_plugins().registry), Path(sys.argv[2]))
"""


def kill_in_the_middle(command: list[str], folder: Path, markers: int) -> None:
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(list(folder.glob(".work/*.tar.json"))) < markers:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_killed_and_started_again_is_the_same_byte_for_byte(data, tmp_path, registry):
    spec = load_spec(data)
    build(spec, open_sources(spec, registry), tmp_path / "whole")
    out, begun = tmp_path / "out", tmp_path / "out.building"
    kill_in_the_middle([sys.executable, "-c", SLOW_BUILD, str(data), str(out)], begun, markers=3)
    assert not out.exists()
    first = begun / "pairs-000000.tar"
    untouched = first.stat().st_mtime_ns
    (begun / "talk-000000.99.tmp").write_bytes(b"what a killed worker was writing")
    with first.open("r+b") as file:
        half = begun / "pairs-000001.tar"
        os.truncate(half, half.stat().st_size // 2)  # as after a crash of the machine
        assert file.read(1)
    build(spec, open_sources(spec, registry), out)
    assert (out / "pairs-000000.tar").stat().st_mtime_ns == untouched  # taken up, not written again
    assert tree(out) == tree(tmp_path / "whole")


def test_workers_do_not_outlive_a_killed_build(data, tmp_path):
    import psutil

    spec = tmp_path / "long.yaml"
    spec.write_text("sources:\n- {path: pairs, name: images}\nsamples_per_shard: 1\n")
    command = [
        sys.executable,
        "-m",
        "hovle_core.cli",
        "data",
        "build",
        str(spec),
        str(tmp_path / "out"),
        "--workers",
        "2",
    ]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (children := psutil.Process(process.pid).children(recursive=True)):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(children, timeout=30)
    assert not alive
    assert main(["data", "build", str(spec), str(tmp_path / "out"), "--workers", "1"]) == 0
    assert len(ShardSource(tmp_path / "out")) == 23


def test_other_data_is_not_mixed_into_a_build_that_began(data, tmp_path, registry, monkeypatch):
    spec = load_spec(data)

    def stop(job, task):
        if task.name == "talk-000000.tar":
            raise KeyboardInterrupt
        return write(job, task)

    write = building.build_shard
    monkeypatch.setattr(building, "build_shard", stop)
    with pytest.raises(KeyboardInterrupt):
        build(spec, open_sources(spec, registry), tmp_path / "out")
    monkeypatch.undo()
    spec.samples_per_shard = 4
    with pytest.raises(ValueError, match="begun from other data or settings; --restart"):
        build(spec, open_sources(spec, registry), tmp_path / "out")
    build(spec, open_sources(spec, registry), tmp_path / "out", restart=True)
    build(spec, open_sources(spec, registry), tmp_path / "fresh")
    assert tree(tmp_path / "out") == tree(tmp_path / "fresh")


def test_too_many_bad_samples_stop_it_and_mended_ones_are_taken_up(data, tmp_path, png, registry):
    spec = load_spec(data)
    spec.max_bad_share = 0.0
    with pytest.raises(
        TooManyBadSamples, match="1 bad samples so far.*1x missing image.*hovle data validate"
    ):
        build(spec, open_sources(spec, registry), tmp_path / "out")
    (tmp_path / "gone.png").write_bytes(png(4))
    spec.max_bad_share = 0.05
    build(spec, open_sources(spec, registry), tmp_path / "out")
    build(spec, open_sources(spec, registry), tmp_path / "fresh")
    assert len(ShardSource(tmp_path / "out")) == 23 + 16
    assert tree(tmp_path / "out") == tree(tmp_path / "fresh")


@pytest.mark.parametrize("by_meta_file", [True, False])
def test_rows_that_changed_meanwhile_are_built_anew(tmp_path, registry, by_meta_file):
    """Mended, as the message advises, and changed elsewhere at the same time: nothing old may stay."""

    def rows(answer, mended):
        found = [
            {"conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": f"{answer} {i}"}]}
            for i in range(6)
        ]
        if not mended:
            found[4]["conversations"][1]["value"] = ""
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))

    (tmp_path / "meta.json").write_text(json.dumps({"rows": {"annotation": "rows.jsonl"}}))
    path = tmp_path / ("meta.json" if by_meta_file else "rows.jsonl")
    spec = BuildSpec.model_validate(
        {"sources": [{"name": "internvl", "path": str(path)}], "samples_per_shard": 2, "max_bad_share": 0.0}
    )
    rows("old", mended=False)
    with pytest.raises(TooManyBadSamples, match="start again"):
        build(spec, open_sources(spec, registry), tmp_path / "out")
    rows("new", mended=True)
    build(spec, open_sources(spec, registry), tmp_path / "out")
    answers = [sample.messages[1]["content"] for sample in ShardSource(tmp_path / "out")]
    assert answers == [f"new {i}" for i in range(6)]


def test_a_bad_row_that_is_repeated_is_named_once(tmp_path, registry):
    rows = [{"text": "good"}, {"text": ""}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "meta.json").write_text(json.dumps({"rows": {"annotation": "rows.jsonl", "repeat_time": 3}}))
    source = {"name": "internvl", "path": str(tmp_path / "meta.json")}
    spec = BuildSpec.model_validate({"sources": [source], "max_bad_share": 1.0})
    build(spec, open_sources(spec, registry), tmp_path / "out")
    (line,) = (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()
    assert json.loads(line)["reason"] == "empty text"
    assert len(ShardSource(tmp_path / "out")) == 3


def test_nothing_usable(tmp_path, registry):
    (tmp_path / "t.jsonl").write_text('{"text": " "}\n')
    spec = BuildSpec(sources=[SourceSpec(path=str(tmp_path / "t.jsonl"), name="text")], max_bad_share=1)
    with pytest.raises(ValueError, match="no sample .* is usable: 1x empty text"):
        build(spec, open_sources(spec, registry), tmp_path / "out")


def test_only_one_build_at_a_time(data, tmp_path, registry):
    spec = load_spec(data)
    with (
        building._locked(tmp_path / "out.building"),
        pytest.raises(ValueError, match="another build is writing"),
    ):
        build(spec, open_sources(spec, registry), tmp_path / "out")
    build(spec, open_sources(spec, registry), tmp_path / "out")


class Faulty:
    name = "faulty"

    def __len__(self):
        return 2

    def __getitem__(self, i):
        raise KeyError("column")


def test_a_fault_of_a_source_names_the_sample(tmp_path):
    spec = BuildSpec(sources=[SourceSpec(path="x", name="faulty")])
    with pytest.raises(ValueError, match="faulty: sample 0: the source failed: KeyError: 'column'"):
        build(spec, [Faulty()], tmp_path / "out")


@pytest.mark.parametrize("fast", [False, True])
def test_tokens_and_tiles_are_counted_with_a_processor(tmp_path, encode_image_file, registry, fast):
    from PIL import Image

    from hovle_core.testing import tiny_processor

    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, size in enumerate(((56, 56), (112, 56), (112, 112))):
        (folder / f"{i}.png").write_bytes(encode_image_file(Image.new("RGB", size)))
        (folder / f"{i}.txt").write_text("a red square")
    processor = tiny_processor()
    processor.image_processor.fast = fast
    processor.save_pretrained(tmp_path / "processor")
    assert main(
        ["data", "build", str(folder), str(tmp_path / "out"), "--processor", str(tmp_path / "processor"),
         "--workers", "1", "--samples-per-shard", "2"]
    ) == 0  # fmt: skip
    source = ShardSource(tmp_path / "out")
    tiles = [1, 3, 5]  # and the thumbnail
    assert source.counts("tiles").tolist() == tiles
    encoded = [
        processor.encode_pair(Image.new("RGB", size), "a red square")
        for size in ((56, 56), (112, 56), (112, 112))
    ]
    assert source.counts("tokens").tolist() == [len(e.input_ids) for e in encoded]
    content = json.loads((tmp_path / "out" / "index.json").read_text())
    assert (content["tiles"], content["shards"][0]["tiles"]) == (9, 4)
    assert (tmp_path / "out" / "shard").exists() is False


def test_the_command(data, tmp_path, capsys):
    assert main(["data", "build", str(data), str(tmp_path / "out"), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "9 shards of 40 samples" in out
    assert "talk (llava" in out
    assert "missing image" in out
    assert not list(tmp_path.glob("out*"))
    assert main(["data", "build", str(data), str(tmp_path / "out"), "--workers", "1"]) == 0
    printed = capsys.readouterr()
    assert "2 of 40 samples were left out" in printed.out
    assert re.search(r"building out .*40/40", printed.err)  # the progress bar
    assert main(["data", "validate", str(tmp_path / "out"), "--workers", "1"]) == 0  # what is built is sound
    bad = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    assert [sorted(entry) for entry in bad] == [["key", "reason", "shard"]] * 2  # as a run writes it
    assert main(["data", "build", str(tmp_path / "nowhere"), "x"]) == 2
    assert main(["data", "build", str(data), "x", "--option", "a=b"]) == 2
    assert "go into" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["tars", *(["pictures"] if sys.platform != "darwin" else [])])
def test_names_that_are_no_utf8_are_built_and_shown(tmp_path, png, kind, monkeypatch):
    """As disks of other decades have them, where the output takes UTF-8 alone."""
    folder = tmp_path / kind
    folder.mkdir()
    if kind == "tars":
        with tarfile.open(folder / "s.tar", "w", format=tarfile.USTAR_FORMAT, encoding="latin-1") as tar:
            for name, content in (("café.png", png(1)), ("café.txt", b"a cup"), ("thé.png", b"cut")):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    else:
        for name, content in ((b"caf\xe9.png", png(1)), (b"caf\xe9.txt", b"a cup"), (b"th\xe9.png", b"cut")):
            Path(os.fsdecode(os.fsencode(folder) + b"/" + name)).write_bytes(content)
    out = tmp_path / "out"

    def hovle(*arguments):
        written = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "utf-8", errors="strict"))
        code = main(["data", *map(str, arguments)])
        return code, written.getvalue().decode()

    code, said = hovle("validate", folder, "--workers", 1)
    assert (code, "not a known image format" in said) == (1, True), said
    code, said = hovle("build", folder, out, "--workers", 1, "--max-bad-share", 1)
    assert (code, "1 of 2 samples were left out" in said) == (0, True), said
    code, said = hovle("inspect", out, "--html", tmp_path / "sheet.html")
    assert code == 0, said
    (built,) = ShardSource(out)
    assert (built.kind, built.text) == ("pair", "a cup")
    assert built.meta["id"].startswith("caf\\udce9")


def test_the_command_refuses_what_would_do_something_else(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("t.txt").write_text("one")
    Path("folder").mkdir()
    for arguments, message in (
        (["build", "t.txt", "s3://bucket/out"], "s3://bucket/out is a URL; build into a folder here"),
        (["build", "t.txt", "out", "--max-bad-share", "7"], "max_bad_share"),
        (["inspect", "t.txt", "--html", "folder"], "Is a directory"),
    ):
        assert main(["data", *arguments]) == 2
        assert message in capsys.readouterr().err
    for option in ("--workers", "--samples-per-shard"):
        with pytest.raises(SystemExit):
            main(["data", "build", "t.txt", "out", option, "0"])
        assert f"argument {option}: 0 must be at least 1" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir() if path.name not in ("t.txt", "folder")] == []


def test_plan_is_sorted_by_name(data, registry):
    spec = load_spec(data)
    tasks = plan(open_sources(spec, registry), 5)
    assert [task.name for task in tasks] == sorted(task.name for task in tasks)
    assert sum(task.stop - task.start for task in tasks) == 40
