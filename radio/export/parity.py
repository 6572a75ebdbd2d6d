"""Compare what was exported with its checkpoint, on random images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from rich.table import Table
from torch import Tensor

from ..types import Adaptor, Encoder, Features

# Letters: B batch, C summary width, T tokens, D token width.

Reader = Callable[[Tensor], Mapping[str, Tensor]]
"""Maps RGB images [B, 3, h, w] in [0, 1] to outputs by name, with what was written."""

TOLERANCE = 1e-4
"""Largest difference of an output, as a fraction of its largest value."""

BATCHES = (1, 3)
_SEED = 0


class Written(NamedTuple):
    """What a target wrote."""

    readers: dict[str, Reader]  # by the name of the file
    sizes: Sequence[tuple[int, int]]  # (height, width) in pixels, to compare at
    notes: Sequence[str]  # how to load it, and what it cannot express


class Difference(NamedTuple):
    """How far one output of one file is from the checkpoint's."""

    file: str
    output: str
    value: float  # the checkpoint's largest absolute value
    difference: float  # the largest absolute difference

    @property
    def close(self) -> bool:
        """Whether the difference is within the tolerance; NaN is not."""
        return self.difference <= TOLERANCE * self.value


def named_outputs(features: Features, adaptors: Mapping[str, Adaptor]) -> dict[str, Tensor]:
    """Name every output: `summary`, `tokens`, and `NAME_summary`, `NAME_tokens` of each adaptor."""
    outputs = {"summary": features.summary, "tokens": features.tokens}
    for name, adaptor in adaptors.items():
        adapted = adaptor(features)
        outputs[f"{name}_summary"], outputs[f"{name}_tokens"] = adapted.summary, adapted.tokens
    return outputs


def check_sizes(model: Encoder, least: tuple[int, int] = (1, 1)) -> list[tuple[int, int]]:
    """Return up to three (height, width) that a model accepts: its native size, a wide one and a high one."""
    height, width = model.native_size
    wanted = ((height, width), (3 * height // 4, 5 * width // 4), (3 * height // 2, width // 2))
    sizes = (model.nearest_size(max(h, least[0]), max(w, least[1])) for h, w in wanted)
    return list(dict.fromkeys(sizes))


def compare(expected: Reader, written: Written) -> list[Difference]:
    """Compute the largest differences between a checkpoint's outputs and those of each written file."""
    generator = torch.Generator().manual_seed(_SEED)
    rows: dict[tuple[str, str], Difference] = {}
    for size in written.sizes:
        for batch in BATCHES:
            images = torch.rand(batch, 3, *size, generator=generator)
            outputs = expected(images)
            for file, read in written.readers.items():
                for name, given in read(images).items():
                    row = rows.get((file, name), Difference(file, name, 0.0, 0.0))
                    rows[file, name] = row._replace(
                        value=max(row.value, outputs[name].abs().max().item()),
                        difference=_larger(row.difference, _distance(given, outputs[name])),
                    )
    return list(rows.values())


def _distance(given: Tensor, expected: Tensor) -> float:
    """Compute the largest absolute difference; infinite if the shapes differ."""
    if given.shape != expected.shape:
        return float("inf")
    return (given - expected).abs().max().item()


def _larger(first: float, second: float) -> float:
    """Return the larger one, or NaN if one is NaN."""
    return first if first != first or first > second else second


def make_table(rows: Sequence[Difference]) -> Table:
    """Make the table of all differences."""
    table = Table("file", "output")
    for title in ("largest value", "largest difference"):
        table.add_column(title, justify="right")
    for row in rows:
        style = None if row.close else "red"
        table.add_row(row.file, row.output, f"{row.value:.3g}", f"{row.difference:.2g}", style=style)
    return table
