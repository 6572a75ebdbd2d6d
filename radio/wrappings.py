"""Remove what trainers put around a state dict: enclosing keys, and prefixes of its names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from .errors import CheckpointError, shown

# Keys under which trainers store the weights, in the order of the search: of two copies the trained one comes
# first, of a student and its averaged teacher (DINO) the teacher.
_KEYS = (
    *(
        "state_dict",
        "model",
        "model_state_dict",
        "model_state",
        "module",
        "network",
        "net",
        "weights",
        "params",
    ),
    *("teacher", "state_dict_ema", "model_ema", "ema_state_dict", "ema", "params_ema", "student"),
)
_MARKS = (
    "_orig_mod.",
    "_fsdp_wrapped_module.",
    "_checkpoint_wrapped_module.",
)  # compile, FSDP, checkpointing
_PARALLEL = "module."  # DataParallel
_MAX_DEPTH = 4


def find_state(data: Any, where: object) -> dict[str, Tensor]:
    """Find the state dict in a torch file's content: under a trainer's key, or its only part with tensors.

    The marks of torch.compile, FSDP and (Distributed)DataParallel are removed from the names.

    Raises:
        CheckpointError: it has none, or several; names the keys that it has.
    """
    if isinstance(data, Mapping) and {"metadata", "sha256", "tensors"} <= data.keys():
        raise CheckpointError(
            f"{shown(where)}: a checkpoint of am-radio; give the file alone, without family:"
        )
    for _ in range(_MAX_DEPTH):
        inner = _inner(data)
        if inner is None:
            break
        data = inner
    items = list(data.items()) if isinstance(data, Mapping) else []
    tensors = {name: value for name, value in items if isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError(
            f"{shown(where)}: holds no tensors; wanted a state dict, or one under {', '.join(_KEYS[:3])} or "
            f"the like; got {_describe(data)}"
        )
    other = next((name for name in tensors if not isinstance(name, str)), None)
    if other is not None:
        raise CheckpointError(
            f"{shown(where)}: its tensors have no names: one stands under {_shown_key(other)} (a "
            f"{type(other).__name__}); wanted a state dict"
        )
    return _unmarked(tensors, where)


def without_prefix(tensors: dict[str, Tensor], anchors: Collection[str], where: object) -> dict[str, Tensor]:
    """Remove a wrapper's prefix of the names, such as `backbone.`, and drop tensors without that prefix.

    Args:
        tensors: a state dict.
        anchors: names that the network has; the prefix is the one that most of them have. If none occurs,
            everything is returned unchanged.
        where: names the file in errors.

    Raises:
        CheckpointError: several prefixes match equally.
    """
    known = frozenset(anchors)
    hits: Counter[str] = Counter()
    for name in tensors:
        parts = name.split(".")
        for start in range(len(parts)):
            if ".".join(parts[start:]) in known:
                hits["".join(f"{part}." for part in parts[:start])] += 1
    if not hits:
        return tensors
    most = max(hits.values())
    found = [prefix for prefix, count in hits.items() if count == most]
    found = [one for one in found if not any(one != other and one.startswith(other) for other in found)]
    if len(found) > 1:  # a student and its averaged copy
        found = [one for one in found if "teacher" in one or "ema" in one] or found
    if len(found) > 1:
        raise CheckpointError(
            f"{shown(where)}: holds these weights more than once, under "
            f"{' and '.join(repr(shown(one[:80])) for one in found[:3])}; write a file with one of them"
        )
    prefix = found[0]
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _inner(data: Any) -> Mapping[Any, Any] | None:
    """Return the mapping under a trainer's key; else, beside no tensors, the only mapping that holds some."""
    if not isinstance(data, Mapping):
        return None
    for key in _KEYS:
        value = data.get(key)
        if isinstance(value, Mapping) and value:
            return value
    if any(isinstance(value, Tensor) for value in data.values()):
        return None
    inner = [value for value in data.values() if isinstance(value, Mapping) and _has_tensors(value)]
    return inner[0] if len(inner) == 1 else None


def _has_tensors(data: Mapping[Any, Any]) -> bool:
    return any(isinstance(name, str) and isinstance(value, Tensor) for name, value in data.items())


def _unmarked(tensors: Mapping[str, Tensor], where: object) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, value in tensors.items():
        plain = name
        for mark in _MARKS:
            plain = plain.replace(mark, "")
        while plain.startswith(_PARALLEL):
            plain = plain.removeprefix(_PARALLEL)
        if plain in found:
            raise CheckpointError(
                f"{shown(where)}: two tensors are both {shown(plain[:200])} without wrappings"
            )
        found[plain] = value
    return found


def _describe(data: Any) -> str:
    if not isinstance(data, Mapping):
        return f"a {type(data).__name__}"
    keys = ", ".join(_shown_key(key) for key in list(data)[:8])
    return f"the keys {keys}{', …' if len(data) > 8 else ''}" if data else "nothing"


def _shown_key(key: Any) -> str:
    """Format a key for a message: a string cut, a small integer, of anything else (maybe huge) its type."""
    if isinstance(key, str):
        return shown(key[:60])
    small = isinstance(key, int) and key.bit_length() < 64
    return str(key) if small else f"a {type(key).__name__}"
