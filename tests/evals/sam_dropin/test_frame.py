"""SAM's geometry against segment_anything's own predictor."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from segment_anything.utils.transforms import ResizeLongestSide

from evals.sam_dropin.masks import fitted_size, make_frame, resize_and_pad
from radio.teachers.sam_decoder import new_released_sam

SIZES = [(480, 640), (640, 427), (100, 100), (33, 1500), (1024, 7)]


@pytest.mark.parametrize("size", SIZES)
def test_images_are_resized_and_padded_as_the_predictor_does(size: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8)
    resized = ResizeLongestSide(128).apply_image(image)
    sam = new_released_sam(768)
    sam.image_encoder.img_size = 128
    theirs = sam.preprocess(torch.from_numpy(resized).permute(2, 0, 1)[None].float())[0]
    mean, std = sam.pixel_mean / 255, sam.pixel_std / 255
    square = resize_and_pad(torch.from_numpy(image).permute(2, 0, 1), 128, tuple(mean.flatten().tolist()))
    torch.testing.assert_close((square - mean) / std, theirs, atol=1e-5, rtol=0)
    assert fitted_size(*size, 128) == resized.shape[:2]


@pytest.mark.parametrize(
    ("size", "inside"), [((1, 900), (1, 112)), ((900, 1), (112, 1)), ((1, 1), (112, 112))]
)
def test_the_thinnest_images_keep_a_pixel(size: tuple[int, int], inside: tuple[int, int]) -> None:
    frame = make_frame(*size, 112)
    assert frame.inside == inside
    square = resize_and_pad(torch.full((3, *size), 255, dtype=torch.uint8), 112, (0.0, 0.0, 0.0))
    assert square.sum() == 3 * inside[0] * inside[1]
    assert frame.masks(torch.ones(2, 28, 28)).shape == (2, *size)


@pytest.mark.parametrize("size", SIZES)
def test_prompts_and_masks_go_where_the_predictor_puts_them(size: tuple[int, int]) -> None:
    frame, transform = make_frame(*size, 1024), ResizeLongestSide(1024)
    points = np.random.default_rng(1).uniform(-5, 700, (6, 2))
    torch.testing.assert_close(
        frame.points(torch.from_numpy(points)),
        torch.as_tensor(transform.apply_coords(points, size), dtype=torch.float),
    )
    logits = torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(2))
    theirs = new_released_sam(768).postprocess_masks(logits[:, None], frame.inside, size)
    torch.testing.assert_close(frame.masks(logits), theirs[:, 0])
