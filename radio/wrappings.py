"""What trainers put around a state dict, taken off: keys about it, and prefixes of its names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from .errors import CheckpointError, shown

# Keys under which trainers keep the weights, in the order in which they are looked for: of two copies the
# trained one comes first, of a student and its averaged teacher (DINO) the teacher.
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
    """Find the state dict in what a torch file holds: under a trainer's key, or its only part with tensors.

    Names lose the marks of torch.compile, FSDP and (Distributed)DataParallel.

    Raises:
        CheckpointError: there is none, or several; names the keys that there are.
    """
    if isinstance(data, Mapping) and {"card", "sha256", "tensors"} <= data.keys():
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
    """Take off what a wrapper put before the names, such as `backbone.`, with all that lies beside it.

    Args:
        tensors: a state dict.
        anchors: names that the network has; the prefix is what most of them stand behind. Where none is
            found, everything stays.
        where: names the file in errors.

    Raises:
        CheckpointError: several prefixes would do.
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
    """The mapping under a trainer's key; else, where no tensors are, the only one that holds some."""
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
    """A key for a message: a text cut, a small number, of all else (which may be endless) the type."""
    if isinstance(key, str):
        return shown(key[:60])
    small = isinstance(key, int) and key.bit_length() < 64
    return str(key) if small else f"a {type(key).__name__}"
