import numpy as np
import pytest

from radio.scenes.drawing import BASE_SIZE, NUM_TEXTURES, crop, noise


def test_textures_use_the_whole_range_and_differ() -> None:
    planes = [crop(texture, 0.3, 0.6, BASE_SIZE) for texture in range(NUM_TEXTURES)]
    for plane in planes:
        assert plane.shape == (BASE_SIZE, BASE_SIZE)
        assert plane.min() >= 0
        assert plane.max() <= 1
        assert plane.std() > 0.1
    assert len({plane.tobytes() for plane in planes}) == NUM_TEXTURES


@pytest.mark.parametrize("size", [32, 192])
def test_another_size_is_the_same_crop_resized(size: int) -> None:
    base, other = crop(0, 0.9, 0.1, BASE_SIZE), crop(0, 0.9, 0.1, size)
    assert other.shape == (size, size)
    assert other.mean() == pytest.approx(base.mean(), abs=0.01)


@pytest.mark.parametrize("size", [96, 1024])
def test_noise_is_standard_normal(size: int) -> None:
    for start in (0.0, 0.5, 0.999999):
        plane = noise(start, size)
        assert plane.shape == (size, size)
        assert plane.mean() == pytest.approx(0, abs=0.05)
        assert plane.std() == pytest.approx(1, abs=0.05)


def test_the_banks_cannot_be_written_to() -> None:
    for plane in (crop(0, 0, 0, BASE_SIZE), noise(0, 32)):
        with pytest.raises(ValueError, match="read-only"):
            plane[0, 0] = 1
    assert np.isfinite(noise(0, 32)).all()
