from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from evals.core.evaluator import EvalRun, RunSettings
from evals.seg_probe.data import open_dataset
from evals.seg_probe.protocol import SegSettings, resolve
from radio.chunks import Damage
from radio.dist import Group
from radio.errors import DataError, RadioError

pytestmark = pytest.mark.usefixtures("plugin")


@pytest.fixture
def maps_of(tmp_path: Path, make_ade: Callable, monkeypatch) -> Callable[..., torch.Tensor]:
    from evals.seg_probe import samples
    from evals.seg_probe.samples import Images

    monkeypatch.setattr(samples, "CHUNK", 3)
    root = make_ade(tmp_path / "mine")
    data = open_dataset(root, voc_split="train", known={"ADE20K": [], "VOC2012": []})

    def make(
        model: Any, group: Group | None = None, key: str = "key", damage: Damage | None = None
    ) -> torch.Tensor:
        plan, _ = resolve(SegSettings(data=root, preset="scenes"), model)
        images = Images(data.train, data.labelling, plan, model, training=True)
        shared = RunSettings(cache=tmp_path / "cache", device="cpu", batch_size=2, workers=0)
        run = EvalRun(shared, base="seg", folder=tmp_path / "out", ranks=group)
        run.damage = damage or run.damage
        return samples.token_maps(model, images, run, key=[key], label="tokens")

    return make


def test_maps_are_the_backbones_own_computed_once(maps_of: Callable, backbone: Callable) -> None:
    model = backbone()
    maps = maps_of(model)
    assert (maps.shape, maps.dtype) == ((8, 6, 7, 7), torch.float16)
    assert len(model.sizes) == 8
    assert torch.equal(maps_of(model), maps)
    assert len(model.sizes) == 8
    maps_of(model, key="other")
    assert len(model.sizes) == 16


def test_a_killed_run_goes_on_with_the_chunk_that_is_missing(maps_of: Callable, backbone: Callable) -> None:
    model = backbone()
    model.fail_after = 5
    with pytest.raises(KeyboardInterrupt):
        maps_of(model)
    again = backbone()
    maps = maps_of(again)
    assert len(again.sizes) == 5  # the second and the third chunk
    assert torch.equal(maps, maps_of(backbone(), key="whole"))


def other_keys(data: bytes) -> bytes:
    return safetensors.torch.save({"other": torch.zeros(3)})


def other_numbers(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 64])


def other_shape(data: bytes) -> bytes:
    return safetensors.torch.save({"maps": torch.zeros(3, 6, 7, 8, dtype=torch.float16)})


@pytest.mark.parametrize(
    "spoil", [lambda data: data[:40], lambda data: b"", other_keys, other_numbers, other_shape]
)
def test_a_damaged_chunk_is_made_again_and_said(
    tmp_path: Path, maps_of: Callable, backbone: Callable, spoil: Callable
) -> None:
    maps = maps_of(backbone())
    path = next((tmp_path / "cache").rglob("000001.safetensors"))
    path.write_bytes(spoil(path.read_bytes()))
    model, damage = backbone(), Damage()
    assert torch.equal(maps_of(model, damage=damage), maps)
    assert len(model.sizes) == 3
    assert "1 damaged file of the cache was made again" in damage.notes()[0]


class _Alone(Group):
    """The first of two ranks, whose other never writes."""

    def gather_objects(self, value: Any) -> list[Any]:
        return [value]


def test_ranks_take_turns_and_notice_a_folder_that_is_not_shared(
    maps_of: Callable, backbone: Callable
) -> None:
    model = backbone()
    with pytest.raises(DataError, match="what other ranks made is not here; give --cache a folder"):
        maps_of(model, _Alone(0, 2))
    assert len(model.sizes) == 5  # chunks 0 and 2 of 3 + 3 + 2
    other = backbone()
    assert torch.equal(maps_of(other, _Alone(1, 2)), maps_of(backbone(), key="whole"))
    assert len(other.sizes) == 3


def test_tokens_beyond_half_precision_are_an_error(maps_of: Callable, backbone: Callable) -> None:
    class Loud(type(backbone())):
        def __call__(self, images):
            features = super().__call__(images)
            return features._replace(tokens=features.tokens * 1e6)

    with pytest.raises(RadioError, match=r"not finite in half precision.*--no-keep-tokens"):
        maps_of(Loud())
