"""Dataclass settings to plain data and YAML and back; a key that does not exist is an error."""

from __future__ import annotations

import dataclasses
import os
import secrets
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from .errors import ConfigError, did_you_mean

T = TypeVar("T")


def to_plain(settings: Any) -> Any:
    """Settings as dicts, lists and scalars, in declaration order."""
    if dataclasses.is_dataclass(settings) and not isinstance(settings, type):
        return {f.name: to_plain(getattr(settings, f.name)) for f in dataclasses.fields(settings)}
    if isinstance(settings, Mapping):
        return {str(key): to_plain(value) for key, value in settings.items()}
    if isinstance(settings, (list, tuple)):
        return [to_plain(value) for value in settings]
    return str(settings) if isinstance(settings, Path) else settings


def from_plain(kind: type[T], data: Any, where: str = "") -> T:
    """The settings of type `kind` that `data` describes.

    Raises:
        ConfigError: an unknown or missing key, or a value of the wrong type; says where.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where or 'the settings'}: wanted a mapping, got {type(data).__name__}")
    hints = get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for key in data:
        if key not in fields:
            raise ConfigError(f"unknown setting {_join(where, str(key))!r}{did_you_mean(str(key), fields)}")
    values = {key: _read(hints[key], value, _join(where, key)) for key, value in data.items()}
    required = [
        name
        for name, field in fields.items()
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    missing = [name for name in required if name not in values]
    if missing:
        raise ConfigError(f"missing setting {_join(where, missing[0])!r}; give it a value")
    return kind(**values)


def write_yaml(settings: Any, path: Path) -> None:
    """Write settings as YAML, atomically."""
    write_text(path, yaml.safe_dump(to_plain(settings), sort_keys=False, allow_unicode=True))


def read_yaml(kind: type[T], path: Path) -> T:
    """The settings of type `kind` in a YAML file.

    Raises:
        ConfigError: no such file, not YAML, or settings that `kind` does not have.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: no such settings file")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not a YAML file ({str(error).splitlines()[0]})") from error
    return from_plain(kind, data)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically: readers see the old file or the new one, never a part."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, data: bytes | memoryview) -> None:
    """Write a file atomically, creating its folder: a temporary sibling, synced, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def _read(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if dataclasses.is_dataclass(hint):
        return from_plain(hint, value, where)  # type: ignore[arg-type]
    if origin in (Union, types.UnionType):
        return _read_union(arguments, value, where)
    if origin is Literal:
        if value not in arguments:
            hint_text = did_you_mean(str(value), map(str, arguments))
            raise ConfigError(f"{where}: {value!r} is not one of {', '.join(map(str, arguments))}{hint_text}")
        return value
    if origin is tuple:
        return _read_tuple(arguments, value, where)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        note = "; YAML takes 1e-3 for text, write 1.0e-3" if hint is float and isinstance(value, str) else ""
        raise ConfigError(f"{where}: wanted {hint.__name__}, got {value!r}{note}")
    return value


def _read_union(arguments: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in arguments:
        return None
    errors = []
    for argument in arguments:
        if argument is type(None):
            continue
        try:
            return _read(argument, value, where)
        except ConfigError as error:
            errors.append(error)
    raise errors[0]


def _read_tuple(arguments: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise ConfigError(f"{where}: wanted a list, got {value!r}")
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        kinds: tuple[Any, ...] = (arguments[0],) * len(value)
    else:
        kinds = arguments
    if len(kinds) != len(value):
        raise ConfigError(f"{where}: wanted {len(kinds)} values, got {len(value)}")
    pairs = zip(kinds, value, strict=True)
    return tuple(_read(kind, item, f"{where}[{i}]") for i, (kind, item) in enumerate(pairs))
