"""Points are sampled as torch samples them, and matched as by a loop over points and positions."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from evals.correspondence import matching as module
from evals.correspondence.matching import THRESHOLD, match, positions, sample_points


def test_points_are_sampled_as_grid_sample_does() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens, points = (
        torch.randn(3, 20, 6, generator=generator),
        torch.rand(50, 2, generator=generator).double(),
    )
    image = torch.randint(0, 3, (50,), generator=generator)
    planes = tokens.transpose(1, 2).unflatten(2, (4, 5))[image]
    places = (2 * points - 1).float()[:, None, None]
    expected = F.grid_sample(planes, places, padding_mode="border", align_corners=False)[..., 0, 0]
    assert sample_points(tokens, (4, 5), image, points) == pytest.approx(expected, abs=1e-5)


def test_positions_are_the_tokens_centres() -> None:
    found = positions((2, 4), torch.device("cpu"))
    assert found.tolist() == [[(x + 0.5) / 4, (y + 0.5) / 2] for y in range(2) for x in range(4)]


@pytest.mark.parametrize("upsample", [1, 3])
@pytest.mark.parametrize("cells", [1, 1 << 26])
def test_a_loop_over_points_gives_the_same(
    upsample: int, cells: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_CELLS", cells)  # one image at a time, or all
    generator = torch.Generator().manual_seed(upsample)
    grid, num_points = (3, 4), 30
    tokens = torch.randn(5, 12, 8, generator=generator)
    images = torch.randint(0, 5, (num_points, 2), generator=generator)
    points = torch.rand(num_points, 2, 2, generator=generator).double()
    reach = 0.3 + torch.rand(num_points, generator=generator).double()
    found = match(tokens, grid, images, points, reach, upsample=upsample)
    unit = F.normalize(tokens, dim=-1).transpose(1, 2).unflatten(2, grid)
    for number in range(num_points):
        source, target = images[number].tolist()
        place = (2 * points[number, 0] - 1).float()[None, None, None]
        asked = F.grid_sample(unit[source][None], place, padding_mode="border", align_corners=False)[
            0, :, 0, 0
        ]
        fine = F.interpolate(unit[target][None], scale_factor=upsample, mode="bilinear")[0]
        offs, cosines = [], []
        height, width = fine.shape[1:]
        for row in range(height):
            for column in range(width):
                x, y = (column + 0.5) / width, (row + 0.5) / height
                off = math.hypot(x - float(points[number, 1, 0]), y - float(points[number, 1, 1]))
                off /= float(reach[number])
                cosine = float(torch.cosine_similarity(asked, fine[:, row, column], dim=0))
                offs.append(off)
                cosines.append(cosine)
        chosen = next(off for off, c in zip(offs, cosines, strict=True) if c > max(cosines) - 2e-6)
        within = sum(off <= THRESHOLD for off in offs)
        assert float(found.error[number]) == pytest.approx(chosen, abs=1e-9)
        assert float(found.nearest[number]) == pytest.approx(min(offs), abs=1e-9)
        assert float(found.chance[number]) == pytest.approx(within / (height * width), abs=1e-12)


def test_an_image_matches_itself() -> None:
    tokens = torch.randn(2, 35, 9, generator=torch.Generator().manual_seed(0))
    centres = positions((5, 7), torch.device("cpu"))
    points = torch.stack([centres, centres], dim=1).repeat(2, 1, 1)
    images = torch.arange(2).repeat_interleave(35)[:, None].expand(-1, 2)
    assert not match(tokens, (5, 7), images, points, torch.full((70,), 0.4).double()).error.any()


def test_the_first_of_equal_positions_is_chosen() -> None:
    """Tokens that differ by rounding alone are equal, whatever the product's order of sums makes of them."""
    tokens = torch.ones(1, 4, 3)
    tokens[0, 2] += 1e-7
    tokens[0, 0] = torch.tensor([1.0, -1.0, 0.0])
    points = torch.tensor([[[0.75, 0.75], [0.75, 0.25]]]).double()  # from the last position to the second
    found = match(tokens, (2, 2), torch.zeros(1, 2, dtype=torch.int64), points, torch.ones(1).double())
    assert float(found.error) == 0


def test_unlike_numbers_of_points_on_the_images() -> None:
    """Images that nothing is searched on, and one that all is searched on."""
    tokens = torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(3))
    points = torch.rand(9, 2, 2, generator=torch.Generator().manual_seed(4)).double()
    images = torch.tensor([[0, 2]] * 8 + [[2, 0]])
    whole = match(tokens, (2, 3), images, points, torch.ones(9).double())
    for number in range(9):
        one = slice(number, number + 1)
        alone = match(tokens, (2, 3), images[one], points[one], torch.ones(1).double())
        assert all(torch.equal(a[one], b) for a, b in zip(whole, alone, strict=True))
