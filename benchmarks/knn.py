"""Compare the speed of our exact search with plain torch.

100,000 x 1,280 bank, 1,000 queries: `evals.knn.index` against normalising the bank, a matrix product and
a top-k in blocks of it. Runs alternate, in both orders, and the medians of their CPU times are compared.

    python benchmarks/knn.py [--k 20] [--threads 2] [--rounds 5]
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import tyro
from rich.console import Console
from torch import Tensor

from evals.knn.index import Index, load_faiss
from radio.benchmark import alternate

WANTED = 0.95  # at least this fraction of torch's speed


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Sizes and number of rounds of the benchmark."""

    bank: int = 100_000
    width: int = 1280
    queries: int = 1000
    k: int = 20
    block: int = 16_384
    """Bank rows per matrix product in the torch version."""
    rounds: int = 5
    threads: int = 2


def by_torch(bank: Tensor, queries: Tensor, k: int, block: int) -> tuple[Tensor, Tensor]:
    """Find the k highest products of each query and their indices, one block of the bank at a time."""
    values = torch.empty(len(queries), 0)
    places = torch.empty(len(queries), 0, dtype=torch.int64)
    for start in range(0, len(bank), block):
        part = queries @ bank[start : start + block].T
        found, where = part.topk(min(k, part.shape[1]), dim=1)
        values, order = torch.cat([values, found], 1).topk(k, dim=1)
        places = torch.cat([places, where + start], 1).gather(1, order)
    return values, places


def main() -> int:
    """Print both times and their ratio; return 1 when ours is slower than required, else 0."""
    settings = tyro.cli(Settings, description=__doc__)
    console = Console(highlight=False)
    torch.set_num_threads(settings.threads)
    load_faiss().omp_set_num_threads(settings.threads)
    generator = torch.Generator().manual_seed(0)
    bank = torch.randn(settings.bank, settings.width, generator=generator)
    queries = F.normalize(torch.randn(settings.queries, settings.width, generator=generator))
    index = Index(bank, torch.arange(settings.bank))

    def ours() -> Tensor:
        return index.search(queries, settings.k).ids

    def theirs() -> Tensor:
        return by_torch(F.normalize(bank), queries, settings.k, settings.block)[1]

    same = float((ours() == theirs()).double().mean())  # also warms up
    mine, other = alternate([ours, theirs], settings.rounds)
    console.print(
        f"bank {settings.bank} x {settings.width}, {settings.queries} queries, k {settings.k}, "
        f"{settings.threads} threads, {settings.rounds} rounds\n"
        f"index {mine:.3f} s, torch {other:.3f} s of CPU\n"
        f"speed of the index over torch's: {other / mine:.2f} (wanted: {WANTED}), same neighbours: {same:.5f}"
    )
    question = f"k-NN search, bank of {settings.bank} x {settings.width}: torch's product and top-k / ours"
    sys.stdout.write(f"| {question} | {other / mine:.2f} | `python benchmarks/knn.py` |\n")
    return 0 if other / mine >= WANTED else 1


if __name__ == "__main__":
    sys.exit(main())
