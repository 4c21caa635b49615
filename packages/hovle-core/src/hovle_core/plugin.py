"""Core's own plugin, through the same door as anyone's: default backbone and tokenizers, and its commands."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hovle_core.hookspecs import HOVLE_HOOK_API as CURRENT_HOOK_API
from hovle_core.hookspecs import hookimpl
from hovle_core.plugins import HovlePlugins, PluginInfo
from hovle_core.registry import KINDS, Spec, hook_of, spelt

HOVLE_HOOK_API = 1


@hookimpl
def hovle_backbones() -> list[Spec]:
    return [
        Spec(
            "transformers",
            "hovle_core.backbones:TransformersBackbone",
            summary="any causal LM that transformers can load, GGUF and InternLM2: path=DIRECTORY, Hub id or FILE.gguf",
        )
    ]


@hookimpl
def hovle_tokenizers() -> list[Spec]:
    return [
        Spec(
            "transformers",
            "hovle_core.backbones:TransformersTokenizer",
            summary="any tokenizer that transformers can load, and GGUF's: path=DIRECTORY, Hub id or FILE.gguf",
        ),
        Spec(
            "tiktoken",
            "hovle_core.backbones:TiktokenTokenizer",
            summary="a tiktoken vocabulary: path=FILE.tiktoken, pattern, special_tokens, eos_token",
        ),
    ]


@hookimpl
def hovle_token_mixers() -> list[Spec]:
    return [
        Spec(
            "attention",
            "hovle_core.layers:CausalSelfAttention",
            summary="grouped-query causal self attention, the released model's",
        )
    ]


@hookimpl(trylast=True)
def hovle_build_model(build: Callable[[], Any]) -> Any:
    return build()


@hookimpl
def hovle_commands(cli: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    plugins = cli.add_parser("plugins", help="what is installed and what it provides")
    actions = plugins.add_subparsers(title="actions", required=True, metavar="ACTION")
    listing = actions.add_parser("list", help="every plugin, its distribution and version, what it provides")
    listing.add_argument("--json", action="store_true", help="for machines")
    listing.set_defaults(run=_list, tolerates_broken_plugins=True)

    _add_plugin(cli)

    convert = cli.add_parser("convert", help="a checkpoint between the released format and hovle's")
    convert.add_argument(
        "source", metavar="SRC", help="a folder, a finished run, or a hub id such as OpenGVLab/HoVLE"
    )
    convert.add_argument("destination", metavar="DST", help="the folder to write, or to replace with --force")
    convert.add_argument("--to", required=True, choices=("released", "hovle"), help="the format of DST")
    convert.add_argument("--revision", help="branch, tag or commit of a hub id")
    convert.add_argument(
        "--dry-run", action="store_true", help="check SRC, say what would be written, and stop"
    )
    convert.add_argument("--force", action="store_true", help="replace a checkpoint that DST holds")
    convert.set_defaults(run=_convert, tolerates_broken_plugins=True)


def _add_plugin(cli: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = cli.add_parser("plugin", help="write a plugin, or test one")
    actions = parser.add_subparsers(title="actions", required=True, metavar="ACTION")
    new = actions.add_parser("new", help="write a package that installs, is listed and passes its tests")
    new.add_argument("name", metavar="NAME", help="of the plugin, such as my-teacher")
    kinds = [spelt(kind) for kind in KINDS if kind != "recipe"]
    new.add_argument("--kind", required=True, choices=kinds)
    new.add_argument("--out", default=".", metavar="FOLDER", help="where its folder is made (default: here)")
    new.set_defaults(run=_new, tolerates_broken_plugins=True)

    test = actions.add_parser("test", help="run the conformance suite over what an installed plugin provides")
    test.add_argument("name", metavar="NAME", help="of the plugin, as `hovle plugins list` shows it")
    test.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="SPEC",
        help="test this of what it provides (repeatable)",
    )
    test.add_argument(
        "--option", action="append", default=[], metavar="KEY=VALUE", help="as in a recipe, such as size=112"
    )
    test.set_defaults(run=_test, tolerates_broken_plugins=True)


def _new(args: argparse.Namespace) -> int:
    from hovle_core.kit.new import fields_of, write_package

    written = write_package(args.name, args.kind, Path(args.out))
    folder = written[-1].parent
    print(f"wrote {folder}; start in {written[0]}")
    fields = fields_of(folder.name.removeprefix("hovle-"), args.kind.replace("-", "_"))
    print(f"  pip install -e '{folder}[test]' && {fields['command']}")
    return 0


def _test(args: argparse.Namespace) -> int:
    from hovle_core.kit.check import parse_options, provided_specs, run

    specs = provided_specs(args.plugins, args.name, args.only)
    return run(specs, parse_options(args.option))


def _list(args: argparse.Namespace) -> int:
    plugins: HovlePlugins = args.plugins
    if args.json:
        described = [_described(plugins, info) for info in plugins.plugins]
        print(json.dumps({"hook_api": CURRENT_HOOK_API, "plugins": described}, indent=2))
    else:
        for info in plugins.plugins:
            print(_text(_described(plugins, info)))
        if plugins.broken:
            print(f"run without what is broken: {plugins.rescue()} hovle ...")
    return 0


def _convert(args: argparse.Namespace) -> int:
    from hovle_core.convert import check_destination, convert, plan
    from hovle_core.hub import local_folder
    from hovle_core.loading import ADAPTER_CONFIG
    from hovle_core.runs import latest_checkpoint

    source = local_folder(latest_checkpoint(args.source), weights=True, revision=args.revision)
    if (source / ADAPTER_CONFIG).is_file():
        raise ValueError(
            f"{source} holds an adapter beside its model, and a conversion has no place for it: merge it (peft's "
            f"merge_and_unload) and save that, or convert a copy without {ADAPTER_CONFIG}"
        )
    destination = Path(args.destination)
    check_destination(source, destination, args.force)
    planned = plan(source, args.to)
    print(f"{args.source} -> {destination}")
    for line in planned.lines():
        print(f"  {line}")
    if args.dry_run:
        print("nothing was written (--dry-run)")
        return 0
    convert(planned, destination, force=args.force)
    if args.to == "released":
        print(
            "the released code itself (*.py) is not written: copy it from the original repository where it is wanted"
        )
    return 0


def _described(plugins: HovlePlugins, info: PluginInfo) -> dict[str, Any]:
    """One plugin as plain data: what ``--json`` prints."""
    described: dict[str, Any] = {
        "name": info.name,
        "distribution": info.provider.distribution,
        "version": info.provider.version,
        "module": info.module,
        "status": info.status,
        "error": info.error or None,
        "hooks": [],
        "provides": {},
    }
    if info.status == "loaded":
        callers = plugins.manager.get_hookcallers(plugins.manager.get_plugin(info.name)) or []
        described["hooks"] = sorted(caller.name for caller in callers)
        for kind, spec in plugins.provided[info.name]:
            entry = {"name": spec.name, "target": spec.target, "summary": spec.summary}
            described["provides"].setdefault(kind, []).append(entry)
    return described


def _text(plugin: dict[str, Any]) -> str:
    lines = [f"{plugin['name']}  ({plugin['distribution']} {plugin['version']})"]
    if plugin["status"] == "broken":
        lines[0] += "  BROKEN"
        lines.append(f"  {plugin['error']}")
    elif plugin["status"] == "disabled":
        lines[0] += "  disabled by HOVLE_PLUGINS"
    for kind, specs in plugin["provides"].items():
        width = max(len(spec["name"]) for spec in specs)
        lines += [
            f"  {spelt(kind):<11}  {spec['name']:<{width}}  {spec['summary']}".rstrip() for spec in specs
        ]
    other = [hook for hook in plugin["hooks"] if hook not in map(hook_of, KINDS)]
    if other:
        lines.append(f"  hooks        {', '.join(other)}")
    return "\n".join(lines)
