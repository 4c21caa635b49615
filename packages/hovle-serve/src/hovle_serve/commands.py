"""`hovle chat`: one answer, or a conversation, in the terminal. Answers go to stdout, everything else to stderr."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # `hovle --help` builds the parsers: what is heavy is imported when a command runs
    from PIL.Image import Image

    from hovle_serve.conversation import Conversation

KEY_VARIABLE = "HOVLE_API_KEY"  # not an option: other users of a machine can read those
HELP = "/image PATH adds a picture to the next message, /reset forgets the conversation, /quit or Ctrl-D ends"
_COMMAND = re.compile(r"/([a-z]+)(?:\s+(.*))?")
# What would move a terminal's cursor or change its state: C0 but for tab and newline, delete, C1.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def add_chat_parser(cli: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `hovle chat` to the sub-parsers."""
    parser = cli.add_parser(
        "chat",
        help="talk to a model about pictures",
        description=f"Answer a question, or without one hold a conversation. {HELP}; Ctrl-C stops an answer.",
    )
    parser.add_argument("run_or_checkpoint", nargs="?",
                        help="a run, a folder of runs (its last finished stage), a checkpoint, a hub id; not with --url"
                        )  # fmt: skip
    parser.add_argument("question", nargs="?", help="answer this and exit")
    parser.add_argument("--image", action="append", default=[], metavar="PICTURE", dest="images",
                        help="a picture for the first message (may be repeated)")  # fmt: skip
    parser.add_argument("--max-new-tokens", type=int, default=512, metavar="N",
                        help="longest answer (default %(default)s)")  # fmt: skip
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (the default)"
    )
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P",
                        help="draw from the likeliest tokens that hold this share of probability")  # fmt: skip
    parser.add_argument("--seed", type=int, metavar="S", help="the same draws every time")
    parser.add_argument("--system", metavar="TEXT", help="a system message")
    parser.add_argument("--url", help="talk to a server (hovle serve) instead, such as http://127.0.0.1:8000; "
                        f"{KEY_VARIABLE} holds its API key")  # fmt: skip
    parser.set_defaults(run=run_chat)
    _accept_late_question(parser)


def _accept_late_question(parser: argparse.ArgumentParser) -> None:
    """`RUN --image cat.png "What is this?"`: argparse before 3.12.7 decides at RUN that there is no question."""
    parse = parser.parse_known_args

    def parse_known_args(args: Any = None, namespace: Any = None) -> tuple[argparse.Namespace, list[str]]:
        known, rest = parse(args, namespace)
        if known.question is None and len(rest) == 1 and (" " in rest[0] or not rest[0].startswith("-")):
            known.question = rest.pop()
        return known, rest

    parser.parse_known_args = parse_known_args  # type: ignore[method-assign, assignment]


def run_chat(args: argparse.Namespace) -> int:
    from hovle_core.images import open_image

    if args.url is not None:  # then there is no model to name, and the first word is the question
        if args.question is not None:
            raise ValueError(
                "--url names the model's server: give a question alone, without a run or checkpoint"
            )
        args.run_or_checkpoint, args.question = None, args.run_or_checkpoint
    elif args.run_or_checkpoint is None:
        raise ValueError("give a run or a checkpoint to talk to, or --url")
    if args.question is not None and not args.question.strip() and not args.images:
        raise ValueError("the question is empty; leave it out for a conversation")
    if args.top_p < 1 and args.temperature == 0:
        raise ValueError(f"--top-p {args.top_p} does nothing with greedy answers; give --temperature as well")
    images = [open_image(Path(path).expanduser()) for path in args.images]
    session = _open_session(args)
    if args.question is None:
        return converse(session, images)
    _say(session, args.question, images)
    return 0


def _open_session(args: argparse.Namespace) -> Conversation:
    if args.url is not None:
        from hovle_serve.remote import RemoteSession

        fields = {
            "max_tokens": args.max_new_tokens, "temperature": args.temperature, "top_p": args.top_p, "seed": args.seed
        }  # fmt: skip
        remote = RemoteSession(args.url, os.environ.get(KEY_VARIABLE), args.system, fields)
        if args.question is None:
            _note(f"talking to {remote.model} at {args.url}")
        return remote
    from hovle_core.runs import latest_checkpoint

    checkpoint = latest_checkpoint(args.run_or_checkpoint)  # a typing error is told before torch is imported
    from transformers.utils import logging

    from hovle_serve.chat import ChatSession, load
    from hovle_serve.sampling import Sampling

    sampling = Sampling(args.max_new_tokens, args.temperature, args.top_p, args.seed)
    if args.question is None or checkpoint != args.run_or_checkpoint:
        print(f"talking to {checkpoint}", file=sys.stderr)
    logging.disable_progress_bar()  # the answer is the output
    model, processor = load(checkpoint)
    return ChatSession(model, processor, system=args.system, sampling=sampling)


def converse(session: Conversation, images: Sequence[Image] = ()) -> int:
    """Read messages until the end of input or /quit, and answer each; `images` go with the first.

    What is wrong with one message is said, and the conversation goes on. Returns the exit code. KeyboardInterrupt
    passes through where no answer is being written.
    """
    pending = list(images)
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if is_terminal:
        with contextlib.suppress(ImportError):  # Windows has none
            import readline  # noqa: F401  # line editing and history for input()
        _note(HELP)
    while True:
        try:
            line = input("> " if is_terminal else "").strip()
        except EOFError:
            if is_terminal:
                print()
            return 0
        except UnicodeDecodeError as error:
            raise ValueError(f"the input is not UTF-8 text: {error}") from error
        command = _COMMAND.fullmatch(line)
        if command is None:
            pending = _turn(session, line, pending) if line else pending
        elif command[1] == "quit":
            return 0
        elif command[1] == "reset":
            session.reset()
            pending = []
            _note("a new conversation")
        elif command[1] == "image":
            pending += _opened(command[2] or "")
        else:
            _note(f"there is no /{command[1]}; {HELP}")


def _turn(session: Conversation, text: str, images: list[Image]) -> list[Image]:
    """Answer one message; returns the pictures that still wait, which are those of a message that got no answer."""
    before = len(session.messages)
    try:
        _say(session, text, images)
    except KeyboardInterrupt:
        print(flush=True)
        _note("stopped")
    except ValueError as error:
        _note(f"error: {error}")
    return [] if len(session.messages) > before else images


def _opened(path: str) -> list[Image]:
    from hovle_core.images import ImageError, open_image

    path = path.strip("'\"")  # as a terminal pastes a dragged file
    if not path:
        _note("/image needs the path of a picture")
        return []
    try:
        image = open_image(Path(path).expanduser())
    except ImageError as error:
        _note(f"error: {error}")
        return []
    _note(f"{path} ({image.width}x{image.height}) goes with the next message")
    return [image]


def _say(session: Conversation, text: str, images: Sequence[Image]) -> None:
    with contextlib.closing(session.ask(text, images)) as pieces:
        for piece in pieces:
            print(_printable(piece), end="", flush=True)
    print(flush=True)


def _printable(text: str) -> str:
    """Text as stdout can show it: characters its encoding lacks become "?", no control reaches a terminal."""
    if sys.stdout.isatty():
        text = _CONTROL.sub("\ufffd", text)
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "replace").decode(encoding)


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
