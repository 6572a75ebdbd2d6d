from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from evals.knn import index as module
from evals.knn.index import Index, Neighbours, load_faiss
from radio.dist import Ranks
from radio.errors import DataError, MissingExtraError


def vectors(count: int, width: int = 16, seed: int = 0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def slowly(bank: Tensor, queries: Tensor, k: int, exclude: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """All similarities in float64, and a stable sort: the lower id first among equals."""
    products = F.normalize(queries).double() @ F.normalize(bank).double().T
    if exclude is not None:
        products[torch.arange(len(queries)), exclude] = -torch.inf
    values, ids = products.mul(1e10).round().div(1e10).sort(dim=1, descending=True, stable=True)
    return values[:, :k].float(), ids[:, :k]


def whole(bank: Tensor) -> Index:
    return Index(bank, torch.arange(len(bank)))


@pytest.mark.parametrize("k", [1, 20, 150])
def test_neighbours_equal_a_full_sort(k: int) -> None:
    bank, queries = vectors(3000), vectors(200, seed=1)
    found = whole(bank).search(queries, k)
    values, ids = slowly(bank, queries, k)
    assert torch.equal(found.ids, ids)
    assert torch.allclose(found.similarities, values, atol=2e-6)
    assert found.similarities.dtype == torch.float32


@pytest.mark.parametrize("copies", [1, 3, 40])
def test_blocks_of_the_bank_give_the_same(monkeypatch: pytest.MonkeyPatch, copies: int) -> None:
    bank, queries = vectors(70).repeat(copies, 1), vectors(25, seed=1)
    kept = bank.clone()
    for name, value in (("_ROWS", 11), ("_LEAST_ROWS", 13), ("_PAIRS", 5), ("_EXACT", 4)):
        monkeypatch.setattr(module, name, value)
    exclude = torch.arange(25)
    for k in (1, 9, 60):
        found = whole(bank).search(queries, k, exclude=exclude)
        assert torch.equal(found.ids, slowly(bank, queries, k, exclude)[1])
    assert torch.equal(bank, kept)  # the caller's


def test_length_does_not_matter() -> None:
    bank, queries = vectors(100), vectors(10, seed=1)
    stretched = bank * torch.linspace(0.1, 9, 100)[:, None]
    assert torch.equal(whole(stretched).search(7 * queries, 5).ids, whole(bank).search(queries, 5).ids)


def test_equal_images_come_in_the_order_of_their_ids() -> None:
    bank = vectors(40).repeat(25, 1)  # every vector 25 times: more ties than are fetched beyond k
    queries = vectors(30, seed=1)
    for k in (1, 10, 60):
        found = whole(bank).search(queries, k)
        assert torch.equal(found.ids, slowly(bank, queries, k)[1])


def test_a_collapsed_model_gives_the_first_ids() -> None:
    found = whole(torch.ones(500, 8)).search(torch.ones(3, 8), 7)
    assert torch.equal(found.ids, torch.arange(7).expand(3, 7))
    assert torch.allclose(found.similarities, torch.ones(3, 7))


def test_a_query_is_not_its_own_neighbour() -> None:
    bank = torch.cat([vectors(50), vectors(50)])  # and its double is
    itself = torch.arange(100)
    found = whole(bank).search(bank, 12, exclude=itself)
    assert torch.equal(found.ids, slowly(bank, bank, 12, itself)[1])
    assert torch.equal(found.ids[:, 0], (itself + 50) % 100)


def test_fewer_than_k_leaves_places_empty() -> None:
    bank, queries = vectors(4), vectors(3, seed=1)
    found = whole(bank).search(queries, 6)
    assert torch.equal(found.ids[:, :4], slowly(bank, queries, 4)[1])
    assert (found.ids[:, 4:] == -1).all()
    assert found.similarities[:, 4:].isneginf().all()
    alone = whole(bank).search(bank, 4, exclude=torch.arange(4))
    assert (alone.ids[:, 3] == -1).all()
    assert (alone.ids[:, :3] >= 0).all()


def test_a_vector_of_zeros_is_similar_to_nothing() -> None:
    found = whole(torch.zeros(3, 8)).search(vectors(2, 8), 2)
    assert torch.equal(found.similarities, torch.zeros(2, 2))


def test_bad_requests_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="k = 0"):
        whole(vectors(4)).search(vectors(1), 0)
    with pytest.raises(DataError, match="width 8 do not fit a bank of 16"):
        whole(vectors(4)).search(vectors(1, 8), 1)
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(MissingExtraError, match=r"am-radio\[knn\]"):
        whole(vectors(4))


class Threads:
    """A group whose ranks are threads of this process."""

    def __init__(self, rank: int, world: int, board: dict[tuple[int, int], Tensor], gate: Barrier) -> None:
        self.rank, self.world, self.board, self.gate, self.step = rank, world, board, gate, 0

    def gather(self, array: Tensor) -> Tensor:
        self.step += 1
        self.board[self.step, self.rank] = array.clone()
        self.gate.wait()
        return torch.stack([self.board[self.step, rank] for rank in range(self.world)])

    def sum(self, array: Tensor) -> Tensor:
        return self.gather(array).sum(0)


@pytest.mark.parametrize("world", [2, 3, 5])
@pytest.mark.parametrize("copies", [1, 2, 40])
def test_any_number_of_ranks_gives_the_same(world: int, copies: int) -> None:
    bank, queries = vectors(60).repeat(copies, 1), vectors(25, seed=1)
    ids, board, gate = torch.arange(len(bank)), {}, Barrier(world)

    def search(rank: int) -> Neighbours:
        group: Any = Threads(rank, world, board, gate)
        return Index(bank[rank::world], ids[rank::world]).search(queries, 15, group=group)

    alone = whole(bank).search(queries, 15)
    with ThreadPoolExecutor(world) as pool:
        for together in pool.map(search, range(world)):
            assert torch.equal(together.ids, alone.ids)
            assert torch.allclose(together.similarities, alone.similarities, atol=1e-6)
    assert torch.equal(alone.ids, slowly(bank, queries, 15)[1])


def test_a_rank_without_a_share_takes_part() -> None:
    empty = Index(torch.empty(0, 0), torch.empty(0, dtype=torch.int64))
    found = empty.search(vectors(3), 2, group=Ranks())
    assert (found.ids == -1).all()


def test_faiss_gets_the_processors_kernels_and_the_environment_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str | None] = []
    monkeypatch.delitem(sys.modules, "faiss", raising=False)
    monkeypatch.delenv("OPENBLAS_CORETYPE", raising=False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")

    def require(name: str, extra: str) -> Any:
        seen.append(os.environ.get("OPENBLAS_CORETYPE"))
        return SimpleNamespace(cvar=SimpleNamespace())

    monkeypatch.setattr("evals.knn.index.require", require)
    load_faiss()
    assert seen == ["SkylakeX"]
    assert "OPENBLAS_CORETYPE" not in os.environ
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Zen")
    load_faiss()
    assert seen[1] == os.environ["OPENBLAS_CORETYPE"] == "Zen"


@pytest.mark.parametrize("scale", [1e-35, 1e20, 1e30])
def test_features_of_any_length_have_neighbours(scale: float) -> None:
    bank, queries = vectors(300), vectors(20, seed=1)
    found = whole(bank * scale).search(queries * scale, 10)
    assert torch.equal(found.ids, slowly(bank, queries, 10)[1])
    assert found.similarities[:, 0].min() > 0.3


class _Gpu:
    """FAISS with a GPU, as far as its Python goes: products that are off by a GPU's noise."""

    def __init__(self, fits: bool = True) -> None:
        self._library, self._fits, self.searches, self.device = load_faiss(), fits, 0, -1

    def __getattr__(self, name: str) -> Any:
        return getattr(self._library, name)

    def get_num_gpus(self) -> int:
        return 1

    def StandardGpuResources(self) -> object:
        return object()

    def index_cpu_to_gpu(self, resources: object, device: int, index: Any) -> Any:
        if not self._fits:
            raise RuntimeError("out of memory")
        self.device = device

        def search(queries: Any, k: int) -> Any:
            self.searches += 1
            values, rows = index.search(queries, k)
            noise = np.random.default_rng(0).uniform(-4e-7, 4e-7, values.shape).astype(np.float32)
            order = np.argsort(-(values + noise), axis=1, kind="stable")
            return np.take_along_axis(values + noise, order, 1), np.take_along_axis(rows, order, 1)

        return SimpleNamespace(search=search, add=index.add)


@pytest.mark.parametrize("fits", [True, False])
def test_a_gpu_searches_where_there_is_one_and_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, fits: bool
) -> None:
    bank, queries = vectors(40).repeat(5, 1), vectors(30, seed=1)
    fake = _Gpu(fits)
    monkeypatch.setattr(module, "load_faiss", lambda: fake)
    index = Index(bank, torch.arange(200), torch.device("cuda:3"))
    found = index.search(queries, 12)
    assert (fake.searches, fake.device) == ((1, 3) if fits else (0, -1))
    assert torch.equal(found.ids, slowly(bank, queries, 12)[1])
    monkeypatch.setattr(module, "_MOST_ON_GPU", 10)  # more than it can find
    assert torch.equal(index.search(queries, 12).ids, found.ids)
    assert fake.searches == int(fits)
    Index(bank, torch.arange(200)).search(queries, 12)  # on the CPU nobody asks it
    assert fake.searches == int(fits)
