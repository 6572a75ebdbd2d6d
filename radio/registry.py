"""Registries of factories by name, open to other packages through entry points."""

from __future__ import annotations

import functools
import importlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import EntryPoint, entry_points
from types import MappingProxyType
from typing import Any, Generic, NamedTuple, TypeVar, cast

from .errors import ConfigError, RadioError, did_you_mean, shown

T = TypeVar("T")

_MAX_CHARS = 200  # of a name, or of another package's error, in messages
_MAX_LISTED = 20  # names of one prefix in messages
_OURS = (RadioError, OSError, MemoryError, KeyboardInterrupt)  # these are already reported in one line


class Plugin(NamedTuple):
    """An object that another package adds to a registry."""

    kind: str
    point: EntryPoint

    @property
    def package(self) -> str:
        """Name of the package."""
        dist = self.point.dist
        return (dist and dist.metadata["Name"]) or "that package"  # None if its METADATA is absent

    def __str__(self) -> str:
        """Format kind, name and package: `student 'small' (package their-students)`."""
        return f"{self.kind} {self.point.name!r} (package {self.package})"


_made: dict[type, Plugin] = {}  # by the type of the factories' products, the newest last


def words_of(error: BaseException) -> str:
    """Format the error that another package's code raised as one short line."""
    try:
        reason = str(error)
    except Exception:  # noqa: BLE001 (even str() of their error may fail)
        reason = ""
    return f"{type(error).__name__}: {shown(reason[:_MAX_CHARS])}"


def plugin_of(module: str, maker: object) -> Plugin | None:
    """Find a module's plugin; if its package has several, the one that made `maker`, else the last."""
    root = module.partition(".")[0]
    theirs = {kind: plugin for kind, plugin in _made.items() if plugin.point.module.partition(".")[0] == root}
    return theirs.get(type(maker)) or next(reversed(theirs.values()), None)


class Registry(Generic[T]):
    """A mapping from kebab-case names to objects (factories, evaluators).

    Another package adds to a registry through an entry point of the group `am_radio.<kind>s`, for example
    `am_radio.students`. A family covers all names with its prefix.

    Args:
        kind: what its entries are, such as `student`.
        lazy: a plugin that cannot be loaded is an error where it is made, not where the registry is read; a
            registry of factories only.
        modules: this package's modules that register entries, imported when the registry is first read.
        declared: this package's names by the module that registers them, imported when one of them is looked
            up: listing them and asking for them imports nothing. A name `prefix:` declares a family.
    """

    def __init__(
        self,
        kind: str,
        *,
        lazy: bool = False,
        modules: Sequence[str] = (),
        declared: Mapping[str, Sequence[str]] = MappingProxyType({}),
    ) -> None:
        self.kind, self._lazy, self._modules = kind, lazy, modules
        self._declared = {name: module for module, names in declared.items() for name in names}
        self._entries: dict[str, T] = {}
        self._families: dict[str, Callable[[str], T]] = {}
        self._plugins_read = False
        self._plugins: dict[str, Plugin] = {}

    def plugin(self, name: str) -> Plugin | None:
        """Return the plugin that provides `name` or its family; None for this package's entries."""
        return self._plugins.get(name) or self._plugins.get(name.partition(":")[0])

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that registers its object under `name` and returns it.

        Raises:
            ConfigError: the name is taken by another object.
        """

        def enter(value: T) -> T:
            self.add(name, value)
            return value

        return enter

    def add(self, name: str, value: T) -> None:
        """Register `value` under `name`.

        Raises:
            ConfigError: the name is taken by another object.
        """
        own = self._declared.get(name)
        if own is not None and own not in sys.modules:
            importlib.import_module(own)
        if _inner(self._entries.get(name, value)) is not _inner(value):
            raise ConfigError(f"a {self.kind} named {name!r} is registered already; choose another name")
        self._entries[name] = value

    def add_family(self, prefix: str, find: Callable[[str], T]) -> None:
        """Resolve every name `prefix:rest` that is not registered itself by `find(rest)`.

        `find` raises a ConfigError for an unknown name. Listings show registered names only.
        """
        self._families[prefix] = find

    def __getitem__(self, name: str) -> T:
        """Return the object registered under `name`.

        Raises:
            ConfigError: an unknown name (suggests the nearest ones), or a plugin that cannot be loaded.
        """
        self._read_plugins()
        prefix, colon, rest = name.partition(":")
        for key in (name, prefix + colon):
            if name not in self._entries and key in self._declared:
                importlib.import_module(self._declared[key])
        if name not in self._entries:
            if colon and prefix in self._families:
                return self._families[prefix](rest)
            hint = did_you_mean(name, self) or f"; known: {self._listing()}"
            raise ConfigError(f"unknown {self.kind} {name[:_MAX_CHARS]!r}{hint}")
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        self._read_plugins()
        if name in self._entries or name in self._declared:
            return True
        if not isinstance(name, str) or ":" not in name:
            return False
        try:
            self[name]
        except ConfigError:
            return False
        return True

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names, sorted."""
        self._read_plugins()
        declared = (name for name in self._declared if not name.endswith(":"))
        return iter(sorted({*self._entries, *declared}))

    def _listing(self) -> str:
        """List the names for a message; for a prefix with many, such as `timm:`, only their number."""
        prefixes = Counter(name.partition(":")[0] for name in self if ":" in name)
        many = {prefix: count for prefix, count in prefixes.items() if count > _MAX_LISTED}
        names = [name for name in self if name.partition(":")[0] not in many]
        return ", ".join([*names, *(f"{prefix}:NAME ({count} names)" for prefix, count in many.items())])

    def _read_plugins(self) -> None:
        if self._plugins_read:
            return
        self._plugins_read = True  # set first, since a plugin may read this registry while it is loaded
        try:
            for module in self._modules:
                importlib.import_module(module)
            self._load_plugins()
        except Exception:
            self._plugins_read = False
            raise

    def _load_plugins(self) -> None:
        for point in entry_points(group=f"am_radio.{self.kind}s"):
            try:
                value = point.load()
            except (ConfigError, KeyboardInterrupt):
                raise
            except BaseException as error:  # their code may raise anything while it is imported
                blame = self._blame(point, "loaded", error)
                if not self._lazy:
                    raise blame from error
                value = _failing(blame)
            self.add(point.name, self._guarded(point, value))
            self._plugins[point.name] = Plugin(self.kind, point)

    def _guarded(self, point: EntryPoint, value: T) -> T:
        """Wrap another package's factory, so that its errors name the package."""
        if not callable(value):
            return value
        factory: Callable[..., Any] = value

        def make(*arguments: Any, **named: Any) -> Any:
            try:
                product = factory(*arguments, **named)
            except _OURS:
                raise
            except BaseException as error:
                raise self._blame(point, "made", error) from error
            _made.pop(type(product), None)
            _made[type(product)] = Plugin(self.kind, point)
            return product

        return cast(T, functools.update_wrapper(make, factory, updated=()))

    def _blame(self, point: EntryPoint, done: str, error: BaseException) -> ConfigError:
        plugin = Plugin(self.kind, point)
        return ConfigError(
            f"the {self.kind} {point.name!r} of another package ({point.value}) cannot be {done}: "
            f"{words_of(error)}; mend or uninstall {plugin.package}"
        )


def _failing(error: ConfigError) -> Any:
    """Make a factory that raises an error, with the error as its line in listings."""

    def make() -> Any:
        raise error

    make.__doc__ = str(error)
    return make


def _inner(value: Any) -> Any:
    """Return the factory inside a guard; a package that is read twice gets two guards around one factory."""
    return getattr(value, "__wrapped__", value)
