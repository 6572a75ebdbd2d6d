"""Further views: the same main object elsewhere, whose points map exactly, and nothing else in common."""

from __future__ import annotations

import numpy as np
import pytest

from radio.scenes import Scene, SceneError, move_points, render, render_view
from radio.scenes import world as module
from radio.scenes.drawing import crop, outlines, sample
from radio.scenes.world import Figure, layout_scene


def corners(figure: Figure) -> list[tuple[float, float]]:
    """The corners of a figure's outline, by a slow loop: stretched, turned, enlarged, moved."""
    found = []
    for x, y in outlines()[figure.shape].rim.tolist():
        wide, high = x * figure.stretch, y / figure.stretch
        turned = complex(wide, high) * np.exp(1j * figure.angle) * figure.radius
        found.append((figure.x + turned.real, figure.y + turned.imag))
    return found


def test_view_0_is_the_scene_itself() -> None:
    for index in range(4):
        view, scene = (
            render_view(index, 0, split="val", seed=2, size=64),
            render(index, split="val", seed=2, size=64),
        )
        assert view.scene.image.tobytes() == scene.image.tobytes()
        assert view.pose == layout_scene(index, split="val", seed=2).main.pose


def test_points_of_the_outline_move_with_the_object() -> None:
    for index in range(20):
        first, again = (layout_scene(index, split="val", seed=0, view=view).main for view in (0, 3))
        moved = move_points(np.array(corners(first)), first.pose, again.pose)
        assert moved == pytest.approx(np.array(corners(again)), abs=1e-12)
        assert move_points(moved, again.pose, first.pose) == pytest.approx(
            np.array(corners(first)), abs=1e-12
        )


def test_the_object_is_the_same_and_all_else_is_new() -> None:
    for index in range(30):
        plans = [layout_scene(index, split="train", seed=1, view=view) for view in range(3)]
        same = {
            (p.main.shape, p.main.colour, p.main.light, p.main.dark, p.main.texture, p.main.stretch)
            for p in plans
        }
        assert len(same) == 1
        assert len({p.main.pose for p in plans}) == len({p.backdrop for p in plans}) == 3
        assert len({p.camera for p in plans}) == 3
        others = [figure for plan in plans for figure in (*plan.above, *plan.below)]
        assert len(set(others)) == len(others)
        assert all((o.shape, o.colour) != (plans[0].main.shape, plans[0].main.colour) for o in others)


def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the camera's light, tint, blur and noise."""
    monkeypatch.setattr(module, "_photograph", lambda canvas, camera, size: canvas.round().astype(np.uint8))


def visible(scene: Scene) -> np.ndarray:
    """The main object's visible pixels, without those at its border."""
    mask = scene.instances == 1
    inner = mask.copy()
    for axis in (0, 1):
        for step in (-2, -1, 1, 2):
            inner &= np.roll(mask, step, axis)
    return inner


def test_colours_are_equal_where_points_map_to(monkeypatch: pytest.MonkeyPatch) -> None:
    bare(monkeypatch)
    size, errors, strangers = 192, [], []
    for index in range(12):
        a, b = (render_view(index, view, size=size) for view in (1, 2))
        rows, columns = np.nonzero(visible(a.scene))
        points = (np.stack([columns, rows], axis=1) + 0.5) / size
        x, y = np.floor(move_points(points, a.pose, b.pose) * size).astype(int).clip(0, size - 1).T
        both = visible(b.scene)[y, x]
        assert both.mean() > 0.4  # at least seven tenths are visible in each
        source = a.scene.image[:, rows, columns][:, both].astype(float)
        target = b.scene.image[:, y, x][:, both].astype(float)
        errors.append(np.abs(source - target).mean())
        strangers.append(np.abs(source - np.roll(target, 40, axis=1)).mean())
    assert np.mean(errors) < 3 and np.mean(errors) < 0.3 * np.mean(strangers)


def test_textures_are_sampled_where_they_are_cropped() -> None:
    centres = (np.moveaxis(np.mgrid[0:96, 0:96][::-1], 0, -1) + 0.5) / 96
    assert sample(7, 0.3, 0.9, centres) == pytest.approx(crop(7, 0.3, 0.9, 96), abs=1e-5)
    larger = (np.moveaxis(np.mgrid[2:190, 2:190][::-1], 0, -1) + 0.5) / 192
    assert sample(7, 0.3, 0.9, larger) == pytest.approx(crop(7, 0.3, 0.9, 192)[2:190, 2:190], abs=1e-5)


@pytest.mark.parametrize("view", [-1, 1_000_001])
def test_views_that_do_not_exist(view: int) -> None:
    with pytest.raises(SceneError, match=f"a scene has no view {view}; give 0 to 1,000,000"):
        render_view(0, view)
