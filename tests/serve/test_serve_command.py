"""`hovle serve` and `hovle chat --url`, as a person runs them."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import httpx
import pytest

from hovle_core.cli import main
from hovle_core.images import open_image
from hovle_core.openmp import SPINS
from hovle_serve import listener
from hovle_serve.chat import ChatSession
from hovle_serve.remote import RemoteSession
from hovle_serve.sampling import Sampling
from hovle_serve.serving import ServeConfig, read_api_keys


@contextmanager
def hovle_serve(*arguments: str) -> Iterator[tuple[subprocess.Popen, str]]:
    """The command in a process of its own, and where it listens."""
    command = [sys.executable, "-m", "hovle_core.cli", "serve", *arguments, "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            lines = []
            for line in process.stderr:
                lines.append(line)
                if found := re.search(r"serving (\S+) on (http://\S+)", line):
                    yield process, found[2]
                    return
            pytest.fail("".join(lines))
        finally:
            process.kill()


@pytest.fixture
def ours(monkeypatch):
    monkeypatch.setenv("HOVLE_PLUGINS", "serve")
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


def test_served_from_the_command_line_and_talked_to_from_it(
    ours, checkpoint, model, processor, picture, tmp_path, capsys, monkeypatch
):
    (tmp_path / "keys").write_text("# ours\nsecret\n\nother\n")
    session = ChatSession(model, processor, system="be brief", sampling=Sampling(max_new_tokens=6))
    image = open_image(picture)
    expected = ["".join(session.ask("what is this?", [image])), "".join(session.ask("and?"))]
    with hovle_serve(str(checkpoint), "--api-key-file", str(tmp_path / "keys"), "--name", "cat") as (
        process,
        url,
    ):
        assert httpx.get(f"{url}/health", trust_env=False).status_code == 200
        chat = [
            "chat",
            "--url",
            url,
            "--image",
            str(picture),
            "--system",
            "be brief",
            "--max-new-tokens",
            "6",
        ]
        assert main([*chat, "what is this?"]) == 2
        assert "set HOVLE_API_KEY to one of its keys" in capsys.readouterr().err
        for key in ("", "a\nb", "schlüssel"):
            monkeypatch.setenv("HOVLE_API_KEY", key)
            assert main([*chat, "what is this?"]) == 2
            error = capsys.readouterr().err
            assert "HOVLE_API_KEY" in error
            assert not key or key not in error

        monkeypatch.setenv(
            "HOVLE_API_KEY", "other\n"
        )  # as `$(< file)` would not, but `cat` into an env file does
        assert main([*chat, "what is this?"]) == 0
        output = capsys.readouterr()
        assert (output.out, output.err) == (expected[0] + "\n", "")

        lines = iter(["what is this?", "word " * 600, "and?", "/quit"])
        monkeypatch.setattr("builtins.input", lambda prompt="": next(lines))
        assert main(chat) == 0
        output = capsys.readouterr()
        assert output.out.splitlines() == expected
        assert f"talking to cat at {url}" in output.err
        assert "error: the server says: the conversation takes" in output.err

        process.send_signal(signal.SIGTERM)  # as Ctrl-C
        assert process.wait(timeout=60) == 0
        assert "hovle: stopped" in process.stderr.read()
    assert main([*chat, "again?"]) == 2
    assert f"cannot talk to --url '{url}'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("host", "has_keys", "is_checked"),
    [("127.0.0.1", False, True), ("127.0.0.1", True, False), ("0.0.0.0", False, False)],
)
def test_who_may_name_the_server_as_they_like(
    ours, checkpoint, tmp_path, monkeypatch, host, has_keys, is_checked
):
    """A server of this machine without keys checks the Host; others are told by their keys, or warned of."""
    served = []

    class Server:
        def run(self, sockets):
            assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler
            raise KeyboardInterrupt

    monkeypatch.setattr(listener, "server", lambda app: served.append(app) or Server())
    (tmp_path / "keys").write_text("one\n")
    keys = ["--api-key-file", str(tmp_path / "keys")] if has_keys else []
    before = signal.getsignal(signal.SIGTERM)
    assert main(["serve", str(checkpoint), "--host", host, "--port", "0", *keys]) == 0
    assert isinstance(served[0], listener.LocalNames) == is_checked
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_engine_s_threads_wait_awake(ours, tmp_path):
    """What a process starts with is read before torch is there to read it."""
    code = (
        "import os, sys; from hovle_core.cli import main; "
        "code = main(['serve', sys.argv[1]]); print(code, os.environ.get('GOMP_SPINCOUNT'))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    command = [sys.executable, "-c", code, str(tmp_path / "none")]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["2", SPINS]


def test_what_is_wrong_is_said_before_anything_is_loaded(ours, checkpoint, tmp_path, capsys):
    def error(*arguments: str) -> str:
        assert main([*arguments]) == 2
        return capsys.readouterr().err

    assert "no such folder" in error("serve", str(tmp_path / "none"))
    assert "--max-batch: Input should be greater" in error("serve", str(checkpoint), "--max-batch", "0")
    (tmp_path / "keys").write_text("# none\n")
    assert "holds no key" in error(
        "serve", str(checkpoint), "--port", "0", "--api-key-file", str(tmp_path / "keys")
    )
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"cannot listen on --host 127.0.0.1 --port {port}" in error(
            "serve", str(checkpoint), "--port", port
        )
    assert "cannot listen" in error("serve", str(checkpoint), "--port", "99999")
    assert "--host is empty" in error("serve", str(checkpoint), "--host", "")
    assert "--api-key-file" in error("serve", str(checkpoint), "--max-in-flight", "3")
    assert "or --url" in error("chat")
    assert "give a question alone" in error("chat", "--url", "http://127.0.0.1:1", "runs/demo", "hi")
    assert "cannot talk to" in error("chat", "--url", "http://127.0.0.1:1", "hi")


def test_names_and_keys(tmp_path):
    assert ServeConfig(model=str(tmp_path / ".")).served_name == tmp_path.name
    assert ServeConfig(model="OpenGVLab/HoVLE").served_name == "OpenGVLab/HoVLE"
    assert ServeConfig(model="x", name="y").served_name == "y"
    with pytest.raises(ValueError, match="max_bach"):
        ServeConfig(model="x", max_bach=1)
    assert ServeConfig.model_validate({"model": "x", "limits": {"max_images": 2}}).limits.max_images == 2
    with pytest.raises(ValueError, match="max_image"):
        ServeConfig.model_validate({"model": "x", "limits": {"max_image": 2}})
    (tmp_path / "keys").write_text("a\r\n# b\n  c  \n")
    assert read_api_keys(str(tmp_path / "keys")) == ["a", "c"]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"data: {\"choices\":[{\"delta\":{\"content\":\"a\"}}]}\n\n", "broke off"),
        (b"data: {\"error\":{\"message\":\"no memory\"}}\n\n", "the server says: no memory"),
    ],
)  # fmt: skip
def test_a_server_that_fails_in_the_middle_leaves_the_conversation_as_it_was(ours, answer, message):
    class Broken(BaseHTTPRequestHandler):
        def do_GET(self):
            self.reply(b'{"data": [{"id": "tiny"}]}')

        def do_POST(self):
            self.reply(answer)

        def reply(self, body: bytes) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments) -> None:
            """Nothing."""

    with HTTPServer(("127.0.0.1", 0), Broken) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            session = RemoteSession(f"http://127.0.0.1:{server.server_port}/v1")
            with pytest.raises(ValueError, match=message):
                list(session.ask("hi"))
            assert session.messages == []
        finally:
            server.shutdown()
            thread.join()


def test_the_key_is_no_argument(capsys):
    with pytest.raises(SystemExit):
        main(["chat", "--help"])
    assert "HOVLE_API_KEY" in capsys.readouterr().out
    assert "HOVLE_API_KEY" not in os.environ
