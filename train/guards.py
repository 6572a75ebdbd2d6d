"""Steps that were skipped because of non-finite values, counted on the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple, final

import torch
from annotated_types import Interval, MaxLen, MinLen
from pydantic import AfterValidator, BeforeValidator
from torch import Tensor
from torch.distributed.tensor import DTensor

from radio.dist import Group
from radio.errors import RadioError


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


FromList = BeforeValidator(_as_tuple)
"""For tuples in files: JSON has lists only."""

_Count = Annotated[int, Interval(ge=0, lt=2**63)]


def _check_names(parts: list[tuple[list[str], list[int]]]) -> list[tuple[list[str], list[int]]]:
    if any(len(names) != len(counts) for names, counts in parts):
        raise ValueError("wanted a count for each name")
    return parts


Parts = Annotated[list[Annotated[tuple[list[str], list[_Count]], FromList]], AfterValidator(_check_names)]
Plain = Annotated[
    tuple[Annotated[list[_Count], MinLen(4), MaxLen(4)], Parts],
    FromList,
]
"""A guard's counts as stored in a state."""


class Skipped(NamedTuple):
    """Skipped steps."""

    total: int  # steps of the whole run
    recent: int  # steps since the last reading
    names: tuple[str, ...]  # non-finite losses in those, such as "clip/spatial"; () = only a gradient

    def describe(self) -> str:
        """Describe the recent skipped steps in a line for the log."""
        steps = "1 step was" if self.recent == 1 else f"{self.recent} steps were"
        what = ", ".join(self.names) or "a gradient of finite losses"
        return f"{steps} left out, not finite: {what}"


def first_bad(tensors: Mapping[str, Tensor]) -> str:
    """Return the name of the first tensor with a NaN or an infinity, or an empty string. One host sync.

    Of sharded tensors only this rank's part is checked.
    """
    floats = {
        name: tensor.to_local() if isinstance(tensor, DTensor) else tensor
        for name, tensor in tensors.items()
        if tensor.is_floating_point()
    }
    if not floats:
        return ""
    fine = torch.stack([torch.isfinite(tensor).all() for tensor in floats.values()]).tolist()
    return next((name for name, good in zip(floats, fine, strict=True) if not good), "")


@final
class NonFiniteMonitor:
    """Counts the skipped steps; reading the counts is the only host sync."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._counts = torch.zeros(
            4, dtype=torch.long, device=device
        )  # total, recent, in a row, most in a row
        self._parts: dict[tuple[str, ...], Tensor] = {}

    def update(self, fine: Tensor, lessons: Sequence[Mapping[str, Tensor]]) -> None:
        """Count a step: skipped unless `fine` ([] bool), and those of its losses that are not finite."""
        bad = (~fine).long()
        total, recent, row, longest = self._counts.unbind()
        row = (row + 1) * bad
        self._counts = torch.stack((total + bad, recent + bad, row, torch.maximum(longest, row)))
        for parts in lessons:
            found = (~torch.isfinite(torch.stack(list(parts.values())))).long()
            held = self._parts.get(tuple(parts))
            self._parts[tuple(parts)] = found if held is None else held + found

    def check(self, step: int, most: int) -> None:
        """Check that fewer than `most` steps in a row were skipped since the last reading.

        Raises:
            RadioError: `most` or more were.
        """
        longest = int(self._counts[3])
        if longest >= most:
            names = ", ".join(self._names()) or "elsewhere than in this rank's losses"
            raise RadioError(
                f"step {step}: {longest} steps in a row were left out, not finite: {names}; what was saved "
                f"last stands. Begin anew with --restart and a lower --optim.lr, or raise "
                f"--max-nonfinite-steps"
            )

    def check_any(self, steps: int) -> None:
        """Check that not all `steps` of a run were skipped: it may be too short for `check` to notice.

        Raises:
            RadioError: all were skipped.
        """
        if int(self._counts[0]) == steps:
            raise RadioError(
                f"all of the {steps} steps were left out, losses or gradients not being finite (the log "
                f"names them); nothing was learned. Begin anew with --restart and a lower --optim.lr"
            )

    def read(self, group: Group, step: int, most: int) -> Skipped:
        """Return the steps skipped since the last reading, and reset.

        Raises:
            RadioError: `most` or more steps in a row were skipped.
        """
        self.check(step, most)
        total, recent, row, _ = (int(count) for count in self._counts.tolist())
        names = dict.fromkeys(name for mine in group.gather_objects(self._names()) for name in mine)
        self._counts = torch.tensor([total, 0, row, row], device=self._device)
        self._parts = {}
        return Skipped(total, recent, tuple(names))

    def _names(self) -> list[str]:
        """Return the names of this rank's losses that were not finite since the last reading."""
        return [
            name
            for names, counts in self._parts.items()
            for name, count in zip(names, counts.tolist(), strict=True)
            if count
        ]

    def state(self) -> Plain:
        """Return the state that an exact resume needs, as plain numbers."""
        return self._counts.tolist(), [(list(names), row.tolist()) for names, row in self._parts.items()]

    def restore(self, state: Plain) -> None:
        """Restore what `state` returned."""
        counts, parts = state
        self._counts = torch.tensor(counts, device=self._device)
        self._parts = {tuple(names): torch.tensor(row, device=self._device) for names, row in parts}
