"""Names to factories; other packages add theirs through entry points."""

from __future__ import annotations

import importlib
import inspect
import sys
from pathlib import Path

import pytest

from radio.errors import ConfigError, MissingExtraError, RadioError, did_you_mean, require
from radio.registry import Registry
from radio.students import _OPTIONS, students
from radio.teachers import families


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """A function that installs a package with one entry point into a folder on the path."""

    def install(name: str, target: str, code: str) -> None:
        info = tmp_path / f"{name}_plugin-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}-plugin\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[am_radio.widgets]\n{name} = {target}\n")
        Path(tmp_path / f"{name}_widgets.py").write_text(code)

    monkeypatch.syspath_prepend(tmp_path)
    return install


def test_names_lead_to_what_was_registered():
    registry: Registry[int] = Registry("widget")
    registry.add("two", 2)
    assert registry.register("one")(1) == 1
    assert registry["one"] == 1 and "two" in registry and "three" not in registry
    assert list(registry) == ["one", "two"]


def test_a_name_that_nobody_knows_gets_the_nearest_or_all():
    registry: Registry[int] = Registry("widget")
    registry.add("vit-b16", 1)
    registry.add("vit-b32", 2)
    with pytest.raises(ConfigError, match=r"unknown widget 'vit-b61'; did you mean vit-b16 or vit-b32\?"):
        registry["vit-b61"]
    with pytest.raises(ConfigError, match=r"unknown widget 'zzz'; known: vit-b16, vit-b32"):
        registry["zzz"]


def test_a_family_answers_for_every_name_with_its_prefix():
    registry: Registry[str] = Registry("widget")

    def find(rest: str) -> str:
        if rest.startswith("no"):
            raise ConfigError(f"the family has no {rest}")
        return rest.upper()

    registry.add_family("many", find)
    registry.add("many:own", "entered")
    assert (registry["many:x"], registry["many:own"]) == ("X", "entered")
    assert "many:x" in registry and "many:no" not in registry and "few:x" not in registry
    assert list(registry) == ["many:own"]
    with pytest.raises(ConfigError, match="the family has no nothing"):
        registry["many:nothing"]


def test_a_taken_name_is_an_error_unless_the_same_thing_holds_it():
    registry: Registry[object] = Registry("widget")
    first = object()
    registry.add("one", first)
    registry.add("one", first)
    with pytest.raises(ConfigError, match="a widget named 'one' is registered already"):
        registry.add("one", object())
    assert registry["one"] is first


def test_entry_points_of_other_packages_are_found(plugin):
    plugin("theirs", "theirs_widgets:make", "def make(): return 'made'\n")
    registry = Registry("widget")
    registry.add("ours", lambda: "own")
    assert list(registry) == ["ours", "theirs"]
    assert registry["theirs"]() == "made"


def test_an_entry_point_that_takes_a_name_of_ours_is_an_error(plugin):
    plugin("ours", "ours_widgets:make", "def make(): return 'made'\n")
    registry = Registry("widget")
    registry.add("ours", lambda: "own")
    with pytest.raises(ConfigError, match="a widget named 'ours' is registered already"):
        registry["ours"]


@pytest.mark.parametrize(
    "code",
    ["import a_module_that_is_nowhere\n", "x = 1\n", "1 / 0\n", "raise SystemExit(3)\n", "def make(:\n"],
)
def test_a_broken_plugin_is_named_every_time(plugin, code):
    plugin("broken", "broken_widgets:make", code)
    registry = Registry("widget")
    for _ in range(2):
        with pytest.raises(
            ConfigError, match=r"'broken' of another package \(broken_widgets:make\)"
        ) as caught:
            list(registry)
        assert "mend or uninstall broken-plugin" in str(caught.value) and "\n" not in str(caught.value)


def test_a_long_family_is_counted_and_not_spelled_out():
    registry = Registry("widget")
    for name in ("plain", "few:1", *(f"many:{number}" for number in range(1000))):
        registry.register(name)(object())
    with pytest.raises(
        ConfigError, match=r"^unknown widget ''; known: few:1, plain, many:NAME \(1000 names\)$"
    ):
        registry[""]


def test_hints_name_what_is_near():
    assert did_you_mean("knnn", ["knn", "zeroshot"]) == "; did you mean knn?"
    assert did_you_mean("qqqq", ["knn", "zeroshot"]) == ""


def test_an_optional_library_that_is_absent_names_its_extra(plugin):
    assert require("json", extra="knn").dumps([1]) == "[1]"
    with pytest.raises(MissingExtraError, match=r'nowhere_lib is not installed; .*"am-radio\[knn\]"'):
        require("nowhere_lib", extra="knn")
    assert issubclass(MissingExtraError, RadioError) and issubclass(RadioError, ValueError)
    plugin("partial", "partial_widgets:x", "import another_missing_lib\n")
    with pytest.raises(ModuleNotFoundError, match="another_missing_lib"):  # theirs to explain, not ours
        require("partial_widgets", extra="knn")


class Unprintable(Exception):
    def __str__(self) -> str:
        raise ValueError("no words")


@pytest.mark.parametrize(
    "raised",
    [
        "GeneratorExit()",
        "BaseException('x')",
        "Unprintable()",
        "SystemExit(3)",
        "RuntimeError('a\\nb' * 9999)",
    ],
)
def test_whatever_a_plugin_or_its_factory_raises_is_one_short_error(plugin, raised):
    setup = "from tests.radio.test_registry import Unprintable\n" if "Unprintable" in raised else ""
    plugin("late", "late_widgets:make", f"{setup}def make(): raise {raised}\n")
    registry = Registry("widget")
    with pytest.raises(
        ConfigError, match=r"the widget 'late' of another package .* cannot be made"
    ) as caught:
        registry["late"]()
    assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)
    plugin("early", "early_widgets:make", f"{setup}raise {raised}\n")
    for _ in range(2):  # the good one before it is entered again each time
        with pytest.raises(ConfigError, match=r"'early' of another package .* cannot be loaded"):
            list(Registry("widget"))


def test_what_a_plugins_factory_says_to_the_user_is_left_as_it_is(plugin):
    plugin(
        "kept", "kept_widgets:make", "from radio.errors import SizeError\ndef make(): raise SizeError('7')\n"
    )
    with pytest.raises(RadioError, match=r"^7$"):
        Registry("widget")["kept"]()


def test_declared_names_are_those_that_the_modules_register() -> None:
    for registry in (students, families):
        declared = {name for name in registry._declared if not name.endswith(":")}
        for module in set(registry._declared.values()):
            importlib.import_module(module)
        makers = {name: getattr(made, "func", made) for name, made in registry._entries.items()}
        assert declared == {name for name, made in makers.items() if made.__module__.startswith("radio.")}
        assert set(registry) >= declared


def test_a_declared_name_imports_its_module_only_when_it_is_looked_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry: Registry[int] = Registry("widget", declared={"declared_widgets": ["one", "more:"]})
    (tmp_path / "declared_widgets.py").write_text(
        "import builtins\nregistry = builtins.declared_registry\n"
        "registry.add('one', 1)\nregistry.add_family('more', len)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("builtins.declared_registry", registry, raising=False)
    assert list(registry) == ["one"] and "one" in registry and "two" not in registry
    assert "declared_widgets" not in sys.modules
    with pytest.raises(ConfigError, match="unknown widget 'ones'; did you mean one"):
        registry["ones"]
    assert "declared_widgets" not in sys.modules
    with pytest.raises(ConfigError, match="'one' is registered already"):
        registry.add("one", 2)
    assert registry["one"] == 1 and registry["more:abc"] == 3
    monkeypatch.delitem(sys.modules, "declared_widgets")


def test_options_are_those_of_the_factories() -> None:
    for name, kind in _OPTIONS.items():
        factory = students[name]
        first = next(iter(inspect.signature(factory, eval_str=True).parameters.values()))
        assert first.annotation is kind, name
