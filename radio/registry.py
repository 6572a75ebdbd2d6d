"""Names to factories, with entry points for other people's packages."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, NamedTuple, TypeVar, cast

from .errors import ConfigError, RadioError, did_you_mean, shown

T = TypeVar("T")

_MAX_CHARS = 200  # of a name in messages, and of what other packages raise
_MAX_LISTED = 20  # names of one prefix in messages
_OURS = (RadioError, OSError, MemoryError, KeyboardInterrupt)  # these are told in one line as they are


class Plugin(NamedTuple):
    """What another package adds."""

    kind: str
    point: EntryPoint

    @property
    def package(self) -> str:
        """The package's name."""
        dist = self.point.dist
        return (dist and dist.metadata["Name"]) or "that package"  # None where its METADATA are absent

    def __str__(self) -> str:
        """Kind, name and package: `student 'small' (package their-students)`."""
        return f"{self.kind} {self.point.name!r} (package {self.package})"


_made: dict[type, Plugin] = {}  # by the types of what the factories gave, the newest last


def words_of(error: BaseException) -> str:
    """What another package's code raised, on one short line."""
    try:
        said = str(error)
    except Exception:  # noqa: BLE001 (their error may not even be printable)
        said = ""
    return f"{type(error).__name__}: {shown(said[:_MAX_CHARS])}"


def plugin_of(module: str, maker: object) -> Plugin | None:
    """The plugin that a module belongs to; of a package with several that which gave `maker`, or the last."""
    root = module.partition(".")[0]
    theirs = {kind: plugin for kind, plugin in _made.items() if plugin.point.module.partition(".")[0] == root}
    return theirs.get(type(maker)) or next(reversed(theirs.values()), None)


class Registry(Generic[T]):
    """A mapping from kebab-case names to objects (factories, evaluators).

    A package outside this one adds to a registry through an entry point of the group
    `am_radio.<kind>s`, for example `am_radio.students`. A family stands for all names with its prefix.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}
        self._families: dict[str, Callable[[str], T]] = {}
        self._plugins_read = False
        self._plugins: dict[str, Plugin] = {}

    def plugin(self, name: str) -> Plugin | None:
        """The plugin that brings what stands under `name`, or its family; None for our own."""
        return self._plugins.get(name) or self._plugins.get(name.partition(":")[0])

    def register(self, name: str) -> Callable[[T], T]:
        """A decorator that enters its object under `name` and gives it back.

        Raises:
            ConfigError: the name is taken by something else.
        """

        def enter(value: T) -> T:
            self.add(name, value)
            return value

        return enter

    def add(self, name: str, value: T) -> None:
        """Enter `value` under `name`.

        Raises:
            ConfigError: the name is taken by something else.
        """
        if _inner(self._entries.get(name, value)) is not _inner(value):
            raise ConfigError(f"a {self.kind} named {name!r} is registered already; choose another name")
        self._entries[name] = value

    def add_family(self, prefix: str, find: Callable[[str], T]) -> None:
        """Let `find(rest)` answer for every name `prefix:rest` that is not entered itself.

        `find` raises a ConfigError for what it does not know. A listing shows entered names only.
        """
        self._families[prefix] = find

    def __getitem__(self, name: str) -> T:
        """What stands under `name`.

        Raises:
            ConfigError: nothing does, and the nearest names are offered; or a plugin cannot be loaded.
        """
        self._read_plugins()
        if name not in self._entries:
            prefix, colon, rest = name.partition(":")
            if colon and prefix in self._families:
                return self._families[prefix](rest)
            hint = did_you_mean(name, self._entries) or f"; known: {self._listing()}"
            raise ConfigError(f"unknown {self.kind} {name[:_MAX_CHARS]!r}{hint}")
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        self._read_plugins()
        if name in self._entries or not isinstance(name, str):
            return name in self._entries
        try:
            self[name]
        except ConfigError:
            return False
        return True

    def __iter__(self) -> Iterator[str]:
        """The names, sorted."""
        self._read_plugins()
        return iter(sorted(self._entries))

    def _listing(self) -> str:
        """The names for a message; of a prefix with many, such as `timm:`, how many there are."""
        prefixes = Counter(name.partition(":")[0] for name in self._entries if ":" in name)
        many = {prefix: count for prefix, count in prefixes.items() if count > _MAX_LISTED}
        names = [name for name in sorted(self._entries) if name.partition(":")[0] not in many]
        return ", ".join([*names, *(f"{prefix}:NAME ({count} names)" for prefix, count in many.items())])

    def _read_plugins(self) -> None:
        if self._plugins_read:
            return
        self._plugins_read = True  # first, since a plugin may look into this registry while it is loaded
        try:
            self._load_plugins()
        except ConfigError:
            self._plugins_read = False
            raise

    def _load_plugins(self) -> None:
        for point in entry_points(group=f"am_radio.{self.kind}s"):
            try:
                value = point.load()
            except (ConfigError, KeyboardInterrupt):
                raise
            except BaseException as error:  # whatever their code raises while it is imported
                raise self._blame(point, "loaded", error) from error
            self.add(point.name, self._guarded(point, value))
            self._plugins[point.name] = Plugin(self.kind, point)

    def _guarded(self, point: EntryPoint, value: T) -> T:
        """Another package's factory, whose own errors become one that names the package."""
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


def _inner(value: Any) -> Any:
    """What a guard stands around; a package that is read twice gets two guards around one factory."""
    return getattr(value, "__wrapped__", value)
