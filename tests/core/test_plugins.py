"""The loader: what would silently do nothing is refused with a sentence that says what to do."""

import sys

import pytest

from hovle_core import hookspecs
from hovle_core.plugins import HOOKS, PluginError, load_plugins
from hovle_core.registry import KINDS, hook_of

ONE_TEACHER = """
    @hookimpl
    def hovle_teachers(): return [Spec("%s", "m:A", summary="a teacher")]
"""


def test_core_comes_through_the_same_door(site_packages) -> None:
    plugins = load_plugins()
    assert list(plugins.versions) == ["core"]
    assert plugins.versions["core"].startswith("hovle-core ")
    assert (
        plugins.registry.get("backbone", "transformers").target == "hovle_core.backbones:TransformersBackbone"
    )
    assert plugins.registry.provider("backbone", "transformers").distribution == "hovle-core"


def test_hooks_are_those_of_the_design() -> None:
    assert {hook_of(kind) for kind in KINDS} | {
        "hovle_commands",
        "hovle_build_model",
        "hovle_export_model",
        "hovle_on_log",
        "hovle_on_checkpoint",
    } == set(HOOKS)
    assert HOOKS["hovle_on_log"] == ("run", "step", "metrics")
    assert all(getattr(hookspecs, hook).__doc__ for hook in HOOKS)


def test_plugins_load_sorted_by_name_core_first(site_packages) -> None:
    record = """
        import sys
        @hookimpl
        def hovle_on_log(run, step, metrics): run.append(__name__)
        @hookimpl
        def hovle_teachers(): return [Spec(__name__, "m:A")]
    """
    site_packages.install("zebra", record, version="3.1")
    site_packages.install("ape", record)
    plugins = load_plugins()
    assert list(plugins.versions) == ["core", "ape", "zebra"]
    assert plugins.versions["zebra"] == "dist-zebra 3.1"
    assert plugins.registry.provider("teacher", "fake_dist_zebra_zebra") == ("dist-zebra", "3.1")
    called: list[str] = []
    plugins.manager.hook.hovle_on_log(run=called, step=1, metrics={})
    assert called == ["fake_dist_ape_ape", "fake_dist_zebra_zebra"]


def test_nothing_is_global(site_packages) -> None:
    site_packages.install("a", ONE_TEACHER % "x")
    first, second = load_plugins(), load_plugins()
    assert first.manager is not second.manager
    first.without("a", "gone")
    assert second.manager.get_plugin("a") is not None


def test_one_plugin_name_in_two_distributions(site_packages) -> None:
    site_packages.install("twin", "", dist="dist-one", version="1.1")
    site_packages.install("twin", "", dist="dist-two", version="2.2")
    with pytest.raises(
        PluginError, match=r"'twin' is taken by dist-one 1\.1 and dist-two 2\.2; uninstall one"
    ):
        load_plugins()


def test_one_module_as_two_plugins(site_packages) -> None:
    """Two entry points of one module would call its observers twice."""
    site_packages.install("first", "")
    info = site_packages.path / "dist_first-1.0.dist-info" / "entry_points.txt"
    info.write_text(info.read_text() + "second = fake_dist_first_first\n")
    site_packages.allow("second")
    with pytest.raises(PluginError, match="'second' .* same module as plugin 'first'; remove one"):
        load_plugins()
    assert list(load_plugins(strict=False).versions) == ["core", "first"]


def test_versions_are_compared_with_those_of_a_checkpoint(site_packages) -> None:
    site_packages.install("same", "")
    site_packages.install("newer", "", version="2.0")
    site_packages.install("bad", "raise RuntimeError('boom')")
    plugins = load_plugins(strict=False)
    saved = {
        **plugins.versions,
        "newer": "dist-newer 1.0",
        "bad": "dist-bad 1.0",
        "gone": "dist-gone 0.1",
    }
    assert plugins.changed_since(saved) == [
        "plugin 'bad' was dist-bad 1.0 when the checkpoint was written and is broken now",
        "plugin 'gone' was dist-gone 0.1 when the checkpoint was written and is not loaded now",
        "plugin 'newer' was dist-newer 1.0 when the checkpoint was written and is dist-newer 2.0 now",
    ]
    assert plugins.changed_since({"same": "dist-same 1.0"}) == []


def test_nobody_else_can_be_core(site_packages, monkeypatch) -> None:
    site_packages.install("core", "", dist="impostor", version="6.6")
    with pytest.raises(
        PluginError, match=r"plugin 'core' of impostor 6\.6.*taken by hovle-core .* and impostor"
    ):
        load_plugins()
    monkeypatch.setenv("HOVLE_PLUGINS", "")
    assert load_plugins().versions["core"].startswith("hovle-core ")


def test_one_spec_name_in_two_distributions(site_packages) -> None:
    site_packages.install("one", ONE_TEACHER % "same", version="1.1")
    site_packages.install("two", ONE_TEACHER % "same", version="2.2")
    with pytest.raises(
        PluginError, match=r"teacher 'same' is provided by both dist-one 1\.1 and dist-two 2\.2"
    ):
        load_plugins()


def test_core_keeps_its_names(site_packages) -> None:
    site_packages.install("a", '@hookimpl\ndef hovle_backbones(): return [Spec("transformers", "m:A")]\n')
    with pytest.raises(PluginError, match=r"plugin 'a' of dist-a 1\.0.*both hovle-core .* and dist-a 1\.0"):
        load_plugins()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "@hookimpl\ndef hovle_teacher(): return []",
            r"no hook 'hovle_teacher'; did you mean 'hovle_teachers'\?",
        ),
        (
            "def hovle_on_chekpoint(run): pass",
            "no hook 'hovle_on_chekpoint'; did you mean 'hovle_on_checkpoint'",
        ),
        ("hovle_settings = {}", "no hook 'hovle_settings'"),
        ("@hookimpl\ndef on_log(run): pass", "no hook 'on_log'"),
        ("@hookimpl(specname='hovle_on_logs')\ndef log(run): pass", "no hook 'hovle_on_logs'; did you mean"),
        ("def hovle_teachers(): return []", "hovle_teachers is not marked with @hookimpl.*mark it"),
        (
            "@hookimpl\ndef hovle_on_log(run, step=0): pass",
            "'step' has a default value, so it would never be passed",
        ),
        (
            "@hookimpl\ndef hovle_on_log(run, *, step): pass",
            "'step' is keyword-only, so it would never be passed",
        ),
        ("@hookimpl\ndef hovle_on_log(run, *, step=1): pass", "'step' is keyword-only"),
        ("@hookimpl\ndef hovle_on_log(**kwargs): pass", "'kwargs' is variadic.*passes: run, step, metrics"),
        ("@hookimpl\ndef hovle_on_log(run, metric): pass", "no argument 'metric'; did you mean 'metrics'"),
        ("@hookimpl\ndef hovle_teachers(kind): return []", "no argument 'kind'.*passes: nothing"),
        (
            "@hookimpl\ndef hovle_teachers(): return ()",
            "hovle_teachers must return a list of Spec, it returned tuple",
        ),
        ("@hookimpl\ndef hovle_teachers(): return ['a']", "must return a list of Spec, the list holds 'a'"),
        ("@hookimpl\ndef hovle_teachers(): pass", "must return a list of Spec, it returned NoneType"),
        (
            "@hookimpl\ndef hovle_teachers(): yield Spec('a', 'm:A')",
            "must return a list of Spec, it returned generator",
        ),
        ("@hookimpl\ndef hovle_teachers(): return 1 / 0", "hovle_teachers failed: ZeroDivisionError"),
        (
            "@hookimpl\ndef hovle_teachers(): return [Spec('a', 'm.A')]",
            "hovle_teachers failed: ValueError.*'m.A'",
        ),
        (
            "import not_there_at_all",
            "cannot import 'fake_dist_bad_bad': ModuleNotFoundError.*not_there_at_all",
        ),
        ("raise SystemExit(3)", "cannot import 'fake_dist_bad_bad': SystemExit: 3"),
        ("raise BaseException('a panic')", "cannot import 'fake_dist_bad_bad': BaseException: a panic"),
        ("def f(:", "cannot import.*SyntaxError"),
        ("@hookimpl\ndef hovle_teachers(): raise SystemExit(3)", "hovle_teachers failed: SystemExit: 3"),
        ("@hookimpl\nasync def hovle_on_log(run): pass", "hovle_on_log is async and would never be awaited"),
        (
            "@hookimpl(wrapper=True)\ndef hovle_on_log(run): pass",
            "PluginValidationError.*fake_dist_bad_bad|Plugin 'bad' for hook 'hovle_on_log'",
        ),
        (
            "class Lazy:\n    def __getattr__(self, name): raise RuntimeError('not now')\nlazy = Lazy()",
            "RuntimeError: not now",
        ),
        ("HOVLE_HOOK_API = 2", "written for hook API 2, this hovle-core has 1; upgrade hovle-core"),
        ("HOVLE_HOOK_API = 0", "written for hook API 0, this hovle-core has 1; upgrade the plugin"),
        ("del HOVLE_HOOK_API", "does not say for which hook API it was written; add HOVLE_HOOK_API = 1"),
    ],
)
def test_refusals_name_plugin_distribution_and_fix(site_packages, source: str, message: str) -> None:
    site_packages.install("good", ONE_TEACHER % "fine")
    site_packages.install("bad", source + "\n", version="0.3")
    with pytest.raises(PluginError, match=message) as caught:
        load_plugins()
    assert "plugin 'bad' of dist-bad 0.3: " in str(caught.value)
    assert "run without it: HOVLE_PLUGINS=good" in str(caught.value)

    lenient = load_plugins(strict=False)
    assert [(info.name, info.status) for info in lenient.plugins if info.status != "disabled"] == [
        ("core", "loaded"),
        ("bad", "broken"),
        ("good", "loaded"),
    ]
    assert lenient.broken[0].error in str(caught.value)
    assert "bad" not in lenient.versions
    assert lenient.manager.get_plugin("bad") is None
    assert lenient.registry.get("teacher", "fine")


def test_every_broken_plugin_is_named_at_once(site_packages) -> None:
    site_packages.install("a", "import nothing_here")
    site_packages.install("b", "hovle_x = 1")
    with pytest.raises(PluginError, match=r"(?s)dist-a 1\.0.*dist-b 1\.0.*run without it: HOVLE_PLUGINS=$"):
        load_plugins()


def test_what_is_not_a_hook_is_left_alone(site_packages) -> None:
    site_packages.install(
        "fine",
        """
        import hovle_core                   # a module whose name starts like a hook
        from hovle_core import registry
        def helper(a, b=1, *, c): ...
        @hookimpl
        def hovle_on_log(step, metrics): ...   # fewer arguments than there are
        @hookimpl(specname="hovle_teachers")
        def teachers(): return [Spec("t", "m:A")]
        """,
    )
    plugins = load_plugins()
    assert plugins.registry.get("teacher", "t")
    plugins.manager.hook.hovle_on_log(run=None, step=1, metrics={})


def test_one_distribution_may_have_several_plugins(site_packages) -> None:
    site_packages.install("left", ONE_TEACHER % "l", dist="pair")
    site_packages.install("right", ONE_TEACHER % "r", dist="pair")
    plugins = load_plugins()
    assert plugins.versions["left"] == plugins.versions["right"] == "pair 1.0"
    assert [spec.name for _, spec in plugins.provided["left"]] == ["l"]


def test_hovle_plugins_is_an_allow_list(site_packages, monkeypatch) -> None:
    site_packages.install("a", ONE_TEACHER % "a")
    site_packages.install("b", ONE_TEACHER % "b")
    for setting, names in [
        (" b , ", ["core", "b"]),
        ("core,a", ["core", "a"]),
        ("", ["core"]),
        (",", ["core"]),
    ]:
        monkeypatch.setenv("HOVLE_PLUGINS", setting)
        assert list(load_plugins().versions) == names
    assert {info.name for info in load_plugins().plugins if info.status == "disabled"} >= {"a", "b"}
    monkeypatch.delenv("HOVLE_PLUGINS")
    assert {"core", "a", "b"} <= set(load_plugins(strict=False).versions)


def test_hovle_plugins_rescues_and_does_not_even_import(site_packages, monkeypatch) -> None:
    site_packages.install("good", ONE_TEACHER % "fine")
    site_packages.install("bad", "raise RuntimeError('boom')")
    with pytest.raises(PluginError) as caught:
        load_plugins()
    monkeypatch.setenv(*str(caught.value).rsplit(": ", 1)[1].split("="))  # the remedy, taken at its word
    sys.modules.pop("fake_dist_bad_bad", None)
    assert list(load_plugins().versions) == ["core", "good"]
    assert "fake_dist_bad_bad" not in sys.modules


@pytest.mark.parametrize("strict", [True, False])
def test_unknown_name_in_hovle_plugins(site_packages, monkeypatch, strict: bool) -> None:
    site_packages.install("teacher-x", "")
    monkeypatch.setenv("HOVLE_PLUGINS", "teecher-x")
    with pytest.raises(
        PluginError, match=r"HOVLE_PLUGINS=teecher-x: .*did you mean 'teacher-x'\? \(installed: .*core"
    ):
        load_plugins(strict=strict)
