"""Serve's plugin: `hovle chat` and `hovle serve`."""

import argparse

from hovle_core.hookspecs import hookimpl

HOVLE_HOOK_API = 1


@hookimpl
def hovle_commands(cli: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    from hovle_serve.commands import add_chat_parser
    from hovle_serve.serve_command import add_serve_parser

    add_chat_parser(cli)
    add_serve_parser(cli)
