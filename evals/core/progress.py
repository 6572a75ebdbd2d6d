"""A progress bar that can say a word about the last step."""

from __future__ import annotations

from typing import Protocol, runtime_checkable


@runtime_checkable
class Telling(Protocol):
    """What a `Watch` may give instead of a bare function: it advances, and shows a text beside the bar."""

    def __call__(self, steps: int) -> None:
        """So many more steps are done."""

    def tell(self, text: str) -> None:
        """Show `text` until the next one: `loss 0.513`."""
