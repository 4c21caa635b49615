"""`train.storage_path`: a run whose machine is gone goes on elsewhere, and what is torn there is passed over."""

import json
import shutil

import fsspec
import pytest
import torch
from safetensors.torch import load_file

from hovle_train import checkpoint
from hovle_train.commands import train
from hovle_train.language_gate import LanguageLost
from hovle_train.loop import Trainer
from hovle_train.metrics import read_metrics
from hovle_train.runs import is_finished, read_summary
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
    s3fs.S3FileSystem(endpoint_url=f"http://{host}:{port}").makedirs("bucket", exist_ok=True)
    yield "s3://bucket"
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


BAD = {"shard": "shards/0.tar", "key": "p7", "reason": "no picture"}
BESIDE = {"ema": {"decay": 0.9, "export": "beside"}}


def find_a_bad_sample(trainer):
    """Have a run find a bad sample in its second step."""
    inner = trainer.step

    def step(number, batches):
        if number == 1:
            (trainer.recipe.path / "quarantine-rank0.jsonl").write_text(json.dumps(BAD) + "\n")
        return inner(number, batches)

    trainer.step = step


def never(*args):
    raise AssertionError("there is nothing to do")


def files_of(folder):
    """Content by name, but for what observers write."""
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if "tensorboard" not in name}


def test_a_run_goes_on_where_nothing_but_the_store_is_left(make_recipe, plugins, tmp_path, store, caplog):
    url, fs, root = store
    whole = make_recipe("alignment", run_dir=str(tmp_path / "whole"))
    Trainer(whole, plugins, Runtime()).run()
    train = {"storage_path": url, "checkpoint_every": 1, "keep_checkpoints": 2}
    recipe = make_recipe("alignment", run_dir=str(tmp_path / "moved"), train=train)
    trainer = Trainer(recipe, plugins, Runtime())
    find_a_bad_sample(trainer)
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
    RemoteRun(url).pull(recipe)
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
    assert json.loads(fs.cat_file(f"{root}/quarantine.jsonl")) == BAD, "named before the folder was lost"
    assert not fs.exists(f"{root}/quarantine-rank0.jsonl")


def test_a_finished_run_comes_back_and_is_not_trained_again(
    make_recipe, plugins, tmp_path, store, monkeypatch, caplog
):
    url, fs, root = store
    recipe = make_recipe("alignment", train={"steps": 2, "storage_path": url}, optim=BESIDE)
    trainer = Trainer(recipe, plugins, Runtime())
    find_a_bad_sample(trainer)
    trainer.run()
    written = files_of(recipe.path)
    assert "final_ema/model.safetensors" in written
    shutil.rmtree(recipe.path)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "prepare", never)
        Trainer(recipe, plugins, Runtime()).run()
        del written["quarantine-rank0.jsonl"]
        assert files_of(recipe.path) == written, "nor is anything else left"
        patch.setattr(RemoteRun, "_put", never)
        Trainer(recipe, plugins, Runtime()).run()  # whole here and there

    shutil.rmtree(recipe.path)
    other = make_recipe("alignment", train={"steps": 3, "storage_path": url}, optim=BESIDE)
    with pytest.raises(
        ValueError, match="run .* another recipe .*train.steps: 2, now 3.*copy in train.storage_path"
    ):
        Trainer(other, plugins, Runtime()).run()
    assert not is_finished(recipe.path)

    weights = fs.cat_file(f"{root}/final/model.safetensors")
    fs.pipe_file(f"{root}/final/model.safetensors", weights[:-1] + bytes([weights[-1] ^ 1]))
    RemoteRun(url).pull_final(recipe)
    assert "is damaged (final/model.safetensors): training again" in caplog.text
    assert not recipe.path.exists() or not list(recipe.path.iterdir())
    Trainer(recipe, plugins, Runtime()).run()
    assert fs.cat_file(f"{root}/final/model.safetensors") == weights, "and copied once more"


def test_a_final_that_did_not_get_there_is_copied_by_the_next_start(make_recipe, plugins, store, monkeypatch):
    """From where the worker or the command starts again; nothing of an earlier, larger final stays beside it."""
    url, fs, root = store
    recipe = make_recipe("alignment", train={"steps": 2, "storage_path": url})
    fs.makedirs(f"{root}/final", exist_ok=True)
    fs.pipe_file(f"{root}/final/model-00002-of-00002.safetensors", b"another run's")
    inner = RemoteRun._put

    def fail(self, file, target):
        if file.name == "model.safetensors" and file.parent.name == "final":
            raise ConnectionError("the store is gone")
        inner(self, file, target)

    starts = (lambda: Trainer(recipe, plugins, Runtime()).run(), lambda: train(recipe, local=True))
    for start in starts:
        if recipe.path.exists():  # the second time
            fs.rm(f"{root}/copied.json")
        with monkeypatch.context() as patch:
            patch.setattr(RemoteRun, "_put", fail)
            with pytest.raises(ConnectionError):
                Trainer(recipe, plugins, Runtime()).run()
        assert is_finished(recipe.path)
        assert not fs.exists(f"{root}/copied.json")
        start()
        there = {name.rsplit("/", 1)[-1] for name in fs.ls(f"{root}/final", detail=False)}
        assert there == {path.name for path in (recipe.path / "final").iterdir()}
        assert fs.cat_file(f"{root}/summary.json") == (recipe.path / "summary.json").read_bytes()
        assert not fs.exists(f"{root}/checkpoints")


def test_a_rejected_run_is_copied_when_it_is_accepted(make_recipe, plugins, world, tmp_path):
    """With its average, which does not lie where a finished run's does before that."""
    language = {"texts": {"things": {"path": str(world / "texts")}}, "num_texts": 4, "max_perplexity": 1.01}
    store = tmp_path / "store"
    recipe = make_recipe(
        "alignment", language=language, optim=BESIDE, train={"steps": 2, "storage_path": str(store)}
    )
    with pytest.raises(LanguageLost):
        train(recipe, local=True)
    assert not (recipe.path / "final_ema").exists()
    assert (recipe.path / "rejected" / "final_ema" / "model.safetensors").is_file()
    assert not list(recipe.path.glob(".final*"))
    assert not (store / "final").exists()
    recipe.language.max_perplexity = None
    train(recipe, local=True)
    assert not (recipe.path / "rejected").exists()
    assert not (recipe.path / "final" / "final_ema").exists()
    for name in ("final", "final_ema"):
        assert files_of(store / name) == files_of(recipe.path / name) != {}
    assert json.loads((store / "summary.json").read_text()) == read_summary(recipe.path)


def test_a_copy_of_another_recipe_is_not_taken_and_said_to_be_there(
    make_recipe, world, plugins, tmp_path, run_killed_after
):
    """Or deleting the run's folder, as advised, would bring it back for ever."""
    train = {"storage_path": str(tmp_path / "store")}
    data = {"sources": [{"path": str(tmp_path / "pairs")}]}
    shutil.copytree(world / "pairs", tmp_path / "pairs")
    run_killed_after(Trainer(make_recipe("alignment", train=train, data=data), plugins, Runtime()), 5)
    other = make_recipe("alignment", train=train, data=data, optim={"lr": 1e-3})
    shutil.rmtree(other.path)
    with pytest.raises(ValueError, match=r"optim.lr: .*That is the copy in train.storage_path"):
        Trainer(other, plugins, Runtime()).run()
    assert not list((other.path / "checkpoints").glob("*"))
    same = make_recipe("alignment", train=train, data=data)
    shutil.rmtree(tmp_path / "pairs")
    shutil.copytree(world / "chats", tmp_path / "pairs")
    with pytest.raises(ValueError, match="made from other data: .*That is the copy in train.storage_path"):
        Trainer(same, plugins, Runtime()).run()
    assert not list((same.path / "checkpoints").glob("*"))
    shutil.rmtree(tmp_path / "pairs")
    shutil.copytree(world / "pairs", tmp_path / "pairs")
    shutil.rmtree(tmp_path / "store")
    Trainer(other, plugins, Runtime()).run()


def test_a_copy_cannot_write_outside_of_the_run(make_recipe, tmp_path):
    store = tmp_path / "mounted"
    store.mkdir()
    (store / "copied.json").write_text(json.dumps({"summary.json": "x", "final/../../../taken": "x"}))
    with pytest.raises(ValueError, match="copied.json names 'final/../../../taken', outside of the run"):
        RemoteRun(str(store)).pull_final(make_recipe("alignment"))


def test_a_store_that_cannot_be_written_to_is_named_before_the_first_step(make_recipe, plugins, tmp_path):
    file = tmp_path / "file"
    file.touch()
    recipe = make_recipe("alignment", train={"storage_path": str(file)})
    with pytest.raises(ValueError, match=r"train.storage_path '.*file' cannot be written to"):
        Trainer(recipe, plugins, Runtime()).run()
    assert not (recipe.path / "metrics.jsonl").exists()


def test_a_store_that_fsspec_does_not_know_is_refused():
    with pytest.raises(ValueError, match="train.storage_path 'nowhere://x'"):
        RemoteRun("nowhere://x")
