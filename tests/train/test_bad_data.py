"""What a run says of data it could not use, or not whole."""

import io
import json
import tarfile

import pytest
from safetensors.torch import load_file

from hovle_data.quarantine import TooManyBadSamples
from hovle_data.schema import Sample
from hovle_data.shards import write_shards
from hovle_train.loop import Trainer
from hovle_train.metrics import read_metrics
from hovle_train.runtime import Runtime


@pytest.fixture
def holed(tmp_path):
    """Forty texts in two shards; of the first, two cannot be read."""
    write_shards(
        (Sample(f"t{n:02d}", text=f"a red thing, number {n}") for n in range(20)), tmp_path / "holed"
    )
    with tarfile.open(tmp_path / "holed" / "more.tar", "w") as tar:
        for n in range(20):
            info = tarfile.TarInfo(f"m{n:02d}.txt")
            content = b"\xff" if n in (3, 7) else b"a blue thing, number %d" % n
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return str(tmp_path / "holed")


def test_bad_samples_are_in_the_runs_ledger_and_metrics(make_recipe, plugins, holed):
    data = {"sources": [{"path": holed}], "max_quarantine_share": 0.1}
    recipe = make_recipe("language_modeling", data=data)
    Trainer(recipe, plugins, Runtime()).run()
    named = [json.loads(line) for line in (recipe.path / "quarantine.jsonl").read_text().splitlines()]
    assert [(line["shard"], line["key"]) for line in named] == [("holed/more.tar", k) for k in ("m03", "m07")]
    assert all(line["reason"].startswith("txt is not UTF-8: ") for line in named)
    assert read_metrics(recipe.path / "metrics.jsonl")[-1]["quarantined"] in (
        2,
        3,
        4,
    )  # 48 draws, and those ahead


def test_more_than_the_share_ends_the_run_and_leaves_the_ledger(make_recipe, plugins, holed):
    recipe = make_recipe("language_modeling", data={"sources": [{"path": holed}]}, train={"steps": 50})
    with pytest.raises(TooManyBadSamples, match="more than max_share=0.01: 3x txt is not UTF-8"):
        Trainer(recipe, plugins, Runtime()).run()
    assert len((recipe.path / "quarantine.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("long_samples", ["refuse", "truncate"])
def test_long_conversations_by_setting(make_recipe, plugins, tmp_path, long_samples):
    turn = ({"role": "user", "content": "what colour is this?"}, {"role": "assistant", "content": "red"})
    write_shards(
        [Sample(f"c{n}", messages=turn * (60 if n == 0 else 1)) for n in range(8)], tmp_path / "chats"
    )
    data = {
        "sources": [{"path": str(tmp_path / "chats")}],
        "long_samples": long_samples,
        "max_quarantine_share": 1,
    }
    recipe = make_recipe("instruction_tuning", data=data, train={"steps": 2, "micro_batch_tokens": 256})
    Trainer(recipe, plugins, Runtime()).run()
    last = read_metrics(recipe.path / "metrics.jsonl")[-1]
    assert (last["quarantined"], last["truncated"]) == ((2, 0) if long_samples == "refuse" else (0, 2))
    assert load_file(recipe.path / "final" / "model.safetensors")
