from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from evals.core.features import View, ViewSettings
from evals.core.features import make_view as view_of
from radio.errors import ConfigError, DataError, SizeError
from radio.images import evaluation_view, resize


def make_view(
    model: Any, kind: Any, size: int | None, ratio: float = 256 / 224
) -> tuple[View, tuple[str, ...]]:
    return view_of(model, ViewSettings(view=kind, size=size, ratio=ratio))


IMAGE = torch.randint(0, 256, (3, 30, 50), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_the_centre_view_is_the_evaluation_view(backbone: Callable) -> None:
    view, notes = make_view(backbone(), "center", None)
    assert notes == ()
    assert torch.equal(view(IMAGE), evaluation_view(IMAGE, (32, 32)))
    view, notes = make_view(backbone(), "center", 16, ratio=1.0)
    assert notes == ()
    assert torch.equal(view(IMAGE), evaluation_view(IMAGE, (16, 16), 1.0))


def test_the_short_side_view_keeps_the_whole_image(backbone: Callable) -> None:
    view, _ = make_view(backbone(), "short-side", 24)
    assert torch.equal(view(IMAGE), resize(IMAGE, (24, 40)))
    assert torch.equal(view(IMAGE.transpose(1, 2)), resize(IMAGE.transpose(1, 2), (40, 24)))


def test_that_a_model_of_one_size_stretches_whole_images_is_noted(backbone: Callable) -> None:
    model = backbone()
    assert make_view(model, "short-side", None)[1] == ()
    model.fixed_size = True
    (note,) = make_view(model, "short-side", None)[1]
    assert note == "pooled takes 32x32 only, so whole images of another aspect ratio are stretched to it"
    assert make_view(model, "center", None)[1] == ()


@pytest.mark.parametrize("sides", [(2, 900), (900, 1), (1, 33)])
def test_a_strip_is_not_shown_whole(backbone: Callable, sides: tuple[int, int]) -> None:
    image = torch.zeros(3, *sides, dtype=torch.uint8)
    with pytest.raises(DataError, match=f"^{sides[0]}x{sides[1]} .* is over 32 times as long as wide"):
        make_view(backbone(), "short-side", 224)[0](image)
    assert make_view(backbone(), "center", 16)[0](image).shape == (3, 16, 16)
    longest = torch.zeros(3, 2, 64, dtype=torch.uint8)
    assert make_view(backbone(), "short-side", 8)[0](longest).shape == (3, 8, 256)


def test_a_strip_is_not_enlarged_to_gigabytes(backbone: Callable) -> None:
    with pytest.raises(DataError, match=r"1x3000 \(height x width\) would be 256x768000 when resized"):
        make_view(backbone(), "center", 224)[0](torch.zeros(3, 1, 3000, dtype=torch.uint8))


def test_a_size_that_does_not_fit_is_noted_and_a_bad_one_refused(backbone: Callable) -> None:
    view, notes = make_view(backbone(), "center", 30)
    assert view.size == (32, 32)
    assert notes == ("30 px was asked for; pooled takes 32x32, which was used",)
    with pytest.raises(ConfigError, match="size: 0 is out of bounds"):
        make_view(backbone(), "center", 0)
    with pytest.raises(SizeError, match="16000x16000 px are cut out of 18286x18286; the limit is 179 mill"):
        make_view(backbone(), "center", 16_000)
    with pytest.raises(SizeError, match="the limit is 179 million"):
        make_view(backbone(), "short-side", 16_000)


def test_what_decides_the_input_is_in_the_description(backbone: Callable) -> None:
    views = [make_view(backbone(), kind, size, ratio)[0].describe()
             for kind in ("center", "short-side") for size in (16, 32) for ratio in (1.0, 1.2)]  # fmt: skip
    assert len(set(views)) == 6  # the ratio does not matter to the short side
