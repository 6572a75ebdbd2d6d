from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from evals.core import features as module
from evals.core.features import Extraction, ViewSettings, extract, make_view, place, to_unit
from radio.chunks import Damage, default_cache, write_tensors
from radio.data import open_source
from radio.dist import Ranks
from radio.errors import DataError, RadioError
from radio.hub import load_backbone
from radio.images import evaluation_view
from radio.resources import fast_products

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 5)


@pytest.fixture
def folder(tmp_path: Path, make_folder: Callable[..., Path]) -> Path:
    """18 images: four chunks, the last of three."""
    return make_folder(tmp_path / "d", classes=3, count=6)


def how(model: Any, **changes: Any) -> Extraction:
    view, _ = make_view(
        model, ViewSettings(view=changes.pop("kind", "center"), size=changes.pop("size", None))
    )
    return Extraction(view=view, device=CPU, **{"batch": 4, **changes})


def slowly(model: Any, folder: Path) -> torch.Tensor:
    """The features one by one, without any of the machinery."""
    source = open_source(str(folder))
    views = [evaluation_view(source.read(i), model.native_size) for i in range(len(source.keys))]
    return torch.cat([model(view[None]).summary for view in views])


@pytest.mark.parametrize("batch", [1, 4, 7, 100])
@pytest.mark.parametrize("workers", [0, 2])
def test_features_equal_one_by_one_at_any_batch_and_workers(
    tmp_path: Path, folder: Path, backbone: Callable, batch: int, workers: int
) -> None:
    model = backbone()
    stored = extract(
        model, open_source(str(folder)), how(model, batch=batch, workers=workers), cache=tmp_path / "cache"
    )
    bank = stored.load()
    assert bank.indices.tolist() == list(range(18))
    assert torch.allclose(bank.features, slowly(model, folder), atol=1e-6)


def test_whole_images_of_many_sizes_go_through_in_groups(
    tmp_path: Path, folder: Path, backbone: Callable
) -> None:
    model, source = backbone(), open_source(str(folder))
    one, many = (
        extract(model, source, how(model, kind="short-side", batch=batch), cache=tmp_path / str(batch))
        for batch in (1, 18)
    )
    assert torch.allclose(one.load().features, many.load().features, atol=1e-6)
    assert not torch.allclose(one.load().features, slowly(model, folder), atol=1e-3)


def test_a_second_time_the_model_is_not_called(tmp_path: Path, folder: Path, backbone: Callable) -> None:
    model = backbone()
    first = extract(model, open_source(str(folder)), how(model), cache=tmp_path / "cache").load()
    calls = model.calls
    assert calls > 0
    again = extract(model, open_source(str(folder)), how(model, batch=9), cache=tmp_path / "cache").load()
    assert model.calls == calls
    assert torch.equal(first.features, again.features)


@pytest.mark.parametrize("change", ["weights", "view", "size", "dtype", "data", "head"])
def test_whatever_changes_the_numbers_changes_the_key(
    tmp_path: Path, folder: Path, backbone: Callable, change: str
) -> None:
    model, cache = backbone(), tmp_path / "cache"
    extract(model, open_source(str(folder)), how(model), cache=cache)
    other = backbone(seed=1) if change == "weights" else backbone()
    settings: dict[str, Any] = {
        "view": {"kind": "short-side"},
        "size": {"size": 40},
        "dtype": {"dtype": torch.bfloat16},
        "head": {"head": "pair", "project": lambda f: f.summary[:, :2]},
    }.get(change, {})
    if change == "data":
        first, second = folder / "c0" / "000.png", folder / "c1" / "000.png"
        first.write_bytes(second.read_bytes())
    extract(other, open_source(str(folder)), how(other, **settings), cache=cache)
    assert len(list(cache.glob("features/*"))) == 2
    if change != "dtype":  # in another type a copy of the model computes
        assert other.images == 18


def test_a_killed_run_goes_on_where_it_stopped(tmp_path: Path, folder: Path, backbone: Callable) -> None:
    model, cache = backbone(), tmp_path / "cache"
    model.fail_after = 12
    with pytest.raises(KeyboardInterrupt):
        extract(model, open_source(str(folder)), how(model), cache=cache)
    assert model.images == 10 or model.images == 12
    fresh = backbone()
    stored = extract(fresh, open_source(str(folder)), how(fresh), cache=cache)
    assert fresh.images == 8  # two chunks of five were there
    assert torch.allclose(stored.load().features, slowly(backbone(), folder), atol=1e-6)


def test_a_damaged_chunk_is_made_again(tmp_path: Path, folder: Path, backbone: Callable) -> None:
    model, cache = backbone(), tmp_path / "cache"
    extract(model, open_source(str(folder)), how(model), cache=cache)
    chunk = next(cache.glob("features/*/000001.safetensors"))
    chunk.write_bytes(chunk.read_bytes()[:-7])
    fresh = backbone()
    stored = extract(fresh, open_source(str(folder)), how(fresh), cache=cache)
    assert fresh.images == 5
    assert torch.allclose(stored.load().features, slowly(backbone(), folder), atol=1e-6)


OTHERS: dict[str, tuple[dict[str, torch.Tensor], str]] = {
    "other keys": ({"others": torch.ones(2)}, "[]"),
    "too few": ({"features": torch.ones(3, 24), "indices": torch.arange(5, 8)}, "[]"),
    "indices beyond": ({"features": torch.ones(5, 24), "indices": torch.arange(100, 105)}, "[]"),
    "indices of another chunk": ({"features": torch.ones(5, 24), "indices": torch.arange(5)}, "[]"),
    "one twice": ({"features": torch.ones(5, 24), "indices": torch.tensor([5, 6, 7, 8, 8])}, "[]"),
    "fewer features": ({"features": torch.ones(4, 24), "indices": torch.arange(5, 10)}, "[]"),
    "half precision": ({"features": torch.ones(5, 24).half(), "indices": torch.arange(5, 10)}, "[]"),
    "left out of another shape": (
        {"features": torch.ones(5, 24), "indices": torch.arange(5, 10)},
        '{"a": 1}',
    ),
    "left out nested": ({"features": torch.ones(5, 24), "indices": torch.arange(5, 10)}, "[" * 100_000),
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_chunk_of_another_shape_is_made_again_though_its_checksum_fits(
    tmp_path: Path, folder: Path, backbone: Callable, other: str
) -> None:
    model, cache = backbone(), tmp_path / "cache"
    extract(model, open_source(str(folder)), how(model), cache=cache)
    tensors, skipped = OTHERS[other]
    chunk = next(cache.glob("features/*/000001.safetensors"))
    write_tensors(chunk, tensors, {"skipped": skipped})
    fresh, damage = backbone(), Damage()
    stored = extract(fresh, open_source(str(folder)), how(fresh), cache=cache, damage=damage)
    assert fresh.images == 5 and str(chunk) in damage.notes()[0]
    assert torch.allclose(stored.load().features, slowly(backbone(), folder), atol=1e-6)


@pytest.mark.parametrize("world", [2, 3, 7])
def test_ranks_share_the_work_without_counting_twice(
    tmp_path: Path, folder: Path, backbone: Callable, world: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Ranks, "gather_objects", lambda self, value: [value])  # one after the other here
    source, cache, model = open_source(str(folder)), tmp_path / "cache", backbone()
    for rank in range(1, world):  # chunks of later ranks are absent, as in folders that are not shared
        with pytest.raises(DataError, match="a folder that all share"):
            extract(model, source, how(model), cache=cache, group=Ranks(rank, world))
    stored = extract(model, source, how(model), cache=cache, group=Ranks(0, world))
    assert model.images == 18
    assert torch.allclose(stored.load().features, slowly(backbone(), folder), atol=1e-6)
    shards = [stored.load(rank, world) for rank in range(world)]
    assert sorted(i for shard in shards for i in shard.indices.tolist()) == list(range(18))


def test_unreadable_images_are_skipped_and_listed(tmp_path: Path, folder: Path, backbone: Callable) -> None:
    whole = (folder / "c1" / "002.png").read_bytes()
    (folder / "c1" / "002.png").write_bytes(whole[: len(whole) // 2])
    for number in range(5):
        (folder / "c0" / f"00{number}.png").write_bytes(b"text")  # the whole first chunk
    model = backbone()
    stored = extract(model, open_source(str(folder)), how(model), cache=tmp_path / "cache")
    assert stored.indices().tolist() == [5, 6, 7, 9, 10, 11, 12, 13, 14, 15, 16, 17]
    assert [skipped.key for skipped in stored.skipped()][-1] == "c1/002.png"
    assert len(stored.skipped()) == 6
    assert "damaged" in stored.skipped()[-1].reason
    assert stored.load().features.shape == (12, 24)
    assert len(stored.load(0, 4).indices) == 0  # rank 0's only chunk


def test_no_readable_image_at_all_is_an_error(tmp_path: Path, folder: Path, backbone: Callable) -> None:
    for path in folder.rglob("*.png"):
        path.write_bytes(b"text")
    model = backbone()
    with pytest.raises(DataError, match=r"none of 18 images can be read; c0/000\.png"):
        extract(model, open_source(str(folder)), how(model), cache=tmp_path / "cache")


def test_values_that_are_not_finite_are_an_error(tmp_path: Path, folder: Path, backbone: Callable) -> None:
    model = backbone()
    model.weight[0, 0] = float("nan")
    with pytest.raises(RadioError, match="not finite"):
        extract(model, open_source(str(folder)), how(model), cache=tmp_path / "cache")


def test_progress_counts_every_image(tmp_path: Path, folder: Path, backbone: Callable) -> None:
    seen: list[int] = []

    @contextmanager
    def watch(label: str, total: int) -> Any:
        assert total == 18
        yield seen.append

    model = backbone()
    extract(model, open_source(str(folder)), how(model), cache=tmp_path / "cache", watch=watch)
    assert sum(seen) == 18


def test_the_cache_lies_where_the_desktop_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert default_cache() == Path("/somewhere/am-radio")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache() == Path.home() / ".cache" / "am-radio"


def test_other_types_leave_the_weights_as_they_were(tmp_path: Path, folder: Path, backbone: Callable) -> None:
    model, before = backbone(), backbone()
    source = open_source(str(folder))
    half = extract(model, source, how(model, dtype=torch.bfloat16), cache=tmp_path / "half").load()
    assert torch.equal(model.weight, before.weight) and model.fingerprint == before.fingerprint
    rounded = backbone().to(CPU, torch.bfloat16)
    assert torch.allclose(half.features, slowly_in_half(rounded, folder))
    full = extract(model, source, how(model), cache=tmp_path / "full").load()
    assert torch.equal(full.features, extract(before, source, how(before), cache=tmp_path).load().features)


def slowly_in_half(model: Any, folder: Path) -> torch.Tensor:
    source = open_source(str(folder))
    views = [evaluation_view(source.read(i), model.native_size)[None] for i in range(len(source.keys))]
    return torch.cat([model(view.to(torch.bfloat16)).summary.float() for view in views])


def test_a_worker_sends_one_tensor_a_batch() -> None:
    """Each tensor that crosses from a worker costs a file descriptor."""
    sizes = [(8, 8), (8, 16), (8, 8), None, (16, 8), (8, 16)]
    items = [
        module._Item(9 - place, None if size is None else torch.rand(3, *size), "" if size else "damaged")
        for place, size in enumerate(sizes)
    ]
    batch = module._collate(items)
    assert sum(isinstance(part, torch.Tensor) for part in batch) == 1
    assert batch.places == [9, 8, 7, 6, 5, 4] and batch.reasons == ["", "", "", "damaged", "", ""]
    start, readable = 0, [item.pixels for item in items if item.pixels is not None]
    for rows, shape in batch.sizes:
        for row in rows:
            end = start + readable[row].numel()
            assert torch.equal(batch.pixels[start:end].view(shape), readable[row])
            start = end
    assert start == len(batch.pixels)


def test_on_a_gpu_products_are_tf32_and_kept_apart(
    monkeypatch: pytest.MonkeyPatch, backbone: Callable
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    gpu = torch.device("cuda:1")
    model = backbone()
    assert how(model).numbers == "torch.float32"
    on_gpu = dataclasses.replace(how(model), device=gpu)
    assert on_gpu.numbers == "TF32"
    assert dataclasses.replace(on_gpu, dtype=torch.bfloat16).numbers == "torch.bfloat16"
    before = torch.get_float32_matmul_precision()
    with fast_products(gpu):
        assert torch.get_float32_matmul_precision() == "high"
    with fast_products(CPU):
        assert torch.get_float32_matmul_precision() == before
    assert torch.get_float32_matmul_precision() == before
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    assert on_gpu.numbers == "torch.float32"


@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e-21, 1e-13, 1.0, 1e18, 1e25, 2e37])
def test_lengths_beyond_float32_are_no_zeros(scale: float) -> None:
    vectors = torch.randn(50, 24, generator=torch.Generator().manual_seed(0)) * scale
    wide = vectors.double()
    expected = wide / wide.pow(2).sum(1, keepdim=True).sqrt()
    assert torch.allclose(to_unit(vectors).double(), expected, atol=1e-6)
    if scale == 1.0:
        assert torch.equal(to_unit(vectors), torch.nn.functional.normalize(vectors, dim=1))
    assert not to_unit(torch.zeros(2, 3)).any()


def test_the_error_of_one_rank_is_raised_on_all(
    tmp_path: Path, folder: Path, backbone: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other rank's error arrives where ranks would otherwise wait for it."""
    theirs = RadioError("pooled as torch.float32 gives values that are not finite")
    answers = iter([[("", None), (None, None)], [None, theirs]])  # the leader's work, then who failed
    monkeypatch.setattr(Ranks, "gather_objects", lambda self, value: next(answers))
    with pytest.raises(RadioError, match="not finite"):
        extract(backbone(), open_source(str(folder)), how(backbone()), cache=tmp_path, group=Ranks(0, 2))


@pytest.mark.parametrize(("student", "last"), [("e-radio-tiny", True), ("vit-tiny12", False)])
def test_only_a_cnns_kernels_are_stored_channels_last(student: str, last: bool) -> None:
    model, plain = (load_backbone(f"arch:{student}", random_init=True) for _ in range(2))
    placed = place(model, torch.device("cpu"), torch.float32)
    assert isinstance(placed, nn.Module)
    kernels = [module.weight for module in placed.modules() if isinstance(module, nn.Conv2d)]
    strided = [kernel for kernel in kernels if not kernel.is_contiguous()]
    assert bool(strided) == last
    assert placed.fingerprint == plain.fingerprint
    images = torch.rand(2, 3, 96, 96)
    with torch.inference_mode():
        assert torch.allclose(placed(images).tokens, plain.eval()(images).tokens, atol=1e-4)  # type: ignore[attr-defined]
