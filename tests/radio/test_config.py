"""Settings to plain data and YAML and back; everything unknown or mistyped is an error."""

from __future__ import annotations

import gc
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml
from annotated_types import Ge

from radio.config import (
    Count,
    Pixels,
    Share,
    check,
    check_options,
    from_plain,
    load_yaml,
    parse_options,
    read_yaml,
    to_plain,
    write_yaml,
)
from radio.errors import ConfigError
from radio.io import write_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Optimiser:
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    steps: int
    out: Path = Path("runs/x")
    optim: Optimiser = field(default_factory=Optimiser)
    mode: Literal["before", "after"] = "before"
    clip: float | None = None
    limit: int | Literal["all"] = 3
    many: tuple[Optimiser, ...] = ()
    names: tuple[str, ...] = ("a",)
    shuffle: bool = True


FULL = Settings(
    steps=7,
    out=Path("/tmp/ünï code"),
    optim=Optimiser(lr=3e-5, betas=(0.5, 1.0)),
    mode="after",
    clip=1.0,
    limit="all",
    many=(Optimiser(lr=1.0), Optimiser()),
    names=("yes", "1e3", "null", ""),
    shuffle=False,
)


@pytest.mark.parametrize("settings", [Settings(steps=1), FULL])
def test_yaml_brings_back_equal_settings_of_equal_types(tmp_path, settings):
    path = tmp_path / "new" / "config.yaml"
    write_yaml(settings, path)
    again = read_yaml(Settings, path)
    assert again == settings
    assert type(again.clip) is type(settings.clip) and isinstance(again.out, Path)
    assert yaml.safe_load(path.read_text(encoding="utf-8")) == to_plain(settings)
    assert list(to_plain(settings))[:3] == ["steps", "out", "optim"]


def test_what_is_left_out_takes_its_default_and_whole_numbers_may_be_floats():
    assert from_plain(Settings, {"steps": 2, "optim": {"lr": 1}}) == Settings(
        steps=2, optim=Optimiser(lr=1.0)
    )
    assert type(from_plain(Optimiser, {"lr": 1}).lr) is float


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"steps": 1, "stesp": 2}, r"unknown setting 'stesp'; did you mean steps\?"),
        ({"steps": 1, "optim": {"lrr": 2}}, r"unknown setting 'optim.lrr'; did you mean lr\?"),
        ({"steps": 1, "many": [{}, {"zzz": 1}]}, r"unknown setting 'many\[1\].zzz'$"),
        ({"out": "x"}, "missing setting 'steps'; give it a value"),
        ({"steps": "1"}, "steps: wanted int, got '1'"),
        ({"steps": 1.0}, "steps: wanted int, got 1.0"),
        ({"steps": True}, "steps: wanted int, got True"),
        ({"steps": None}, "steps: wanted int, got None"),
        ({"steps": 1, "shuffle": 1}, "shuffle: wanted bool, got 1"),
        ({"steps": 1, "optim": {"lr": "1e-3"}}, "optim.lr: wanted float, got '1e-3'; .* write 1.0e-3"),
        ({"steps": 1, "optim": {"lr": False}}, "optim.lr: wanted float, got False"),
        ({"steps": 1, "optim": 3}, "optim: wanted a mapping, got int"),
        ({"steps": 1, "mode": "befor"}, r"mode: 'befor' is not one of before, after; did you mean before\?"),
        ({"steps": 1, "clip": "big"}, "clip: wanted float, got 'big'"),
        ({"steps": 1, "names": "abc"}, "names: wanted a list, got 'abc'"),
        ({"steps": 1, "names": ["a", 2]}, r"names\[1\]: wanted str, got 2"),
        ({"steps": 1, "optim": {"betas": [0.9]}}, "optim.betas: wanted 2 values, got 1"),
        ({"steps": 1, "out": 3}, "out: wanted Path, got 3"),
        ([1], "the settings: wanted a mapping, got list"),
    ],
)
def test_what_does_not_fit_is_an_error_that_says_where(data: Any, message: str):
    with pytest.raises(ConfigError, match=message):
        from_plain(Settings, data)


def test_a_file_that_is_no_settings_file_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match=r"absent\.yaml: no such settings file"):
        read_yaml(Settings, tmp_path / "absent.yaml")
    bad = tmp_path / "bad.yaml"
    for content in (
        b"a: [1",
        b"!!python/object/apply:os.getcwd []",
        b"a: 2026-13-01",
        b"a: " + b"9" * 5000,
        b"[" * 100_000,
        b"a: &x [1]\nb: [*x, *x]",
        b"a: \x00",
    ):
        bad.write_bytes(content)
        with pytest.raises(ConfigError, match=r"bad\.yaml: not a YAML file"):
            read_yaml(Settings, bad)
    bad.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"bad\.yaml: is not UTF-8 text"):
        read_yaml(Settings, bad)
    bad.write_text("")
    with pytest.raises(ConfigError, match="wanted a mapping, got NoneType"):
        read_yaml(Settings, bad)


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, failing):
    path = tmp_path / "file"
    write_bytes(path, b"old")

    def fail(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(*((os, "fsync", fail) if failing == "fsync" else (Path, "replace", fail)))
    with pytest.raises(OSError, match="no space left"):
        write_bytes(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    write_bytes(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_files_get_the_rights_that_any_new_file_gets(tmp_path):
    write_bytes(tmp_path / "ours", b"")
    (tmp_path / "plain").touch()
    assert stat.S_IMODE((tmp_path / "ours").stat().st_mode) == stat.S_IMODE(
        (tmp_path / "plain").stat().st_mode
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Bounded:
    steps: Count = 1
    side: Pixels | None = None
    share: Share = 0.5
    betas: tuple[Share, Share] = (0.0, 1.0)
    window: Literal["all"] | Annotated[int, Ge(2)] = "all"
    many: tuple[Optimiser, ...] = ()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, "steps: 0 is out of bounds; give a number of at least 1 and of at most 2147483647"),
        ({"steps": 10**26}, "steps: 1000.* is out of bounds"),
        ({"side": -4}, "side: -4 is out of bounds; give a number of at least 1"),
        ({"share": float("nan")}, "share: nan is no number to work with; give a finite one"),
        ({"betas": [0.5, 1.5]}, r"betas\[1\]: 1.5 is out of bounds; give a number of at least 0"),
        ({"window": 1}, "window: 1 is out of bounds; give a number of at least 2"),
        ({"many": [{}, {"lr": float("inf")}]}, r"many\[1\].lr: inf is no number"),
    ],
)
def test_a_number_out_of_its_bounds_is_refused_by_name(values: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        from_plain(Bounded, values)


def test_settings_made_in_python_are_held_to_the_same_bounds():
    good = Bounded(side=16, window=2)
    assert check(good) is good
    with pytest.raises(ConfigError, match="side: 0 is out of bounds"):
        check(Bounded(side=0))
    with pytest.raises(ConfigError, match="a number of 87 bits is out of range"):
        check(Settings(steps=10**26))


@dataclass(frozen=True, kw_only=True)
class Part:
    batch_size: Count = 1
    names: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Whole:
    parts: tuple[Part, ...] = ()
    final_lr: Share = 0.5
    out: Path = Path("x")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            Whole(final_lr=2.0),
            "--final-lr: 2.0 is out of bounds; give a number of at least 0 and of at most 1",
        ),
        (Whole(parts=(Part(), Part(batch_size=0))), "--parts.1.batch-size: 0 is out of bounds"),
        (Whole(parts=(Part(names=("a", "b\0")),)), "--parts.0.names: wanted a text of at most 4096 letters"),
        (Whole(out=Path("x" * 5000)), "--out: wanted a text of at most 4096 letters"),
    ],
)
def test_settings_of_a_command_line_go_by_their_options(settings: Whole, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        check_options(settings)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("final_lr: 1" + "0" * 400, "final_lr: a number of 1329 bits is out of range"),
        ("final_lr: 0x1" + "0" * 9000, "final_lr: a number of 36001 bits is out of range"),
        (
            "parts: [{batch_size: 0x1" + "0" * 9000 + "}]",
            "parts[0].batch_size: a number of 36001 bits is out",
        ),
        ("out: [0x1" + "0" * 9000 + "]", "out: wanted Path, got a list of 1"),
        ("? 0x1" + "0" * 9000 + "\n: 3", "unknown setting 'a number of 36001 bits'"),
        ("? " + "x" * 5000 + "\n: 3", "unknown setting"),
    ],
)
def test_values_of_any_size_are_one_short_error(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_yaml(Whole, tmp_path / "x.yaml")
    assert str(caught.value).removeprefix(f"{tmp_path / 'x.yaml'}: ").startswith(message)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: 3\nsteps: 4\n", "the key 'steps' stands there twice: line 2 column 1"),
        ("a:\n  b: 1\n  c: 2\n  'b': 3\n", "the key 'b' stands there twice: line 4 column 3"),
        ("steps: 010\n", "'010' is octal or of base 60 to YAML: line 1 column 8"),
        ("steps: 1:30\n", "'1:30' is octal or of base 60 to YAML: line 1 column 8"),
        ("lr: 1:30.5\n", "'1:30.5' is octal or of base 60 to YAML: line 1 column 5"),
        ("a:\n\tb: 1\n", r"found character '\\t' that cannot start any token: line 2 column 1"),
        ("? [a]\n: 2\n", "found unhashable key: line 1 column 3"),
    ],
)
def test_what_says_something_else_than_it_seems_to_is_refused(text: str, message: str, tmp_path: Path):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ConfigError, match=rf"x\.yaml: not a YAML file that can be read \({message}\)$"):
        read_yaml(Whole, tmp_path / "x.yaml")


def test_settings_that_do_not_fit_name_their_file(tmp_path: Path):
    (tmp_path / "x.yaml").write_text("nothing: 1\n")
    with pytest.raises(ConfigError, match=r"x\.yaml: unknown setting 'nothing'"):
        read_yaml(Whole, tmp_path / "x.yaml")
    (tmp_path / "y.yaml").write_text("a: {x: 0, y: -0.5, z: 0x1f, u: 1_000, v: 0o7}\n")
    assert load_yaml(tmp_path / "y.yaml") == {"a": {"x": 0, "y": -0.5, "z": 31, "u": 1000, "v": "0o7"}}


@dataclass(frozen=True, kw_only=True)
class Even:
    number: int = 0

    def __post_init__(self) -> None:
        if self.number % 2:
            raise ConfigError(f"number = {self.number} is odd")


def test_a_command_line_ends_with_the_collector_as_it_was() -> None:
    for enabled in (True, False):
        (gc.enable if enabled else gc.disable)()
        try:
            assert parse_options(Even, ["--number", "2"]) == Even(number=2)
            with pytest.raises(ConfigError, match="odd"):
                parse_options(Even, ["--number", "3"])
            with pytest.raises(SystemExit):
                parse_options(Even, ["--help"])
            assert gc.isenabled() is enabled
        finally:
            gc.enable()


@dataclass(frozen=True, kw_only=True)
class Nested:
    even: Even = Even()
    others: Any = None
    numbers: list[int] = field(default_factory=list)
    by_name: Mapping[Literal["a", "b"], Even] = field(default_factory=dict)


def test_what_settings_of_a_section_refuse_is_told_with_its_place() -> None:
    with pytest.raises(ConfigError, match=r"^even: number = 3 is odd$"):
        from_plain(Nested, {"even": {"number": 3}})
    with pytest.raises(ConfigError, match=r"^number = 3 is odd$"):
        from_plain(Even, {"number": 3})


def test_a_mapping_of_settings_is_checked_by_its_keys() -> None:
    settings = Nested(others={"mine": Even(), "rate": float("inf")})
    with pytest.raises(ConfigError, match=r"^--rate: inf is no number to work with"):
        check_options(settings, {"others": ""})


def test_a_mapping_goes_through_plain_data() -> None:
    settings = Nested(by_name={"b": Even(number=4)})
    assert to_plain(settings)["by_name"] == {"b": {"number": 4}}
    assert from_plain(Nested, {"by_name": {"b": {"number": 4}}}) == settings


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, r"^by_name: wanted a mapping, got 3$"),
        ({"c": {}}, r"^by_name: 'c' is not one of a, b"),
        ({"a": {"numbr": 4}}, r"^unknown setting 'by_name\.a\.numbr'; did you mean number\?$"),
        ({"a": {"number": 3}}, r"^by_name\.a: number = 3 is odd$"),
    ],
)
def test_bad_items_of_a_mapping_are_told_by_their_place(value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_plain(Nested, {"by_name": value})


@pytest.mark.parametrize("key", ["numbers", "others"])
def test_a_setting_of_a_type_that_no_file_can_hold_is_told(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{key}: no file can hold a setting of the type "):
        from_plain(Nested, {key: [1]})
