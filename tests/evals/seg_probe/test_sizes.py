from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from evals.seg_probe.protocol import (
    SegSettings,
    check_sizes,
    keep_ratio,
    padded,
    resolve,
    shown_sizes,
    slide_crops,
)
from radio.errors import SizeError

DATA = SegSettings(data=Path("somewhere"))


def test_keep_ratio_is_mmcvs(plugin) -> None:
    from mmcv import rescale_size

    generator = np.random.default_rng(0)
    for height, width in generator.integers(1, 3000, (500, 2)).tolist():
        wanted = rescale_size((width, height), (2048, 518))
        assert keep_ratio((height, width), 2048, 518) == (wanted[1], wanted[0])


@pytest.mark.parametrize(
    ("size", "crop", "stride", "wanted"),
    [
        ((518, 683), (518, 518), (518, 518), [(0, 0, 518, 518), (0, 165, 518, 683)]),
        ((10, 10), (10, 10), (3, 3), [(0, 0, 10, 10)]),
        ((4, 9), (4, 4), (3, 3), [(0, 0, 4, 4), (0, 3, 4, 7), (0, 5, 4, 9)]),
    ],
)
def test_slide_crops_by_hand(size, crop, stride, wanted) -> None:
    assert list(slide_crops(size, crop, stride)) == wanted


def test_slide_crops_cover_every_pixel_and_are_all_of_the_crops_size() -> None:
    generator = np.random.default_rng(1)
    for _ in range(200):
        crop = tuple(generator.integers(3, 20, 2).tolist())
        stride = tuple(int(generator.integers(1, side + 1)) for side in crop)
        size = padded(tuple(generator.integers(1, 60, 2).tolist()), crop)
        seen = np.zeros(size, dtype=bool)
        for top, left, bottom, right in slide_crops(size, crop, stride):
            assert (bottom - top, right - left) == crop
            seen[top:bottom, left:right] = True
        assert seen.all()


def test_a_long_image_is_padded_up_to_the_crop(backbone: Callable) -> None:
    plan, _ = resolve(DATA, backbone())
    assert keep_ratio((100, 1000), 2048, 518) == (205, 2048)
    assert shown_sizes([(100, 1000), (683, 518), (3, 3)], plan, backbone()) == {(518, 518)}
    check_sizes([(100, 1000), (683, 518), (3, 3)], plan, backbone())


def test_whole_images_are_fitted(backbone: Callable) -> None:
    plan, _ = resolve(replace(DATA, preset="released"), backbone())
    assert shown_sizes([(512, 683)], plan, backbone()) == {(518, 518), (518, 686)}
    plan, _ = resolve(SegSettings(), backbone())
    assert shown_sizes([(512, 683)], plan, backbone()) == {(98, 98)}


def test_a_backbone_that_contradicts_itself_is_found_out(backbone: Callable) -> None:
    plan, _ = resolve(replace(DATA, crop=504), backbone())
    with pytest.raises(SizeError, match=r"504x504 px, which it does not take.*512x512.*--crop 512"):
        check_sizes([(600, 600)], plan, backbone(16))


def test_slide_over_683_by_518_shows_the_backbone_accepted_sizes_only(plugin, backbone: Callable) -> None:
    import torch

    from radio.dist import Group

    model = backbone()
    plan, _ = resolve(DATA, model)
    kind = {"type": plugin.RadioBackbone, "model": model, "dtype": torch.float32}
    segmentor = plugin.build_model(
        kind, width=6, num_classes=3, config=plan, group=Group(), pixels=True
    ).eval()
    for height, width in ((518, 683), (683, 518), (205, 2048)):
        model.sizes.clear()
        data = segmentor.data_preprocessor(
            {"inputs": [torch.zeros(3, height, width, dtype=torch.uint8)], "data_samples": [_Sample()]}
        )
        meta = [{"img_shape": (height, width), "ori_shape": (height, width)}]
        with torch.no_grad():
            logits = segmentor.slide_inference(data["inputs"], meta)
        crops = slide_crops(padded((height, width), plan.crop), plan.crop, plan.stride)
        assert model.sizes == [(bottom - top, right - left) for top, left, bottom, right in crops]
        assert logits.shape == (1, 3, *padded((height, width), plan.crop))


class _Sample:
    """Takes what padding says of it."""

    def set_metainfo(self, values: dict) -> None:
        self.values = values
