"""Checkpoints by hub id, over HTTP: a hub on loopback that speaks as much of the API as a download needs."""

import hashlib
import json
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import torch
from huggingface_hub import constants

from hovle_core import HovleForConditionalGeneration, HovleProcessor
from hovle_core.cli import main
from hovle_core.testing import tiny_hovle, tiny_processor, tiny_tokenizer

TOKEN = "hf_letmein"
COMMITS = {"main": "a" * 40, "v1": "b" * 40}


class Handler(BaseHTTPRequestHandler):
    """`/api/models/<repo>/revision|tree/<revision>` and `/<repo>/resolve/<commit>/<path>` of folders on disk."""

    protocol_version = "HTTP/1.1"

    def __init__(self, hub, *args):
        self.hub = hub
        super().__init__(*args)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts[0] == "api":
            repo, what, revision = "/".join(parts[2:4]), parts[4], parts[5]
        else:
            repo, what, revision = "/".join(parts[:2]), parts[2], parts[3]
        if repo not in self.hub.repos:
            return self.send({}, 401, {"X-Error-Code": "RepoNotFound"})
        commit = COMMITS.get(revision, revision)
        if commit not in COMMITS.values():
            return self.send({}, 404, {"X-Error-Code": "RevisionNotFound"})
        folder = self.hub.repos[repo] / next(name for name, value in COMMITS.items() if value == commit)
        if what == "revision":
            return self.send({"id": repo, "sha": commit, "siblings": []})
        if what == "tree":
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            return self.send([
                {"type": "file", "path": str(path.relative_to(folder)), "size": path.stat().st_size, "oid": etag(path)}
                for path in files
            ])  # fmt: skip
        if repo.startswith("gated/") and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.send({}, 403, {"X-Error-Code": "GatedRepo"})
        path = folder.joinpath(*parts[4:])
        self.hub.served.append((commit, str(path.relative_to(folder))))
        return self.send(path.read_bytes(), 200, {"ETag": f'"{etag(path)}"', "X-Repo-Commit": commit})

    def send(self, content, status=200, headers=()):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {**dict(headers), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args):
        pass


def etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


class Hub:
    def __init__(self, repos: dict[str, Path]):
        self.repos, self.served = repos, []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, self))
        self.url = f"http://127.0.0.1:{self.server.server_port}"


def add_what_must_stay(folder: Path) -> None:
    (folder / "modeling_hovle.py").write_text("raise SystemExit('remote code ran')")
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    (folder / "checkpoint-1").mkdir()
    (folder / "checkpoint-1" / "model.safetensors").write_bytes(b"of another step")
    (folder / "checkpoint-1" / "trainer_state.json").write_text("{}")


@pytest.fixture(scope="module")
def repos(tmp_path_factory) -> dict[str, Path]:
    """Two commits of a checkpoint in each format; `ours` also has one in a subfolder."""
    root = tmp_path_factory.mktemp("repos")
    tokenizer = tiny_tokenizer()
    for commit, seed in (("main", 0), ("v1", 1)):
        ours = root / "ours" / commit
        for folder in (ours, ours / "nested"):
            tiny_hovle(tokenizer, seed=seed).save_pretrained(folder)
            tiny_processor(tokenizer, max_tiles=2 + seed).save_pretrained(folder)
        assert main(["convert", str(ours), str(root / "released" / commit), "--to", "released"]) == 0
        for folder in (ours, root / "released" / commit):
            add_what_must_stay(folder)
    return {f"{owner}/{name}": root / name for owner in ("open", "gated") for name in ("ours", "released")}


@pytest.fixture
def hub(repos, tmp_path, monkeypatch):
    """The hub, as HF_ENDPOINT, HF_HUB_CACHE and HF_HUB_OFFLINE=0 would set it (read once, at import)."""
    hub = Hub(repos)
    thread = threading.Thread(target=hub.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    yield hub
    hub.server.shutdown()
    hub.server.server_close()
    thread.join()


def same(model, folder: Path) -> bool:
    a, b = model.state_dict(), HovleForConditionalGeneration.from_pretrained(folder).state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("name", ["ours", "released"])
def test_model_and_processor_by_hub_id(hub, repos, name, monkeypatch):
    repo, folder = f"open/{name}", repos[f"open/{name}"]
    processor = HovleProcessor.from_pretrained(repo)
    assert processor.image_processor.max_tiles == 2
    assert not any(path.endswith(".safetensors") for _, path in hub.served)
    model = HovleForConditionalGeneration.from_pretrained(repo)
    assert same(model, folder / "main")
    assert model.name_or_path == model.config.name_or_path == repo
    assert not [path for _, path in hub.served if "/" in path or path.endswith((".py", ".bin"))]

    served = len(hub.served)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # all there is in the cache already
    assert same(HovleForConditionalGeneration.from_pretrained(repo), folder / "main")
    assert HovleProcessor.from_pretrained(repo).image_processor.max_tiles == 2
    assert len(hub.served) == served


@pytest.mark.parametrize("name", ["ours", "released"])
def test_revision_and_cache_dir(hub, repos, name, tmp_path):
    where = {"revision": "v1", "cache_dir": tmp_path / "mine"}
    model = HovleForConditionalGeneration.from_pretrained(f"open/{name}", **where)
    assert same(model, repos[f"open/{name}"] / "v1")
    assert HovleProcessor.from_pretrained(f"open/{name}", **where).image_processor.max_tiles == 3
    assert {commit for commit, _ in hub.served} == {COMMITS["v1"]}
    assert (tmp_path / "mine").is_dir()
    assert not (tmp_path / "cache").exists()
    again = HovleForConditionalGeneration.from_pretrained(f"open/{name}", **where, local_files_only=True)
    assert same(again, repos[f"open/{name}"] / "v1")


def test_token_opens_a_gated_repository(hub, repos):
    model = HovleForConditionalGeneration.from_pretrained("gated/released", token=TOKEN)
    assert same(model, repos["gated/released"] / "main")


def test_subfolder(hub, repos):
    model = HovleForConditionalGeneration.from_pretrained("open/ours", subfolder="nested")
    assert same(model, repos["open/ours"] / "main")
    assert {path.split("/")[0] for _, path in hub.served} == {"nested"}
    assert HovleProcessor.from_pretrained("open/ours", subfolder="nested").tokens_per_tile == 4
    local = repos["open/ours"] / "main"
    assert same(HovleForConditionalGeneration.from_pretrained(local, subfolder="nested"), local)


@pytest.mark.parametrize(
    "load", [HovleForConditionalGeneration.from_pretrained, HovleProcessor.from_pretrained]
)
@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("open/nothing", {}, "no folder and no hub repository 'open/nothing'; if it is private, log in with `hf auth"),
        ("gated/released", {}, "is gated: ask for access on https://huggingface.co/gated/released, then log in"),
        ("open/ours", {"revision": "v9"}, "has no revision 'v9'"),
        ("open/ours", {"subfolder": "nset"}, "open/ours has no subfolder 'nset'"),
        ("open/ours", {"local_files_only": True}, "is not wholly in the cache, .* local_files_only"),
        ("./no/such/folder", {}, "is neither a folder here nor a hub id"),
    ],
)  # fmt: skip
def test_what_to_do_is_said(hub, load, name, arguments, message):
    with pytest.raises(FileNotFoundError, match=message):
        load(name, **arguments)


def test_a_half_filled_cache_is_not_taken_for_a_checkpoint(hub, monkeypatch):
    HovleProcessor.from_pretrained("open/released")  # everything but the weights
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="is not wholly in the cache, and the hub was not asked"):
        HovleForConditionalGeneration.from_pretrained("open/released")


def test_convert_takes_a_hub_id(hub, repos, tmp_path, capsys):
    assert main(["convert", "open/released", str(tmp_path / "out"), "--to", "hovle", "--revision", "v1"]) == 0
    assert same(HovleForConditionalGeneration.from_pretrained(tmp_path / "out"), repos["open/ours"] / "v1")
    assert main(["convert", "gated/released", str(tmp_path / "other"), "--to", "hovle"]) == 2
    assert "hovle: error: 'gated/released' is gated" in capsys.readouterr().err
