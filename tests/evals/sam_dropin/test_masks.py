"""SAM's geometry, clicks and overlaps against segment_anything, SciPy, numpy, pycocotools and OpenCV."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage
from scipy.ndimage import distance_transform_edt
from segment_anything.utils.transforms import ResizeLongestSide

from evals.sam_dropin.masks import count, erode, fitted_size, make_frame, next_clicks, pack, resize_and_pad
from radio.teachers.sam import new_released_sam

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


def masks(count: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    low = torch.rand(2 * count, 1, 5, 6, generator=generator)
    both = torch.nn.functional.interpolate(low, (40, 48), mode="bilinear")[:, 0] > 0.55
    return both[:count], both[count:]


def slow_click(truth: np.ndarray, predictions: np.ndarray) -> tuple[tuple[int, int], int]:
    """One object at a time, the image padded with outside."""
    missed, surplus = truth & ~predictions, predictions & ~truth
    label = int(missed.sum() >= surplus.sum())
    region = missed if label else surplus
    if not region.any():
        region = truth
    depth = distance_transform_edt(np.pad(region, 1))[1:-1, 1:-1]
    row, column = np.unravel_index(depth.argmax(), depth.shape)
    return (int(column), int(row)), label


def test_clicks_equal_one_object_at_a_time() -> None:
    truth, predictions = masks()
    points, labels = next_clicks(truth, predictions)
    for row in range(len(truth)):
        (x, y), label = slow_click(truth[row].numpy(), predictions[row].numpy())
        assert points[row].tolist() == [x, y]
        assert labels[row] == label
    assert set(labels.tolist()) == {0, 1}


def test_the_first_click_is_inside_and_positive() -> None:
    truth, _ = masks()
    points, labels = next_clicks(truth, None)
    assert labels.tolist() == [1] * len(truth)
    assert all(truth[row, int(y), int(x)] for row, (x, y) in enumerate(points.tolist()))


def test_a_perfect_and_an_empty_object_are_clicked_somewhere() -> None:
    truth, _ = masks(2)
    truth[1] = False
    points, labels = next_clicks(truth, truth.clone())
    assert truth[0, int(points[0, 1]), int(points[0, 0])]
    assert points[1].tolist() == [0, 0]
    assert labels.tolist() == [1, 1]


def some_masks(height: int, width: int, share: float) -> torch.Tensor:
    return torch.rand(4, height, width, generator=torch.Generator().manual_seed(height)) < share


@pytest.mark.parametrize("size", [(1, 1), (8, 3), (13, 9), (64, 50)])
def test_bits_are_numpys_and_are_counted(size: tuple[int, int]) -> None:
    masks = some_masks(*size, 0.5)
    masks[0] = True
    packed = pack(masks)
    np.testing.assert_array_equal(packed.numpy(), np.packbits(masks.numpy(), axis=1, bitorder="little"))
    assert count(packed).tolist() == masks.sum((1, 2)).tolist()


@pytest.mark.parametrize("reach", [1, 2, 3, 4, 7, 11, 16])
@pytest.mark.parametrize("size", [(13, 9), (40, 33), (64, 50)])
def test_erosion_is_scipys(size: tuple[int, int], reach: int) -> None:
    """Down to nothing, where the square is larger than the image."""
    masks = some_masks(*size, 0.97)
    masks[0] = True
    theirs = [
        ndimage.binary_erosion(mask, np.ones((3, 3)), iterations=reach, border_value=0)
        for mask in masks.numpy()
    ]
    assert torch.equal(erode(pack(masks), reach), pack(torch.from_numpy(np.stack(theirs))))
