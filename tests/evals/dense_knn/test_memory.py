from __future__ import annotations

import weakref
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from evals.dense_knn import memory
from evals.dense_knn.memory import CompressedIndex, check_fits, count_patches, count_pixels, draw, num_lists
from evals.knn.index import Index
from radio.errors import SizeError


@pytest.mark.parametrize(
    ("images", "size", "tokens", "counts"),
    [
        (4, 8, 16, [2, 2, 2, 2]),
        (4, 10, 16, [2, 3, 2, 3]),
        (4, 2, 16, [0, 1, 0, 1]),
        (3, 1000, 16, [16, 16, 16]),
    ],
)
def test_every_image_gives_as_many_patches(images: int, size: int, tokens: int, counts: list[int]) -> None:
    assert count_patches(images, size, tokens) == counts


def test_pixels_are_counted_as_by_a_loop() -> None:
    generator = np.random.default_rng(0)
    labels = [generator.integers(0, 6, (12, 18)).astype(np.uint8) for _ in range(3)]
    for each in labels:
        each[each == 5] = 255
    found = count_pixels(labels, (2, 3), 6, 5)  # at their own size
    for number, each in enumerate(labels):
        for row in range(2):
            for column in range(3):
                cell = each[6 * row : 6 * row + 6, 6 * column : 6 * column + 6]
                expected = [(cell == label).sum() for label in range(5)]
                assert found[number, 3 * row + column].tolist() == expected
    twice = count_pixels([np.kron(each, np.ones((2, 2), np.uint8)) for each in labels], (2, 3), 6, 5)
    assert torch.equal(twice, found)  # enlarged, and reduced again
    assert torch.equal(count_pixels(labels, (2, 3), 12, 5), 4 * found)


def test_draws_depend_on_seed_and_image_alone() -> None:
    pixels = torch.ones(3, 50, 2, dtype=torch.int16)
    pixels[:, 20:] = 0  # void
    rows = draw(pixels, [4, 7, 9], [5, 0, 30], seed=3)
    assert rows.tolist() == sorted(rows.tolist()) and len(set(rows.tolist())) == 25
    first, last = rows[:5], rows[5:] - 100
    assert (first < 20).all() and last.tolist() == list(range(20))
    assert torch.equal(draw(pixels[:1], [4], [5], seed=3), first)
    assert not torch.equal(draw(pixels[:1], [5], [5], seed=3), first)
    assert not torch.equal(draw(pixels[:1], [4], [5], seed=4), first)


def test_a_compressed_index_finds_most_of_the_nearest() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(20_000, 24, generator=generator) + 2
    queries = torch.randn(50, 24, generator=generator) + 2
    parts = lambda: iter(tokens.split(700))  # noqa: E731
    found = CompressedIndex(len(tokens), parts).search(queries, 10)
    exact = Index(tokens, torch.arange(len(tokens))).search(queries, 10)
    shared = [len(set(a) & set(b)) for a, b in zip(found.ids.tolist(), exact.ids.tolist(), strict=True)]
    assert sum(shared) / 500 > 0.8
    cosines = torch.nn.functional.cosine_similarity(queries.unsqueeze(1), tokens[found.ids], dim=2)
    torch.testing.assert_close(found.similarities, cosines, atol=0.01, rtol=0)
    few = CompressedIndex(5, lambda: iter([tokens[:5]])).search(queries, 8)
    assert few.ids[:, 5:].eq(-1).all() and few.similarities[:, 5:].isneginf().all()


def test_a_compressed_index_keeps_no_part_in_memory() -> None:
    tokens, seen = torch.randn(300, 8), []

    def read() -> Iterator[torch.Tensor]:
        for part in tokens.split(100):
            assert not any(kept() is not None for kept in seen[:-1])  # the last one is still the reader's
            copied = part.clone()
            seen.append(weakref.ref(copied.untyped_storage()))
            yield copied

    CompressedIndex(300, read)
    assert len(seen) == 6


def test_lists_grow_with_the_memory() -> None:
    assert [num_lists(count) for count in (1, 77, 78, 10_000, 10_000_000)] == [1, 1, 2, 256, 12_649]


def test_a_memory_that_does_not_fit_is_refused_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "memory_of", lambda device: 20 * 10**9)
    check_fits(10**6, 1280, 150, compressed=False)
    with pytest.raises(SizeError, match=r"10,000,000 patches of width 1,280 take 60.6 GB, and this machine"):
        check_fits(10**7, 1280, 150, compressed=False)
    check_fits(10**7, 1280, 21, compressed=True)
    with pytest.raises(SizeError, match=r"give a smaller --memory$"):
        check_fits(10**8, 1280, 150, compressed=True)
