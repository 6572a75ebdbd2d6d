import math

from radio.scenes.world import Figure, layout_scene


def figures(count: int) -> list[tuple[Figure, tuple[Figure, ...]]]:
    plans = [layout_scene(index, split="train", seed=9) for index in range(count)]
    return [(p.main, (*p.above, *p.below)) for p in plans]


def test_sizes_turns_and_stretches_stay_in_their_ranges() -> None:
    for main, others in figures(400):
        assert 0.20 <= main.radius <= 0.33
        assert all(0.09 <= other.radius <= 0.16 for other in others)
        for figure in (main, *others):
            assert abs(figure.angle) <= math.radians(42)
            assert math.exp(-0.16) <= figure.stretch <= math.exp(0.16)
            assert all(0 <= value <= 255 for value in (*figure.light, *figure.dark))


def test_the_main_object_lies_inside_the_image() -> None:
    for main, _ in figures(400):
        for place in (main.x, main.y):
            assert 0.94 * main.radius <= place <= 1 - 0.94 * main.radius


def test_a_quarter_is_blurred_and_noise_stays_in_its_range() -> None:
    cameras = [layout_scene(index, split="val", seed=0).camera for index in range(800)]
    assert 0.2 < sum(camera.blur > 0 for camera in cameras) / 800 < 0.3
    assert all(4 <= camera.noise <= 20 for camera in cameras)
    assert any(camera.noise < 5 for camera in cameras)
    assert any(camera.noise > 19 for camera in cameras)


def test_the_plan_is_repeated_exactly_and_differs_by_index_split_and_seed() -> None:
    assert layout_scene(3, split="train", seed=0) == layout_scene(3, split="train", seed=0)
    keys = [(3, "train", 0), (4, "train", 0), (3, "val", 0), (3, "train", 1)]
    assert len({layout_scene(index, split=split, seed=seed) for index, split, seed in keys}) == 4
