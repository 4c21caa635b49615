"""`hovle serve`: one model behind an OpenAI-compatible API on this machine."""

from __future__ import annotations

import argparse
import ipaddress
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from hovle_core.openmp import SPINS


def add_serve_parser(cli: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `hovle serve` to the sub-parsers."""
    parser = cli.add_parser(
        "serve",
        help="serve a model to OpenAI clients and browsers",
        description="Serve a model on this machine: OpenAI's /v1/chat/completions, and a page to talk to it at /. "
        "For a cluster see docs/serve.md. Ctrl-C ends it after the answers in work.",
    )
    parser.add_argument("run_or_checkpoint",
                        help="a run, a folder of runs (its last finished stage), a checkpoint, a hub id")  # fmt: skip
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one (default %(default)s)")
    parser.add_argument("--name", help="what clients call the model (default: the last part of its path)")
    parser.add_argument("--api-key-file", metavar="FILE", help="a key a line; requests then need one of them")
    parser.add_argument("--max-batch", type=int, default=16, metavar="N",
                        help="requests answered together (default %(default)s)")  # fmt: skip
    parser.add_argument("--max-cache-tokens", type=int, default=65536, metavar="N",
                        help="tokens the key-value cache may hold (default %(default)s)")  # fmt: skip
    parser.add_argument("--max-queue", type=int, default=64, metavar="N",
                        help="requests that may wait; others are told to come back (default %(default)s)")  # fmt: skip
    parser.add_argument("--max-prefix-tokens", type=int, default=16384, metavar="N",
                        help="on top of these, tokens of prompts kept for others that begin alike (default %(default)s)"
                        )  # fmt: skip
    parser.add_argument("--image-host", action="append", default=[], metavar="HOST", dest="image_hosts",
                        help="fetch pictures given by URL from here, such as images.example.com or *.example.com "
                        "(may be repeated; by default nothing is fetched)")  # fmt: skip
    parser.add_argument("--max-in-flight", type=int, metavar="N", help="requests a key may have in work")
    parser.add_argument("--max-requests-per-minute", type=int, metavar="N", help="requests a key may send")
    parser.set_defaults(run=run_serve)


def run_serve(args: argparse.Namespace) -> int:
    if "torch" not in sys.modules:  # which reads it when it is imported, below
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
    from pydantic import ValidationError

    from hovle_core.runs import latest_checkpoint
    from hovle_serve.serving import ServeConfig, build_app

    names = (
        "name",
        "api_key_file",
        "max_batch",
        "max_cache_tokens",
        "max_queue",
        "max_prefix_tokens",
        "image_hosts",
    )
    fields = {name: getattr(args, name) for name in names}
    fields["key_limits"] = {
        name: getattr(args, name) for name in ("max_in_flight", "max_requests_per_minute")
    }
    try:
        config = ServeConfig(model=args.run_or_checkpoint, **fields)
    except ValidationError as error:
        first = error.errors()[0]
        option = f"--{str(first['loc'][-1]).replace('_', '-')}: " if first["loc"] else ""
        raise ValueError(option + first["msg"].removeprefix("Value error, ")) from error
    latest_checkpoint(config.model)  # a typing error is told before anything is loaded
    with _listen(args.host, args.port) as listener:
        is_open = config.api_key_file is None
        if is_open and not _is_local(listener):
            print(
                "hovle: warning: everybody who reaches this port may ask; give --api-key-file",
                file=sys.stderr,
            )
        from hovle_serve.listener import LocalNames, server

        app = build_app(config)
        host, port = listener.getsockname()[:2]
        address = f"[{host}]" if ":" in host else host
        print(f"serving {config.served_name} on http://{address}:{port}", file=sys.stderr, flush=True)
        served = LocalNames(app) if is_open and _is_local(listener) else app
        try:
            with _sigterm_as_ctrl_c():
                server(served).run(sockets=[listener])
        except KeyboardInterrupt:  # uvicorn passes on what ended it, which is how one ends a server
            print("hovle: stopped", file=sys.stderr)
        finally:
            app.state.engine.close()  # done already, unless the app did not come up
    return 0


@contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    """uvicorn finishes what it answers and passes the signal on: SIGTERM is then no failure either."""
    if threading.current_thread() is not threading.main_thread():  # where Python takes no signals
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _listen(host: str, port: int) -> socket.socket:
    if not host:  # every address of the machine, to a socket
        raise ValueError("--host is empty: give an address, or 0.0.0.0 for all of this machine's")
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        raise ValueError(f"cannot listen on --host {host} --port {port}: {error}") from error


def _is_local(listener: socket.socket) -> bool:
    return ipaddress.ip_address(listener.getsockname()[0]).is_loopback
