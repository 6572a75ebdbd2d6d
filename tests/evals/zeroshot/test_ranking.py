from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from evals.zeroshot import evaluator as module
from evals.zeroshot.evaluator import image_to_text, rank_classes, text_to_image


@pytest.fixture(params=[1, 40, 1 << 23])
def _block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """From one row a block to all at once."""
    monkeypatch.setattr(module, "_CELLS", request.param)


@pytest.fixture
def vectors() -> tuple[Tensor, Tensor, Tensor]:
    """17 images of any length, 40 unit captions of which some are equal, and whose they are."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(17, 6, generator=generator) * 30
    owners = torch.cat([torch.arange(17), torch.randint(0, 17, (23,), generator=generator)]).sort().values
    texts = F.normalize(images[owners] / 30 + torch.randn(40, 6, generator=generator), dim=1)
    texts[7] = texts[31] = texts[20]
    return images, texts, owners


@pytest.mark.usefixtures("_block")
def test_classes_are_ranked_as_by_argsort(vectors: tuple[Tensor, Tensor, Tensor]) -> None:
    images, texts, _ = vectors
    found = rank_classes(images, texts[:9].T)
    cosines = F.normalize(images, dim=1) @ texts[:9].T
    assert torch.equal(found.classes, cosines.argsort(dim=1, descending=True)[:, :5])
    torch.testing.assert_close(found.cosines.float(), cosines.sort(dim=1, descending=True).values[:, :5])


@pytest.mark.usefixtures("_block")
def test_classes_nearer_than_the_rounding_of_float32_are_ranked_exactly() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(50, 64, generator=generator)
    nearby = torch.randn(64, 1, generator=generator) + 1e-6 * torch.randn(64, 30, generator=generator)
    classifier = F.normalize(nearby, dim=0)
    cosines = F.normalize(images.double(), dim=1) @ classifier.double()
    exact = cosines.argsort(dim=1, descending=True)[:, :5]
    in_float32 = (F.normalize(images, dim=1) @ classifier).argsort(dim=1, descending=True)[:, :5]
    assert not torch.equal(in_float32, exact)
    assert torch.equal(rank_classes(images, classifier).classes, exact)


@pytest.mark.usefixtures("_block")
def test_equal_classes_come_in_their_order(vectors: tuple[Tensor, Tensor, Tensor]) -> None:
    images, texts, _ = vectors
    same = texts[:1].T.expand(-1, 7)
    assert rank_classes(images, same).classes.tolist() == [[0, 1, 2, 3, 4]] * 17


def test_fewer_than_five_classes_leave_places_empty(vectors: tuple[Tensor, Tensor, Tensor]) -> None:
    images, texts, _ = vectors
    found = rank_classes(images, texts[:3].T)
    assert found.classes[:, 3:].unique().tolist() == [-1]
    assert found.classes[:, :3].sort(dim=1).values.tolist() == [[0, 1, 2]] * 17


@pytest.mark.usefixtures("_block")
def test_captions_before_the_best_own_one_are_counted(vectors: tuple[Tensor, Tensor, Tensor]) -> None:
    images, texts, owners = vectors
    cosines = (F.normalize(images.double(), dim=1) @ texts.double().T).round(decimals=10)
    expected = []
    for row in range(17):
        order = cosines[row].argsort(descending=True, stable=True).tolist()
        expected.append(next(place for place, text in enumerate(order) if owners[text] == row))
    assert image_to_text(images, texts, owners).tolist() == expected


@pytest.mark.usefixtures("_block")
def test_images_before_a_captions_own_are_counted(vectors: tuple[Tensor, Tensor, Tensor]) -> None:
    images, texts, owners = vectors
    cosines = (texts.double() @ F.normalize(images.double(), dim=1).T).round(decimals=10)
    orders = cosines.argsort(dim=1, descending=True, stable=True).tolist()
    expected = [order.index(int(owner)) for order, owner in zip(orders, owners, strict=True)]
    assert text_to_image(images, texts, owners).tolist() == expected
