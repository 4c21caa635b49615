"""hovle-data as a plugin: its dataset and its command."""

import argparse

import pytest

from hovle_data import plugin
from hovle_data.schema import Sample
from hovle_data.shards import ShardSource, write_shards


def run(*argv):
    parser = argparse.ArgumentParser()
    plugin.hovle_commands(parser.add_subparsers())
    args = parser.parse_args(argv)
    return args.run(args)


def test_dataset_spec_builds_the_reader(tmp_path, texts):
    spec = plugin.hovle_datasets()[0]
    assert spec.name == "webdataset"
    assert spec.load() is ShardSource
    write_shards(texts(3), tmp_path / "out")
    assert len(spec.load()(path=str(tmp_path / "out"))) == 3


def test_inspect(tmp_path, pairs, capsys):
    talk = (
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
        {"role": "assistant", "content": "yo"},
    )
    write_shards([*pairs(5), Sample("talk", messages=talk)], tmp_path / "out", samples_per_shard=4)
    assert run("data", "inspect", str(tmp_path / "out"), "--first", "6") == 0
    out = capsys.readouterr().out
    assert "6 samples in 2 shards" in out
    assert "conversation 1, pair 5" in out
    assert "s0001: pair, 1 images: 1 1" in out
    assert "talk: conversation, 0 images: user: hi | assistant: yo" in out


def test_inspect_names_damage(tmp_path, pairs, capsys):
    write_shards(pairs(4), tmp_path / "out", samples_per_shard=2)
    (tmp_path / "out" / "shard-000000.tar").unlink()
    assert run("data", "inspect", str(tmp_path / "out")) == 1
    out = capsys.readouterr().out
    assert "PROBLEM out/shard-000000.tar: missing shard: 2 samples" in out
    assert "2 bad samples: 2x missing shard" in out


def test_inspect_of_nothing(tmp_path):
    with pytest.raises(FileNotFoundError):
        run("data", "inspect", str(tmp_path / "none"))
    with pytest.raises(ValueError, match="cannot guess what it holds"):
        run("data", "inspect", str(tmp_path))


def test_public_names_resolve():
    import hovle_data

    assert all(getattr(hovle_data, name) is not None for name in hovle_data.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = hovle_data.Nothing
