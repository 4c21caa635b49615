"""The command: fast, silent about its insides, and not taken down by a broken plugin."""

import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from hovle_core.cli import main

HEAVY = ("torch", "transformers", "torchvision", "timm", "ray", "webdataset", "wandb", "gguf")

COMMAND = """
    def run(args):
        import os
        what = args.what
        if what == "value": raise ValueError("lr: -1 is negative; give a positive number")
        if what == "file": open("/no/such/file.yaml")
        if what == "folder": open("/")
        if what == "below": open("/etc/passwd/x")
        if what == "closed": raise PermissionError(13, "Permission denied", "/closed")
        if what == "interrupt": raise KeyboardInterrupt
        if what == "bug": raise RuntimeError("a bug")
        if what == "plugins": print(sorted(args.plugins.versions))
        return 7 if what == "seven" else None

    @hookimpl
    def hovle_commands(cli):
        parser = cli.add_parser("probe", help="for tests")
        parser.add_argument("what")
        parser.set_defaults(run=run)
        group = cli.add_parser("group", help="a group without a default")
        group.add_subparsers(metavar="ACTION").add_parser("nothing")
"""


@pytest.fixture
def probe(site_packages):
    site_packages.install("probe", COMMAND)
    return site_packages


def in_new_process(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize(
    "arguments", [["plugins", "list"], ["plugins", "list", "--json"], ["--help"], ["--version"]]
)
def test_light_commands_import_nothing_heavy(arguments: list[str]) -> None:
    """With every plugin that is installed: their plugin modules must be light as well."""
    result = in_new_process(f"""
import sys
from hovle_core.cli import main
try:
    code = main({arguments})
except SystemExit as leave:
    code = leave.code
print("heavy:", [name for name in {HEAVY} if name in sys.modules], "code:", code)
""")
    assert result.stdout.splitlines()[-1] == "heavy: [] code: 0", result.stdout + result.stderr


def test_importing_hovle_core_imports_no_torch() -> None:
    result = in_new_process(f"""
import sys, hovle_core
from hovle_core import Spec, Registry, load_plugins, hookimpl, __version__
assert "HovleForConditionalGeneration" in dir(hovle_core)
print([name for name in {HEAVY} if name in sys.modules])
""")
    assert result.stdout.strip() == "[]", result.stderr


def test_unknown_export_is_an_attribute_error() -> None:
    import hovle_core

    with pytest.raises(AttributeError, match="no attribute 'Hovel'"):
        hovle_core.Hovel  # noqa: B018


def test_console_script_is_installed() -> None:
    script = Path(sys.executable).with_name("hovle")
    result = subprocess.run([script, "--version"], capture_output=True, text=True, timeout=60)
    assert result.stdout.splitlines()[0] == f"hovle-core {version('hovle-core')}"


def test_version_lists_every_distribution(probe, capsys) -> None:
    with pytest.raises(SystemExit) as leave:
        main(["--version"])
    assert leave.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"hovle-core {version('hovle-core')}"
    assert "dist-probe 1.0" in lines
    assert f"torch {version('torch')}" in lines[-1]


def test_commands_arrive_through_the_hook(probe, capsys) -> None:
    assert main(["probe", "seven"]) == 7
    assert main(["probe", "nothing"]) == 0
    assert main(["probe", "plugins"]) == 0
    assert capsys.readouterr().out == "['core', 'probe']\n"


def test_no_command_shows_help(probe, capsys) -> None:
    assert main([]) == 2
    assert "probe" in capsys.readouterr().err
    assert main(["group"]) == 2
    assert "usage: hovle group" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("what", "line"),
    [
        ("value", "hovle: error: lr: -1 is negative; give a positive number\n"),
        ("file", "hovle: error: No such file or directory: /no/such/file.yaml\n"),
        ("folder", "hovle: error: Is a directory: /\n"),
        ("below", "hovle: error: Not a directory: /etc/passwd/x\n"),
        ("closed", "hovle: error: Permission denied: /closed\n"),
    ],
)
def test_a_users_mistake_is_one_line(probe, capsys, monkeypatch, what: str, line: str) -> None:
    assert main(["probe", what]) == 2
    assert capsys.readouterr().err == line
    assert main(["--debug", "probe", what]) == 2
    debug = capsys.readouterr().err
    assert "Traceback" in debug
    assert debug.endswith(line)
    monkeypatch.setenv("HOVLE_DEBUG", "1")
    assert main(["probe", what]) == 2
    assert "Traceback" in capsys.readouterr().err
    monkeypatch.setenv("HOVLE_DEBUG", "0")
    assert main(["probe", what]) == 2
    assert capsys.readouterr().err == line


def test_interrupt_is_130_and_a_bug_is_a_traceback(probe, capsys) -> None:
    assert main(["probe", "interrupt"]) == 130
    assert capsys.readouterr().err == "hovle: interrupted\n"
    with pytest.raises(RuntimeError, match="a bug"):
        main(["probe", "bug"])


def test_a_reader_that_leaves_is_no_error(probe) -> None:
    command = f"set -o pipefail; {sys.executable} -m hovle_core.cli plugins list | true"
    environment = {**os.environ, "PYTHONPATH": str(probe.path)}
    result = subprocess.run(
        ["bash", "-c", command], env=environment, capture_output=True, text=True, timeout=60
    )
    assert (result.returncode, result.stderr) == (0, "")


def test_list_shows_who_provides_what(site_packages, capsys) -> None:
    site_packages.install(
        "shop",
        """
        @hookimpl
        def hovle_teachers(): return [Spec("a", "m:A", summary="small"), Spec("bigger", "m:B", {"n": 1}, "big")]
        @hookimpl
        def hovle_on_log(run): ...
        """,
        version="4.2",
    )
    assert main(["plugins", "list"]) == 0
    text = capsys.readouterr().out
    assert "shop  (dist-shop 4.2)\n  teacher      a       small\n  teacher      bigger  big\n" in text
    assert "hooks        hovle_on_log" in text

    assert main(["plugins", "list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert listed["hook_api"] == 1
    (shop,) = [plugin for plugin in listed["plugins"] if plugin["name"] == "shop"]
    assert shop["distribution"] == "dist-shop"
    assert shop["version"] == "4.2"
    assert shop["status"] == "loaded"
    assert shop["error"] is None
    assert shop["hooks"] == ["hovle_on_log", "hovle_teachers"]
    assert shop["provides"]["teacher"][1] == {"name": "bigger", "target": "m:B", "summary": "big"}


def test_a_broken_plugin_is_shown_and_does_not_take_the_command_down(probe, capsys, monkeypatch) -> None:
    probe.install("bad", "import not_there_at_all", version="0.3")
    assert main(["plugins", "list"]) == 0
    output = capsys.readouterr()
    assert "bad  (dist-bad 0.3)  BROKEN" in output.out
    assert "probe  (dist-probe 1.0)" in output.out
    assert "hovle: warning: plugin 'bad' of dist-bad 0.3: cannot import" in output.err
    assert "HOVLE_PLUGINS=probe hovle" in output.err

    assert main(["plugins", "list", "--json"]) == 0
    listed = {plugin["name"]: plugin for plugin in json.loads(capsys.readouterr().out)["plugins"]}
    assert listed["bad"]["status"] == "broken"
    assert "not_there_at_all" in listed["bad"]["error"]

    for flag in ("--help", "--version"):
        with pytest.raises(SystemExit) as leave:
            main([flag])
        assert leave.value.code == 0
    capsys.readouterr()

    assert main(["probe", "seven"]) == 2  # what trains or serves does not run on half of the plugins
    assert "hovle: error: 'hovle probe' does not run while a plugin is broken (bad" in capsys.readouterr().err
    monkeypatch.setenv("HOVLE_PLUGINS", "probe")
    assert main(["probe", "seven"]) == 7
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("raise RuntimeError('half way')", "hovle_commands failed: RuntimeError: half way"),
        ("raise SystemExit('gone')", "hovle_commands failed: SystemExit: gone"),
        ("cli.add_parser('probe')", "conflicting subparser: probe .*'probe' of dist-probe 1.0"),
    ],
)
def test_a_plugin_whose_commands_fail_is_broken(probe, capsys, source: str, message: str) -> None:
    probe.install(
        "wreck", f"@hookimpl\ndef hovle_commands(cli):\n    cli.add_parser('wrecked')\n    {source}\n"
    )
    assert main(["plugins", "list"]) == 0
    output = capsys.readouterr()
    assert "wreck  (dist-wreck 1.0)  BROKEN" in output.out
    assert re.search(message, output.out)
    with pytest.raises(SystemExit):
        main(["wrecked"])  # nothing half-built is left
    assert "invalid choice: 'wrecked'" in capsys.readouterr().err


def test_disabled_plugins_are_listed_as_such(probe, capsys, monkeypatch) -> None:
    monkeypatch.setenv("HOVLE_PLUGINS", "")
    assert main(["plugins", "list"]) == 0
    assert "probe  (dist-probe 1.0)  disabled by HOVLE_PLUGINS" in capsys.readouterr().out


def test_wrong_hovle_plugins_is_one_line(probe, capsys, monkeypatch) -> None:
    monkeypatch.setenv("HOVLE_PLUGINS", "prope")
    assert main(["plugins", "list"]) == 2
    assert capsys.readouterr().err.startswith("hovle: error: HOVLE_PLUGINS=prope: ")
