"""`hovle chat` answers, converses, and says what is wrong."""

import io
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import zlib

import pytest
from PIL import Image

from hovle_core.cli import main
from hovle_core.images import open_image
from hovle_core.testing import tiny_llm
from hovle_serve import commands, stream
from hovle_serve.sampling import Sampling

SHORT = ["--max-new-tokens", "6"]


@pytest.fixture
def chat(checkpoint, monkeypatch):
    """`chat(arguments, *lines)`: run the command in this process, `lines` typed by the user; gives the exit code."""
    monkeypatch.setenv("HOVLE_PLUGINS", "serve")

    def run(*arguments: str, lines: list | None = None, path=checkpoint) -> int:
        typed = iter(lines or [])

        def read(prompt=""):
            line = next(typed, EOFError())
            if isinstance(line, BaseException):
                raise line
            return line

        monkeypatch.setattr("builtins.input", read)
        return main(["chat", str(path), *arguments])

    return run


# ---- one answer ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["image first", "question first"])
def test_one_question_is_answered_on_stdout(chat, session, capsys, picture, order):
    expected = "".join(session.ask("what is this?", [open_image(picture)]))
    arguments = ["--image", str(picture), "what is this?"]
    if order == "question first":
        arguments = [arguments[2], *arguments[:2]]
    assert chat(*arguments, *SHORT) == 0
    output = capsys.readouterr()
    assert output.out == expected + "\n"
    assert output.err == ""


def test_a_question_that_starts_with_a_dash_and_pictures_without_words(chat, capsys, picture):
    assert chat("--image", str(picture), "- is this a square?", *SHORT) == 0
    assert chat("--image", str(picture), "--image", str(picture), "", *SHORT) == 0
    with pytest.raises(SystemExit):
        chat("hi", "--imagine", str(picture))
    with pytest.raises(SystemExit):
        chat("one", "two")
    assert "unrecognized arguments: two" in capsys.readouterr().err


def test_sampling_options_arrive(chat, session, capsys):
    session.sampling = Sampling(max_new_tokens=6, temperature=1.5, top_p=0.9, seed=4)
    session.system = "be brief"
    session.reset()
    expected = "".join(session.ask("hi"))
    options = ["--temperature", "1.5", "--top-p", "0.9", "--seed", "4", "--system", "be brief"]
    assert chat("hi", *options, *SHORT) == 0
    assert capsys.readouterr().out == expected + "\n"


def test_a_folder_of_runs_answers_with_its_last_finished_stage(chat, checkpoint, capsys):
    demo = checkpoint.parent / "demo"
    (demo / "instruction_tuning").mkdir(parents=True)
    (demo / "instruction_tuning" / "recipe.yaml").write_text("")
    shutil.copytree(checkpoint, demo / "alignment" / "final")
    assert chat("hi", *SHORT, path=demo) == 0
    output = capsys.readouterr()
    assert output.out.strip()
    assert output.err == f"talking to {demo}/alignment/final\n"


def test_characters_that_stdout_lacks_become_question_marks_and_a_terminal_gets_no_controls(monkeypatch):
    class Terminal(io.TextIOWrapper):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="latin-1"))
    assert commands._printable("é 猫 \x1b[2J") == "é ? \x1b[2J"
    monkeypatch.setattr(sys, "stdout", Terminal(io.BytesIO(), encoding="utf-8"))
    assert commands._printable("猫\n\t\x1b[2J\x9b") == "猫\n\t\ufffd[2J\ufffd"


# ---- conversations ---------------------------------------------------------------------------------------------------


def test_a_conversation_with_pictures_and_commands(chat, session, capsys, picture):
    image = open_image(picture)
    expected = ["".join(session.ask("what is this?", [image])), "".join(session.ask("and?", [image, image]))]
    session.reset()
    expected.append("".join(session.ask("hi")))
    lines = [
        "",
        "what is this?",
        f"/image {picture}",
        f'/image "{picture}"',
        "and?",
        "/reset",
        "hi",
        "/quit",
        "unread",
    ]
    assert chat("--image", str(picture), *SHORT, lines=lines) == 0
    output = capsys.readouterr()
    assert output.out.splitlines() == expected
    assert f"{picture} (80x60) goes with the next message" in output.err
    assert "a new conversation" in output.err


def test_what_is_wrong_with_a_line_is_said_and_the_conversation_goes_on(chat, session, capsys, tmp_path):
    expected = "".join(session.ask("hi"))
    lines = ["/image", f"/image {tmp_path}/none.png", "/imag x", "word " * 600, "hi"]
    assert chat(*SHORT, lines=lines) == 0
    output = capsys.readouterr()
    assert output.out.splitlines() == [expected]
    assert "/image needs the path" in output.err
    assert f"error: cannot open image '{tmp_path}/none.png': No such file" in output.err
    assert "there is no /imag; " in output.err
    assert "error: the conversation takes" in output.err


def interrupt_at(model, step: int) -> None:
    """Send Ctrl-C to the main thread from within the given forward of the LLM."""
    steps = []

    def press(*_):
        steps.append(1)
        if len(steps) == step:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    model.language_model.register_forward_pre_hook(press)
    # The main thread has its turn, and says what came before.
    model.language_model.register_forward_pre_hook(lambda *_: time.sleep(0.02))


def test_ctrl_c_stops_an_answer_and_the_conversation_goes_on(session, monkeypatch, capsys):
    session.sampling = Sampling(max_new_tokens=400)
    interrupt_at(session.model, 10)
    lines = iter(["count", "go on", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt="": next(lines))
    turns = []
    monkeypatch.setattr(
        commands, "_note", lambda text: turns.append((text, [m["content"] for m in session.messages]))
    )
    session_sampling = session.sampling

    def ask(text, images, original=session.ask):
        session.sampling = session_sampling if text == "count" else Sampling(max_new_tokens=5)
        return original(text, images)

    monkeypatch.setattr(session, "ask", ask)
    assert commands.converse(session) == 0
    ((note, messages),) = turns
    assert note == "stopped"
    assert messages[0] == "count"
    assert 0 < len(messages[1]) < 300
    assert capsys.readouterr().out.splitlines()[0] == messages[1]
    assert [message["content"] for message in session.messages][2] == "go on"


def test_a_picture_waits_if_its_question_was_stopped_before_the_answer(session):
    interrupt_at(session.model, 1)
    images = [Image.new("RGB", (60, 60))]
    waiting = commands._turn(session, "hi", images)
    if session.messages:  # the signal may come after the first token
        assert waiting == []
    else:
        assert waiting == images


def test_ctrl_c_while_the_thread_of_an_answer_starts_leaves_no_answer_in_work(session, monkeypatch):
    class Interrupted(threading.Thread):
        def start(self):
            super().start()
            raise KeyboardInterrupt

    monkeypatch.setattr(stream, "Thread", Interrupted)
    forwards = []
    session.model.language_model.register_forward_pre_hook(lambda *_: forwards.append(1))
    assert commands._turn(session, "hi", []) == []
    assert (session.messages, forwards) == ([], [])


def test_ctrl_c_at_the_prompt_ends_with_130(chat, capsys):
    assert chat(*SHORT, lines=["hi", KeyboardInterrupt()]) == 130
    assert capsys.readouterr().err.endswith("hovle: interrupted\n")


def test_lines_may_come_through_a_pipe(checkpoint, session):
    expected = ["".join(session.ask("hi")), "".join(session.ask("and?"))]
    command = [sys.executable, "-m", "hovle_core.cli", "chat", str(checkpoint), *SHORT]
    result = subprocess.run(command, input="hi\nand?\n", capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout.splitlines()) == (0, expected), result.stderr
    assert result.stderr.splitlines() == [f"talking to {checkpoint}"]


# ---- errors ----------------------------------------------------------------------------------------------------------


def error_of(chat, capsys, *arguments, **keywords) -> str:
    assert chat(*arguments, **keywords) == 2
    output = capsys.readouterr()
    assert output.out == ""
    last = output.err.splitlines()[-1]
    assert last.startswith("hovle: error: ")
    return last


def test_errors_of_the_folder(chat, capsys, tmp_path):
    assert "no such folder: '" in error_of(chat, capsys, "hi", path=tmp_path / "none")
    (tmp_path / "empty").mkdir()
    assert "is neither a checkpoint" in error_of(chat, capsys, "hi", path=tmp_path / "empty")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text("")
    message = error_of(chat, capsys, "hi", path=tmp_path / "run")
    assert f"has not finished: resume it with `hovle train {tmp_path}/run/recipe.yaml`" in message


def test_errors_of_the_checkpoint(chat, capsys, checkpoint, tmp_path, processor):
    tiny_llm(len(processor.tokenizer)).save_pretrained(tmp_path / "llm")
    processor.tokenizer.save_pretrained(tmp_path / "llm")
    assert "is a plain 'llama' model without" in error_of(chat, capsys, "hi", path=tmp_path / "llm")
    (checkpoint / "config.json").rename(tmp_path / "config.json")
    assert "is neither a checkpoint" in error_of(chat, capsys, "hi")
    (checkpoint / "config.json").write_text("{")
    assert "config.json is not valid JSON" in error_of(chat, capsys, "hi")
    (tmp_path / "config.json").rename(checkpoint / "config.json")
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert f"cannot load '{checkpoint}': " in error_of(chat, capsys, "hi")
    weights.unlink()
    assert f"cannot load '{checkpoint}': " in error_of(chat, capsys, "hi")
    (checkpoint / "processor_config.json").unlink()
    assert "has no processor (processor_config.json" in error_of(chat, capsys, "hi")


def test_a_hub_id_that_cannot_be_had(chat, capsys):
    message = error_of(chat, capsys, "hi", path="some-body/no-model")
    assert "'some-body/no-model' is no folder here, and on the hub: " in message


def huge_png(path) -> None:
    def chunk(name: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        )

    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    )


def test_errors_of_pictures_come_before_anything_is_loaded(chat, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(commands, "_open_session", None)
    (tmp_path / "text.png").write_text("no picture")
    huge_png(tmp_path / "huge.png")
    for name, reason in [
        ("none.png", "No such file or directory"),
        ("text.png", "not a known image format"),
        ("huge.png", "image too large"),
        ("", "Is a directory"),
    ]:
        path = tmp_path / name
        message = error_of(chat, capsys, "--image", str(path), "hi")
        assert f"cannot open image '{path}': {reason}" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--temperature", "-1"], "temperature -1.0 must be"),
        (["--temperature", "1", "--top-p", "2"], "top_p 2.0 must be"),
        (["--top-p", "0.9"], "--top-p 0.9 does nothing with greedy answers"),
        (["--max-new-tokens", "0"], "max_new_tokens 0 must be"),
    ],
)
def test_errors_of_numbers(chat, capsys, arguments, message):
    assert message in error_of(chat, capsys, "hi", *arguments)


def test_errors_of_the_question(chat, capsys):
    assert "the question is empty" in error_of(chat, capsys, " ")
    assert "the question is not valid Unicode" in error_of(chat, capsys, "\udcff")
    assert "the conversation takes" in error_of(chat, capsys, "word " * 600)
