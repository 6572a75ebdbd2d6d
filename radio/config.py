"""Convert dataclass settings to plain data and YAML and back; an unknown key is an error.

Bounds are annotations of the fields, as `Annotated[int, Ge(1)]` or one of the types below; `check` enforces
them, and that every float is finite, for settings from any source.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import io
import json
import math
import operator
import re
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import yaml
from annotated_types import Ge, Gt, Interval, Le, Lt

from .errors import ConfigError, did_you_mean, shown
from .io import brief, read_text, write_text

T = TypeVar("T")

Count = Annotated[int, Interval(ge=1, le=2**31 - 1)]
CountOrZero = Annotated[int, Interval(ge=0, le=2**31 - 1)]  # 0 disables
Pixels = Annotated[int, Interval(ge=1, le=16_384)]  # side of an image
AttentionWindow = Annotated[int, Interval(ge=1, le=16_384)] | Literal["global"]  # side in tokens
Seed = Annotated[int, Interval(ge=0, lt=2**63)]
Workers = Annotated[int, Interval(ge=0, le=1024)]  # processes
Share = Annotated[float, Interval(ge=0, le=1)]
Positive = Annotated[float, Gt(0)]
NotNegative = Annotated[float, Ge(0)]

_COMPARISONS: dict[type, tuple[str, Callable[[Any, Any], bool]]] = {
    Ge: ("of at least", operator.ge),
    Gt: ("above", operator.gt),
    Le: ("of at most", operator.le),
    Lt: ("below", operator.lt),
}
_MAX_TEXT = 4096  # characters: the operating system's limit for a path
_MAX_YAML_BYTES = 1 << 20  # PyYAML takes seconds to parse as much
_MAX_YAML_DEPTH = 50


@dataclasses.dataclass(frozen=True, slots=True)
class ReadWith:
    """Annotation of a field whose type depends on other fields.

    Args:
        read: builds the value from the field's data, the data of all fields, and its place for errors.
    """

    read: Callable[[Any, Mapping[str, Any], str], Any]


def to_plain(settings: Any) -> Any:
    """Convert settings to dicts, lists and scalars, in declaration order."""
    if dataclasses.is_dataclass(settings) and not isinstance(settings, type):
        return {f.name: to_plain(getattr(settings, f.name)) for f in dataclasses.fields(settings)}
    if isinstance(settings, Mapping):
        return {str(key): to_plain(value) for key, value in settings.items()}
    if isinstance(settings, (list, tuple)):
        return [to_plain(value) for value in settings]
    return str(settings) if isinstance(settings, Path) else settings


def defaults_of(settings: Any) -> dict[str, Any]:
    """Return the default of each setting that has one, as plain data: of nested settings, theirs.

    Of a tuple of settings they are those of one element.
    """
    defaults: dict[str, Any] = {}
    for f in dataclasses.fields(settings):
        value = getattr(settings, f.name)
        first = value[0] if isinstance(value, tuple) and value else value
        if dataclasses.is_dataclass(first) and not isinstance(first, type):
            defaults[f.name] = defaults_of(first)
        elif f.default is not dataclasses.MISSING:
            defaults[f.name] = to_plain(f.default)
        elif f.default_factory is not dataclasses.MISSING:
            defaults[f.name] = to_plain(f.default_factory())
    return defaults


def difference(
    old: Mapping[str, Any], new: Mapping[str, Any], defaults: Mapping[str, Any], where: str = ""
) -> str:
    """Describe the first setting that differs, with both values; empty where none does.

    A setting that one side does not know yet counts as its default: so what was made before a program got a
    setting stays valid, and becomes invalid where a default changes.

    Args:
        old: as `to_plain` gave them, perhaps before some settings existed.
        new: likewise.
        defaults: of the new settings, from `defaults_of`.
        where: their place, for the description.
    """
    for name in dict.fromkeys((*old, *new)):
        own: Any = defaults.get(name)
        before, now = old.get(name, own), new.get(name, own)
        inner = own if isinstance(own, Mapping) else {}
        if isinstance(before, dict) and isinstance(now, dict):
            pairs = [(before, now, f"{where}{name}.")]
        elif isinstance(before, list) and isinstance(now, list) and _hold_as_many_settings(before, now):
            pairs = [(b, n, f"{where}{name}[{i}].") for i, (b, n) in enumerate(zip(before, now, strict=True))]
        elif before != now:
            return f"{where}{name} was {_short(before)} and is {_short(now)}"
        else:
            continue
        for part_before, part_now, place in pairs:
            if found := difference(part_before, part_now, inner, place):
                return found
    return ""


def _hold_as_many_settings(before: list[Any], now: list[Any]) -> bool:
    """Check for two lists of as many settings, such as the teachers'."""
    return len(before) == len(now) and all(isinstance(part, dict) for part in (*before, *now))


def _short(value: Any) -> str:
    try:
        text = json.dumps(value)
    except RecursionError:
        return "something nested"
    return text if len(text) <= 60 else f"{text[:57]}..."


def from_plain(kind: type[T], data: Any, where: str = "") -> T:
    """Build the settings of type `kind` that `data` describes.

    Raises:
        ConfigError: an unknown or missing key, or a value of the wrong type; names its place.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where or 'the settings'}: wanted a mapping, got {type(data).__name__}")
    hints = get_type_hints(kind, include_extras=True)
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for key in data:
        if key not in fields:
            name = key if isinstance(key, str) and len(key) <= 80 else brief(key)
            raise ConfigError(f"unknown setting {_join(where, name)!r}{did_you_mean(name, fields)}")
    values = {}
    for key, value in data.items():
        readers = [part for part in getattr(hints[key], "__metadata__", ()) if isinstance(part, ReadWith)]
        place = _join(where, key)
        values[key] = readers[0].read(value, data, place) if readers else _read(hints[key], value, place)
    for name, field in fields.items():
        if name not in values and field.default is field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"missing setting {_join(where, name)!r}; give it a value")
    try:
        settings = kind(**values)
    except ConfigError as error:
        if not where:
            raise
        raise ConfigError(f"{where}: {error}") from error
    return check(settings, where)


def check(settings: T, where: str = "") -> T:
    """Check that each setting is within its field's bounds and each float is finite; return the settings.

    Raises:
        ConfigError: a setting is not; names it, its value and its bounds.
    """
    hints = get_type_hints(type(settings), include_extras=True)
    for field in dataclasses.fields(settings):  # type: ignore[arg-type]
        _check(hints[field.name], getattr(settings, field.name), _join(where, field.name))
    return settings


def check_options(settings: T, renamed: Mapping[str, str] | None = None) -> T:
    """Run `check` on settings from a command line; errors name the option instead of the field.

    Args:
        settings: the settings.
        renamed: fields whose options have another name; an empty one leaves the field's name out.

    Raises:
        ConfigError: as `check`.
    """
    try:
        return check(settings)
    except ConfigError as error:
        place, _, rest = str(error).partition(": ")
        option = re.sub(r"\[(\d+)\](?=\.)", r".\1", place).partition("[")[0]
        first, dot, others = option.partition(".")
        option = f"{(renamed or {}).get(first, first)}{dot}{others}".removeprefix(".")
        raise ConfigError(f"--{option.replace('_', '-')}: {rest}") from None


def write_yaml(settings: Any, path: Path) -> None:
    """Write settings as YAML, atomically."""
    write_text(path, yaml.safe_dump(to_plain(settings), sort_keys=False, allow_unicode=True))


def read_yaml(kind: type[T], path: Path) -> T:
    """Read the settings of type `kind` from a YAML file.

    Raises:
        ConfigError: no such file, not YAML, or settings that `kind` does not have; names the file.
    """
    data = load_yaml(path)
    try:
        return from_plain(kind, data)
    except ConfigError as error:
        raise ConfigError(f"{shown(path)}: {error}") from error


def load_yaml(path: Path) -> Any:
    """Load plain data from a YAML file without tags or aliases and of limited nesting.

    Raises:
        ConfigError: no such file, too large, or not YAML.
    """
    if not path.is_file():
        raise ConfigError(f"{shown(path)}: no such settings file")
    text = read_text(path, limit=_MAX_YAML_BYTES, error=ConfigError)
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: an invalid date
        reason = shown(_reason(error))
        raise ConfigError(f"{shown(path)}: not a YAML file that can be read ({reason})") from error


def _reason(error: Exception) -> str:
    """Describe what is wrong with a YAML file, and where."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem and error.problem_mark:
        mark = error.problem_mark
        return f"{error.problem}: line {mark.line + 1} column {mark.column + 1}"
    return (str(error).splitlines() or [type(error).__name__])[0].split(";")[0]


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader without the constructs that blow up a small file or are easily misread.

    Aliases, deep nesting, duplicate keys, and numbers that are octal or of base 60 are refused.
    """

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Compose one node, as PyYAML does; refuse aliases and deep nesting."""
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("an alias; write the value out")
        self.depth += 1
        if self.depth > _MAX_YAML_DEPTH:
            raise yaml.YAMLError(f"nested more than {_MAX_YAML_DEPTH} deep")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Construct a mapping, as PyYAML does; refuse duplicate keys."""
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if len(set(names)) != len(names):
            key = next(key for place, (key, _) in enumerate(node.value) if key.value in names[:place])
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {brief(key.value)} stands there twice", key.start_mark
            )
        return super().construct_mapping(node, deep)

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        """Construct a number, as PyYAML does; refuse octal and base-60 notation."""
        if ":" in node.value or re.fullmatch(r"[-+]?0[0-9_]+", node.value):
            raise yaml.constructor.ConstructorError(
                None, None, f"{brief(node.value)} is octal or of base 60 to YAML", node.start_mark
            )
        if node.tag.endswith(":int"):
            return self.construct_yaml_int(node)
        return self.construct_yaml_float(node)


for _kind in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _Loader.construct_number)


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def _check(hint: Any, value: Any, where: str) -> None:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        _check_bounds(arguments[1:], value, where)
        _check(arguments[0], value, where)
    elif origin in (Union, types.UnionType):
        for argument in arguments:
            if _fits(argument, value):
                return _check(argument, value, where)
    elif origin is tuple and isinstance(value, tuple):
        kinds = arguments[:1] * len(value) if arguments[-1:] == (Ellipsis,) else arguments
        for i, (kind, item) in enumerate(zip(kinds, value, strict=False)):
            _check(kind, item, f"{where}[{i}]")
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        check(value, where)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            _check(type(item), item, _join(where, key))
    else:
        _check_scalar(value, where)
    return None


def _check_scalar(value: Any, where: str) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{where}: {value} is no number to work with; give a finite one")
    if isinstance(value, (str, Path)) and ("\0" in str(value) or len(str(value)) > _MAX_TEXT):
        raise ConfigError(
            f"{where}: wanted a text of at most {_MAX_TEXT} letters without a NUL among them; mend it"
        )
    if isinstance(value, int) and value.bit_length() > 63:
        raise ConfigError(
            f"{where}: a number of {value.bit_length()} bits is out of range; give a smaller one"
        )


def _fits(hint: Any, value: Any) -> bool:
    """Check whether a value is of the type of a union's member, ignoring bounds."""
    if get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    kind = get_origin(hint) or hint
    if kind is Literal:
        return value in get_args(hint)
    return isinstance(value, kind) if isinstance(kind, type) else False


def _check_bounds(bounds: tuple[Any, ...], value: Any, where: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return
    if isinstance(value, float) and not math.isfinite(value):
        return  # refused by _check_scalar, whatever the bounds
    flat = [part for bound in bounds for part in (bound if isinstance(bound, Interval) else (bound,))]
    fits, limits = True, []
    for part in flat:
        for kind, (words, compare) in _COMPARISONS.items():
            if isinstance(part, kind):
                limit = getattr(part, compare.__name__)
                fits = fits and compare(value, limit)
                limits.append(f"{words} {limit}")
    if not fits:
        raise ConfigError(f"{where}: {brief(value)} is out of bounds; give a number {' and '.join(limits)}")


def _read(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _read(arguments[0], value, where)
    if dataclasses.is_dataclass(hint):
        return from_plain(hint, value, where)  # type: ignore[arg-type]
    if origin in (Union, types.UnionType):
        return _read_union(arguments, value, where)
    if origin is Literal:
        return _read_literal(arguments, value, where)
    if origin is tuple:
        return _read_tuple(arguments, value, where)
    if origin in (Mapping, dict):
        return _read_mapping(arguments, value, where)
    return _read_scalar(hint, value, where)


def _read_literal(known: tuple[Any, ...], value: Any, where: str) -> Any:
    if value not in known:
        names = [str(each) for each in known]
        hint_text = did_you_mean(value, names) if isinstance(value, str) else ""
        raise ConfigError(f"{where}: {brief(value)} is not one of {', '.join(names)}{hint_text}")
    return value


def _read_scalar(hint: Any, value: Any, where: str) -> Any:
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return _as_float(value, where)
    if hint is Any or not isinstance(hint, type):
        raise ConfigError(f"{where}: no file can hold a setting of the type {shown(str(hint))}; leave it out")
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        note = "; YAML takes 1e-3 for text, write 1.0e-3" if hint is float and isinstance(value, str) else ""
        raise ConfigError(f"{where}: wanted {hint.__name__}, got {brief(value)}{note}")
    return value


def _as_float(value: int, where: str) -> float:
    try:
        return float(value)
    except OverflowError:
        raise ConfigError(f"{where}: {brief(value)} is out of range; give a smaller number") from None


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
        raise ConfigError(f"{where}: wanted a list, got {brief(value)}")
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        kinds: tuple[Any, ...] = (arguments[0],) * len(value)
    else:
        kinds = arguments
    if len(kinds) != len(value):
        raise ConfigError(f"{where}: wanted {len(kinds)} values, got {len(value)}")
    pairs = zip(kinds, value, strict=True)
    return tuple(_read(kind, item, f"{where}[{i}]") for i, (kind, item) in enumerate(pairs))


def _read_mapping(arguments: tuple[Any, ...], value: Any, where: str) -> dict[Any, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where}: wanted a mapping, got {brief(value)}")
    keys, kinds = arguments
    return {_read(keys, key, where): _read(kinds, item, _join(where, key)) for key, item in value.items()}


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Pause the garbage collector, which takes a tenth of the time of a help with two hundred options."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def parse_options(kind: type[T], arguments: Sequence[str], **how: Any) -> T:
    """Parse a command line into settings of type `kind`; `how` holds arguments of tyro.cli.

    Raises:
        ConfigError: the settings refuse a value. tyro reports unknown options itself, and exits with 2.
    """
    import tyro  # only for command lines: the settings alone need not wait for it

    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed), _uncollected():  # tyro draws a box before it exits
            return cast(T, tyro.cli(kind, args=list(arguments), **how))
    except SystemExit as stop:
        error = stop.__context__
        while error is not None and not isinstance(error, ConfigError):
            error = error.__context__
        if error is not None:
            raise error from None
        sys.stderr.write(printed.getvalue())
        raise
