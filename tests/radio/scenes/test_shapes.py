import numpy as np
import pytest

from radio.scenes.drawing import SHAPES, cover, outlines


def polygon_area(points: np.ndarray) -> float:
    x, y = points.T
    return abs(float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))) / 2


@pytest.mark.parametrize("shape", range(len(SHAPES)))
@pytest.mark.parametrize(("angle", "stretch"), [(0.0, 1.0), (0.7, 1.17), (-0.6, 0.85)])
def test_coverage_sums_to_the_area_of_the_polygon(shape: int, angle: float, stretch: float) -> None:
    """Turning and stretching (by s and 1 / s) keep the area; a rim is half a sub-pixel wide."""
    outline = outlines()[shape]
    area = polygon_area(outline.rim) - (polygon_area(outline.hole) if outline.hole is not None else 0)
    coverage = cover(shape, centre=(100.3, 99.6), radius=60, angle=angle, stretch=stretch, size=200)
    assert coverage.alpha.sum() == pytest.approx(area * 60**2, rel=0.03)


def test_the_centre_of_a_shape_moves_by_fractions_of_a_pixel() -> None:
    def middle(x: float) -> float:
        coverage = cover(0, centre=(x, 48), radius=20, angle=0, stretch=1, size=96)
        columns = np.arange(coverage.alpha.shape[1]) + coverage.x0 + 0.5
        return float((coverage.alpha.sum(axis=0) * columns).sum() / coverage.alpha.sum())

    for x in (48.0, 48.25, 48.5, 48.75):
        assert middle(x) == pytest.approx(x, abs=0.15)  # half a sub-pixel up and left, all shapes alike
        assert middle(x) - middle(48.0) == pytest.approx(x - 48.0, abs=0.03)


def test_a_shape_is_cut_at_the_border_and_empty_outside() -> None:
    whole = cover(1, centre=(48, 48), radius=20, angle=0, stretch=1, size=96)
    half = cover(1, centre=(0, 48), radius=20, angle=0, stretch=1, size=96)
    assert half.x0 == 0
    assert half.alpha.sum() == pytest.approx(whole.alpha.sum() / 2, rel=0.02)
    assert cover(1, centre=(-40, 48), radius=20, angle=0, stretch=1, size=96).alpha.size == 0


def test_every_outline_fits_the_unit_circle() -> None:
    for outline in outlines():
        assert np.hypot(*outline.rim.T).max() <= 1.2
