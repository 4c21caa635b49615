"""`hovle serve`: one model behind an OpenAI-compatible API on this machine."""

from __future__ import annotations

import argparse
import ipaddress
import socket
import sys


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
    parser.set_defaults(run=run_serve)


def run_serve(args: argparse.Namespace) -> int:
    from pydantic import ValidationError

    from hovle_core.runs import latest_checkpoint
    from hovle_serve.serving import ServeConfig, build_app

    fields = ("name", "api_key_file", "max_batch", "max_cache_tokens", "max_queue")
    try:
        config = ServeConfig(model=args.run_or_checkpoint, **{name: getattr(args, name) for name in fields})
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"--{str(first['loc'][0]).replace('_', '-')}: {first['msg']}") from error
    latest_checkpoint(config.model)  # a typing error is told before anything is loaded
    with _listen(args.host, args.port) as listener:
        if config.api_key_file is None and not _is_local(listener):
            print(
                "hovle: warning: everybody who reaches this port may ask; give --api-key-file",
                file=sys.stderr,
            )
        import uvicorn

        app = build_app(config)
        host, port = listener.getsockname()[:2]
        address = f"[{host}]" if ":" in host else host
        print(f"serving {config.served_name} on http://{address}:{port}", file=sys.stderr, flush=True)
        # h11 bounds headers. A stopped server finishes what it answers, for so long.
        server = uvicorn.Server(
            uvicorn.Config(
                app, http="h11", log_level="warning", timeout_graceful_shutdown=30, server_header=False
            )
        )
        try:
            server.run(sockets=[listener])
        except (
            KeyboardInterrupt
        ):  # uvicorn passes on the Ctrl-C that ended it, which is how one ends a server
            print("hovle: stopped", file=sys.stderr)
        finally:
            app.state.engine.close()  # done already, unless the app did not come up
    return 0


def _listen(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        raise ValueError(f"cannot listen on --host {host} --port {port}: {error}") from error


def _is_local(listener: socket.socket) -> bool:
    return ipaddress.ip_address(listener.getsockname()[0]).is_loopback
