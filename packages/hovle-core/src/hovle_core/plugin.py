"""Core's own plugin: the default backbone and ``hovle plugins list``, through the same door as anyone's."""

from __future__ import annotations

import argparse
import json
from typing import Any

from hovle_core.hookspecs import HOVLE_HOOK_API as CURRENT_HOOK_API
from hovle_core.hookspecs import hookimpl
from hovle_core.plugins import HovlePlugins, PluginInfo
from hovle_core.registry import KINDS, Spec

HOVLE_HOOK_API = 1


@hookimpl
def hovle_backbones() -> list[Spec]:
    return [
        Spec(
            "transformers",
            "hovle_core.backbones:TransformersBackbone",
            summary="any causal LM that transformers can load: path=DIRECTORY or Hub id",
        )
    ]


@hookimpl
def hovle_commands(cli: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    plugins = cli.add_parser("plugins", help="what is installed and what it provides")
    actions = plugins.add_subparsers(title="actions", required=True, metavar="ACTION")
    listing = actions.add_parser("list", help="every plugin, its distribution and version, what it provides")
    listing.add_argument("--json", action="store_true", help="for machines")
    listing.set_defaults(run=_list, tolerates_broken_plugins=True)


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
        lines += [f"  {kind:<9}  {spec['name']:<{width}}  {spec['summary']}".rstrip() for spec in specs]
    other = [hook for hook in plugin["hooks"] if hook not in {f"hovle_{kind}s" for kind in KINDS}]
    if other:
        lines.append(f"  hooks      {', '.join(other)}")
    return "\n".join(lines)
