"""`train.storage_path`: a run whose machine is gone goes on elsewhere, and what is torn there is passed over."""

import shutil

import fsspec
import pytest
import torch
from safetensors.torch import load_file

from hovle_train import checkpoint
from hovle_train.loop import Trainer
from hovle_train.metrics import read_metrics
from hovle_train.runtime import Runtime
from hovle_train.storage import RemoteRun


@pytest.fixture(params=["memory", "file", "s3"])
def store(request, tmp_path, monkeypatch):
    """(URL, its file system, its root)."""
    if request.param == "memory":
        url = "memory://bucket/run"
    elif request.param == "file":
        url = str(tmp_path / "mounted" / "run")
    else:
        url = request.getfixturevalue("s3_bucket") + "/run"
    fs, root = fsspec.core.url_to_fs(url)
    yield url, fs, root
    if fs.exists(root):
        fs.rm(root, recursive=True)


@pytest.fixture
def s3_bucket(monkeypatch):
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    s3fs.S3FileSystem(endpoint_url=f"http://{host}:{port}").mkdir("bucket")
    yield "s3://bucket"
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


def test_a_run_goes_on_where_nothing_but_the_store_is_left(make_recipe, plugins, tmp_path, store, caplog):
    url, fs, root = store
    whole = make_recipe("alignment", run_dir=str(tmp_path / "whole"))
    Trainer(whole, plugins, Runtime()).run()
    train = {"storage_path": url, "checkpoint_every": 1, "keep_checkpoints": 2}
    recipe = make_recipe("alignment", run_dir=str(tmp_path / "moved"), train=train)
    trainer = Trainer(recipe, plugins, Runtime())
    inner = trainer.step
    trainer.step = lambda step, batches: inner(step, batches) if step < 4 else 1 / 0
    with pytest.raises(ZeroDivisionError):
        trainer.run()
    kept = sorted(name.rstrip("/").rsplit("/", 1)[-1] for name in fs.ls(f"{root}/checkpoints", detail=False))
    assert kept == ["step-00000002", "step-00000003"]

    shutil.rmtree(recipe.path)
    torn = f"{root}/checkpoints/step-00000003/{checkpoint.MODEL}"
    content = bytearray(fs.cat_file(torn))
    content[-1] ^= 1
    fs.pipe_file(torn, bytes(content))
    recipe.path.mkdir()
    RemoteRun(url).pull(recipe.path)
    assert "step-00000003 is damaged" in caplog.text
    assert [path.name for path in (recipe.path / "checkpoints").iterdir()] == ["step-00000002"]

    Trainer(recipe, plugins, Runtime()).run()
    first, second = (load_file(run.path / "final" / "model.safetensors") for run in (whole, recipe))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert [line["loss"] for line in read_metrics(recipe.path / "metrics.jsonl")] == [
        line["loss"] for line in read_metrics(whole.path / "metrics.jsonl")
    ]
    assert (
        fs.cat_file(f"{root}/final/model.safetensors")
        == (recipe.path / "final/model.safetensors").read_bytes()
    )
    assert not fs.exists(f"{root}/checkpoints")


def test_a_store_that_fsspec_does_not_know_is_refused():
    with pytest.raises(ValueError, match="train.storage_path 'nowhere://x'"):
        RemoteRun("nowhere://x")
