"""SAM's head against segment_anything's own predictor and builders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from segment_anything import SamPredictor
from segment_anything.build_sam import _build_sam

from radio.errors import CheckpointError
from radio.hub import load_teacher
from radio.teachers.sam import MEMBERS, SamHead, decode, load_sam_head, new_released_sam


@pytest.fixture(scope="module")
def sam():
    """The released shape with random weights that leave no part without effect."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        built = new_released_sam(768)
        for parameter in built.parameters():
            if parameter.ndim == 1:
                torch.nn.init.normal_(parameter, 0.0, 0.2)
    return built.eval()


def predictor_on(
    sam, embeddings: torch.Tensor, size: tuple[int, int], inside: tuple[int, int]
) -> SamPredictor:
    """The library's predictor with an embedding instead of an image."""
    predictor = SamPredictor(sam)
    predictor.features, predictor.is_image_set = embeddings, True
    predictor.original_size, predictor.input_size = size, inside
    return predictor


def test_batched_masks_equal_the_predictor_box_by_box(sam) -> None:
    """At full size, on two images of their own shapes, up to the logits at the stored size."""
    from evals.sam_dropin.masks import make_frame

    generator = torch.Generator().manual_seed(1)
    embeddings = torch.randn(2, 256, 64, 64, generator=generator)
    sizes, which = ((96, 128), (150, 90)), torch.tensor([0, 0, 1])
    boxes = np.array([[10, 12, 60, 80], [0.5, 3.25, 127, 95], [-4, 20, 95, 140]])
    frames = [make_frame(*size, 1024) for size in sizes]
    placed = torch.cat(
        [
            frames[w].points(torch.from_numpy(box).view(2, 2)).view(1, 4)
            for w, box in zip(which, boxes, strict=True)
        ]
    )
    with torch.no_grad():
        found = decode(SamHead(sam, "random"), embeddings, which, boxes=placed)
    for row, image in enumerate(which.tolist()):
        predictor = predictor_on(sam, embeddings[image][None], sizes[image], frames[image].inside)
        masks, quality, low = predictor.predict(box=boxes[row], return_logits=True)
        np.testing.assert_allclose(found.logits[row], low, atol=1e-4, rtol=1e-4)
        np.testing.assert_allclose(found.quality[row], quality, atol=1e-4, rtol=1e-4)
        np.testing.assert_allclose(frames[image].masks(found.logits[row]), masks, atol=1e-4, rtol=1e-4)


def test_clicks_on_and_beside_an_object_equal_the_predictors(sam) -> None:
    embeddings = torch.randn(1, 256, 64, 64, generator=torch.Generator().manual_seed(2))
    points = torch.tensor([[[100.0, 200.0], [700.0, 30.0]], [[5.0, 5.0], [512.0, 512.0]]])
    labels = torch.tensor([[1, 0], [0, 1]])
    with torch.no_grad():
        found = decode(sam, embeddings, torch.zeros(2, dtype=torch.int64), points=points, labels=labels)
    predictor = predictor_on(sam, embeddings, (1024, 1024), (1024, 1024))
    for row in range(2):
        _, quality, low = predictor.predict(points[row].numpy(), labels[row].numpy(), return_logits=True)
        np.testing.assert_allclose(found.logits[row], low, atol=1e-4, rtol=1e-4)
        np.testing.assert_allclose(found.quality[row], quality, atol=1e-4, rtol=1e-4)


def test_a_released_file_is_known_by_its_shapes(tmp_path: Path) -> None:
    """All of a SAM's keys, its image encoder cut to one block: the head is what the library would run."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        whole = _build_sam(MEMBERS["vit_l"].width, 1, 16, [0])
    torch.save(whole.state_dict(), tmp_path / "sam.pth")
    head = load_sam_head("sam:vit_l", tmp_path / "sam.pth")
    assert (head.name, head.token_dim, head.side, head.grid) == ("sam:vit_l", 1024, 1024, (64, 64))
    tokens = torch.randn(1, 1024, 64, 64, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        torch.testing.assert_close(head.embed(tokens), whole.image_encoder.neck(tokens))
    assert head.fingerprint == SamHead(whole, "x").fingerprint
    assert sum(p.numel() for p in head.parameters()) < 8_000_000  # no blocks


def test_the_scenes_head_belongs_to_the_shipped_sam() -> None:
    head = SamHead(load_teacher("scenes:sam").sam, "scenes:sam")
    assert (head.side, head.grid, head.token_dim) == (112, (14, 14), 96)
    assert all(not parameter.requires_grad for parameter in head.parameters())


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="needs a weights file"):
        load_sam_head("sam:vit_b", None)
    torch.save({"image_encoder.neck.0.weight": torch.zeros(256, 99, 1, 1)}, tmp_path / "odd.pth")
    with pytest.raises(CheckpointError, match=r"not a SAM checkpoint: wanted .* of width 768 \(vit_b\)"):
        load_sam_head("sam:vit_b", tmp_path / "odd.pth")
    torch.save({"image_encoder.neck.0.weight": torch.zeros(256, 768, 1, 1)}, tmp_path / "part.pth")
    with pytest.raises(CheckpointError, match="not the weights of this architecture: missing"):
        load_sam_head("sam:vit_b", tmp_path / "part.pth")
