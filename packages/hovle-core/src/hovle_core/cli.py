"""The ``hovle`` command. It knows no sub-command: they arrive through the hook ``hovle_commands``."""

from __future__ import annotations

import argparse
import io
import logging
import os
import platform
import sys
import traceback
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from hovle_core.plugins import CORE, HovlePlugins, PluginError, load_plugins

_EPILOG = """environment:
  HOVLE_PLUGINS=a,b   load only these plugins (and core); HOVLE_PLUGINS= only core
  HOVLE_DEBUG=1       show the traceback of an error, as --debug does
"""


# A path on the command line or in a file that is not what it should be.
_PATH_ERRORS = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``hovle`` with ``argv`` (default: the command line) and return the exit code.

    0 done, 2 the user has to change something (one line says what), 130 interrupted. Anything else is a bug and
    propagates. argparse leaves through ``SystemExit``.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = os.environ.get("HOVLE_DEBUG", "0") not in ("", "0") or "--debug" in arguments
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of files may hold what no terminal spells
        sys.stdout.reconfigure(errors="backslashreplace")
    # Where torchao is installed transformers imports it, and torch then warns of two enums of torchao's.
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
    try:
        code = _run(arguments)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # "hovle ... | head": the reader left, and that is not an error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, *_PATH_ERRORS) as error:
        if debug:
            traceback.print_exc()
        print(f"hovle: error: {_message(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if debug:
            traceback.print_exc()
        print("hovle: interrupted", file=sys.stderr)
        return 130


def _run(arguments: list[str]) -> int:
    plugins = load_plugins(strict=False)
    parser, commands, plugins = _build_parser(plugins)
    for info in plugins.broken:
        print(f"hovle: warning: {info.error}", file=sys.stderr)
    if plugins.broken:
        print(f"hovle: warning: to run without it: {plugins.rescue()} hovle ...", file=sys.stderr)

    args = parser.parse_args(arguments)
    if args.run is None:  # "hovle", or a group of commands without one of them
        commands.choices.get(args.command, parser).print_help(sys.stderr)
        return 2
    if plugins.broken and not args.tolerates_broken_plugins:
        names = ", ".join(info.name for info in plugins.broken)
        raise PluginError(
            f"'hovle {args.command}' does not run while a plugin is broken ({names}, see above)"
        )
    args.plugins = plugins
    return int(args.run(args) or 0)


def _build_parser(
    plugins: HovlePlugins,
) -> tuple[argparse.ArgumentParser, argparse._SubParsersAction[argparse.ArgumentParser], HovlePlugins]:
    """The parser, its sub-commands, and the plugins without those whose ``hovle_commands`` fails."""
    parser = argparse.ArgumentParser(
        prog="hovle",
        description="Train, talk to and serve HoVLE.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,  # --version and the epilog keep their lines
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=_versions(plugins), help="what is installed")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(run=None, tolerates_broken_plugins=False)
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND")
    owner: dict[str, str] = {}
    for name, provider in plugins.versions.items():
        try:
            plugins.call_one(name, "hovle_commands", cli=commands)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            if name == CORE:
                raise
            message = f"plugin {name!r} of {provider}: hovle_commands failed: {type(error).__name__}: {error}"
            if isinstance(error, argparse.ArgumentError) and "conflicting" in str(error):
                taken = ", ".join(f"{command!r} of {of}" for command, of in owner.items())
                message += f" (taken: {taken})"
            # Its parsers are half built: start again without it.
            return _build_parser(plugins.without(name, message))
        owner |= {command: provider for command in commands.choices if command not in owner}
    return parser, commands, plugins


def _versions(plugins: HovlePlugins) -> str:
    """One line a distribution of the platform, then what it runs on. Reads metadata, imports nothing."""
    lines = dict.fromkeys(str(info.provider) for info in plugins.plugins)
    runtime = [f"python {platform.python_version()}"]
    for distribution in ("torch", "transformers", "ray"):
        try:
            runtime.append(f"{distribution} {version(distribution)}")
        except PackageNotFoundError:  # ray is optional
            continue
    return "\n".join([*lines, ", ".join(runtime)])


def _message(error: ValueError | OSError) -> str:
    if isinstance(error, _PATH_ERRORS) and error.filename is not None:
        return f"{error.strerror}: {error.filename}"
    return str(error) or type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
