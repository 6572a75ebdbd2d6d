"""Scenes: all random draws of an image, in units of its side, and its rendering with all its labels."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from ..errors import RadioError
from .drawing import BASE_SIZE, NUM_TEXTURES, SHAPES, Coverage, Plane, cover, crop, noise, sample

Split = Literal["train", "val"]
SPLITS: tuple[Split, ...] = get_args(Split)
COLOURS: tuple[str, ...] = ("red", "yellow", "green", "cyan", "blue", "purple")
CLASSES: tuple[str, ...] = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)

RGB = tuple[float, float, float]  # each in [0, 255]

_HUES = (354.0, 57.0, 122.0, 183.0, 226.0, 288.0)  # degrees, one per colour
_HUE_JITTER = 8.0
_DARKEST = (0.62, 0.80, 0.55, 0.68, 0.68, 0.62)  # value below which a person would name the hue differently
_MAX_TURN = math.radians(42)
_CANDIDATES = 4  # places tried for each small object before an overlap is accepted
_NUM_DRAWS = 192  # enough for four objects
_VIEW_STREAM = 4  # of the generator, plus the number of a further view
_REACH = 0.5  # an object whose radius is the image's side is this many metres away (ours)
_NEARER = 0.95  # the most that an object in front has of the depth of what it overlaps (ours)
_FLOOR = (9.0, 6.0)  # depth of the background in metres at the upper and the lower edge (ours)


class Texture(NamedTuple):
    """A texture of the bank, and the start of its crop (u, v in [0, 1))."""

    number: int
    u: float
    v: float


class Pose(NamedTuple):
    """Where an object is: its centre and the radius of its unit circle in units of the image's side."""

    x: float
    y: float
    radius: float
    angle: float  # in radians, from x to y


def move_points(points: NDArray[np.float64], source: Pose, target: Pose) -> NDArray[np.float64]:
    """Map points (x, y) [..., 2] of an object in one view to the same points of it in another.

    Both are in units of the image's side, pixel centres at (column + 0.5) / size. The map is the similarity
    that moves one pose to the other.
    """
    angle, scale = target.angle - source.angle, target.radius / source.radius
    cos, sin = scale * math.cos(angle), scale * math.sin(angle)
    turn = np.array([[cos, sin], [-sin, cos]])
    moved: NDArray[np.float64] = (points - (source.x, source.y)) @ turn + (target.x, target.y)
    return moved


class Figure(NamedTuple):
    """One object before drawing; x, y and radius in units of the image's side."""

    shape: int
    colour: int
    x: float
    y: float
    radius: float
    angle: float
    stretch: float
    light: RGB
    dark: RGB
    texture: Texture
    first_pose: Pose | None = None  # of an object in a further view: the texture has moved with it from there

    @property
    def pose(self) -> Pose:
        """Where the object is."""
        return Pose(self.x, self.y, self.radius, self.angle)


class Backdrop(NamedTuple):
    """Two colours mixed by a texture."""

    first: RGB
    second: RGB
    texture: Texture


class Camera(NamedTuple):
    """Effects on the whole image: a lighting field, a tint, blur (0: none) and noise."""

    slope: tuple[float, float]
    bow: tuple[float, float]
    tint: RGB  # factors around 1
    blur: float  # sd in pixels of a 96 px image
    noise: float  # sd in grey levels
    grain: tuple[float, float, float]  # start of each channel's noise in the bank


class Plan(NamedTuple):
    """A whole scene, independent of its size in pixels."""

    main: Figure
    above: tuple[Figure, ...]  # small ones meant to be in front of the main object, topmost first
    below: tuple[Figure, ...]  # and behind it, topmost first
    backdrop: Backdrop
    camera: Camera


def generator(index: int, *, split: Split, seed: int, stream: int) -> np.random.Generator:
    """Make one image's random generator: a Philox counter keyed by (seed, split), so streams never overlap.

    Streams: 0 the image, 1 the order of classes, 2 and 3 the language, 4 the domains, 5 and up further views.
    """
    counter = np.array([0, stream, index, 0], dtype=np.uint64)
    key = np.array([seed, SPLITS.index(split)], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


@lru_cache(maxsize=4096)
def _class_order(block: int, split: Split, seed: int) -> tuple[int, ...]:
    return tuple(generator(block, split=split, seed=seed, stream=1).permutation(len(CLASSES)).tolist())


def label_of(index: int, *, split: Split, seed: int) -> int:
    """Return the class of one image: each block of 60 indices holds every class once, in its own order."""
    block, place = divmod(index, len(CLASSES))
    return _class_order(block, split, seed)[place]


class _Draws:
    """Uniform numbers in a fixed order; one call to the generator fills them all."""

    def __init__(self, source: np.random.Generator) -> None:
        self._values: Iterator[float] = iter(source.random(_NUM_DRAWS).tolist())

    def unit(self) -> float:
        return next(self._values)

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * next(self._values)

    def below(self, count: int) -> int:
        return int(next(self._values) * count)


def layout_scene(index: int, *, split: Split, seed: int, view: int = 0) -> Plan:
    """Draw everything random about one scene, in a fixed order.

    A further view has the same main object in another place, size and angle, and all else anew.
    """
    draws = _Draws(generator(index, split=split, seed=seed, stream=_VIEW_STREAM + view if view else 0))
    label = label_of(index, split=split, seed=seed)
    backdrop = _backdrop(draws)
    camera = _camera(draws)
    radius = draws.between(0.20, 0.33)
    place = (draws.between(radius * 0.95, 1 - radius * 0.95), draws.between(radius * 0.95, 1 - radius * 0.95))
    main = _figure(draws, label, place, radius)
    if view:
        first = layout_scene(index, split=split, seed=seed).main
        main = first._replace(**main.pose._asdict(), first_pose=first.pose)
    placed = [main]
    above: list[Figure] = []
    below: list[Figure] = []
    for _ in range(draws.below(4)):
        other = _small(draws, label, placed)
        placed.append(other)
        (above if draws.unit() < 0.6 else below).append(other)
    return Plan(main, tuple(above), tuple(below), backdrop, camera)


def _small(draws: _Draws, label: int, placed: list[Figure]) -> Figure:
    """Draw a small object of another class than the main one's, with little overlap if possible."""
    other = (label + 1 + draws.below(len(CLASSES) - 1)) % len(CLASSES)
    radius = draws.between(0.09, 0.16)
    places = [
        (draws.between(radius * 0.8, 1 - radius * 0.8), draws.between(radius * 0.8, 1 - radius * 0.8))
        for _ in range(_CANDIDATES)
    ]
    free = (xy for xy in places if all(_apart(xy, radius, figure) for figure in placed))
    return _figure(draws, other, next(free, places[-1]), radius)


def _apart(xy: tuple[float, float], radius: float, figure: Figure) -> bool:
    return math.hypot(xy[0] - figure.x, xy[1] - figure.y) > 0.8 * (radius + figure.radius)


def _figure(draws: _Draws, label: int, place: tuple[float, float], radius: float) -> Figure:
    colour, shape = divmod(label, len(SHAPES))
    hue = _HUES[colour] + draws.between(-_HUE_JITTER, _HUE_JITTER)
    saturation = draws.between(0.68, 1.0)
    value = draws.between(_DARKEST[colour] + 0.12, 1.0)
    shade = draws.between(0.72, 1.0)
    pale = draws.between(0.6, 1.0)
    return Figure(
        shape=shape,
        colour=colour,
        x=place[0],
        y=place[1],
        radius=radius,
        angle=draws.between(-_MAX_TURN, _MAX_TURN),
        stretch=math.exp(draws.between(-0.16, 0.16)),
        light=_rgb(hue, saturation * pale, value),
        dark=_rgb(hue, saturation, max(value * shade, _DARKEST[colour])),
        texture=_texture(draws),
    )


def _backdrop(draws: _Draws) -> Backdrop:
    """Draw two muted colours of any hue, so that the image's mean colour is independent of the class."""
    first, second = (
        _rgb(draws.between(0, 360), draws.between(0.05, 0.45), draws.between(0.15, 0.85)) for _ in range(2)
    )
    mix = draws.between(0.35, 1.0)  # how far the texture swings from the first colour to the second
    second = (_mix(first[0], second[0], mix), _mix(first[1], second[1], mix), _mix(first[2], second[2], mix))
    return Backdrop(first, second, _texture(draws))


def _camera(draws: _Draws) -> Camera:
    return Camera(
        slope=(draws.between(-0.3, 0.3), draws.between(-0.3, 0.3)),
        bow=(draws.between(-0.25, 0.1), draws.between(-0.25, 0.1)),
        tint=(draws.between(0.94, 1.06), draws.between(0.94, 1.06), draws.between(0.94, 1.06)),
        blur=draws.between(0.5, 1.3) if draws.unit() < 0.25 else 0.0,
        noise=draws.between(4.0, 20.0),
        grain=(draws.unit(), draws.unit(), draws.unit()),
    )


def _texture(draws: _Draws) -> Texture:
    return Texture(draws.below(NUM_TEXTURES), draws.unit(), draws.unit())


def _mix(a: float, b: float, share: float) -> float:
    return a + (b - a) * share


def _rgb(hue: float, saturation: float, value: float) -> RGB:
    red, green, blue = colorsys.hsv_to_rgb(hue % 360 / 360, saturation, value)
    return 255 * red, 255 * green, 255 * blue


MIN_SIZE, MAX_SIZE = 32, 1024
MAX_VIEW = 1_000_000
_MAIN_VISIBLE = 0.76  # minimum visible share of the main object at 96 px; at least 0.70 at other sizes
_OTHER_VISIBLE = 0.5  # a small object that shows less of itself than this is left out

Canvas = NDArray[np.float32]  # [3, H, W]


class SceneError(RadioError):
    """A scene that cannot be drawn or written as requested."""


class SceneObject(NamedTuple):
    """One visible object: indices into `SHAPES` and `COLOURS`, and its visible part."""

    shape: int
    colour: int
    box: tuple[int, int, int, int]  # x0, y0, x1, y1 of the visible pixels, half-open
    area: int  # visible pixels
    main: bool


class Scene(NamedTuple):
    """An image with all its labels."""

    image: NDArray[np.uint8]  # [3, H, W] RGB
    label: int  # index into CLASSES
    objects: tuple[SceneObject, ...]  # instance i is objects[i - 1]; the main object is the first
    instances: NDArray[np.uint8]  # [H, W], 0 is background


class SceneView(NamedTuple):
    """A scene, and where its main object is in it; `instances` of the scene is 1 where it is visible."""

    scene: Scene
    pose: Pose


def semantic(scene: Scene) -> NDArray[np.uint8]:
    """Compute the [H, W] map of shapes: 0 background, 1 to 10 the shape's index in `SHAPES` plus one."""
    shapes = np.array([0, *(item.shape + 1 for item in scene.objects)], dtype=np.uint8)
    return shapes[scene.instances]


def render(index: int, *, split: Split = "train", seed: int = 0, size: int = 96) -> Scene:
    """Draw scene number `index` of a split at size x size pixels.

    The same (index, split, seed) gives the same objects in the same places at every size; splits and seeds
    never share random numbers. Each block of 60 consecutive indices holds every class once.

    Raises:
        SceneError: a negative index or seed, an unknown split, a size outside 32 to 1024.
    """
    return render_view(index, 0, split=split, seed=seed, size=size).scene


def render_view(index: int, view: int, *, split: Split = "train", seed: int = 0, size: int = 96) -> SceneView:
    """Draw a view of scene number `index`: 0 is the scene of `render`, 1 and up show its main object again.

    The object keeps its shape, colours, texture and stretch. Place, size and angle, the other objects, the
    backdrop and the camera are drawn anew. `move_points` maps its pixels from one view to another.

    Raises:
        SceneError: a view outside 0 to 1,000,000, or what `render` refuses.
    """
    _check(index, split, seed, size)
    if not 0 <= view <= MAX_VIEW:
        raise SceneError(f"a scene has no view {view}; give 0 to {MAX_VIEW:,}")
    scene_plan = layout_scene(index, split=split, seed=seed, view=view)
    order = _visible(scene_plan, size)
    canvas = _background(scene_plan, size)
    instances = np.zeros((size, size), dtype=np.uint8)
    for number, figure, coverage in order:  # back to front
        _paint(canvas, figure, coverage, size)
        instances[coverage.window][coverage.alpha >= 0.5] = number
    image = _photograph(canvas, scene_plan.camera, size)
    figures = [figure for _, figure, _ in sorted(order, key=lambda entry: entry[0])]
    objects, instances = _take_stock(figures, instances)
    scene = Scene(image, label_of(index, split=split, seed=seed), objects, instances)
    return SceneView(scene, scene_plan.main.pose)


def render_images(
    indices: Sequence[int] | NDArray[np.int64], *, split: Split = "train", seed: int = 0, size: int = 96
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Draw the scenes of several indices as `render` does: images [N, 3, size, size] and labels [N].

    Raises:
        SceneError: as `render`.
    """
    images = np.empty((len(indices), 3, size, size), dtype=np.uint8)
    labels = np.empty(len(indices), dtype=np.int64)
    for row, index in enumerate(indices):
        scene = render(int(index), split=split, seed=seed, size=size)
        images[row], labels[row] = scene.image, scene.label
    return images, labels


def depth(index: int, *, split: Split = "train", seed: int = 0, size: int = 96) -> NDArray[np.float32]:
    """Compute the depth of scene number `index` in metres: [size, size], all above 0.

    All objects have one true size, so that one of radius r, in units of the side, is 0.5 / r metres away
    (2 to 6 m), unless it lies over another: then it has at most 95 % of that one's depth. The background is a
    plane, whose inverse depth is linear in the row: from 9 m at the upper edge to 6 m at the lower.

    Raises:
        SceneError: as `render`.
    """
    _check(index, split, seed, size)
    scene_plan = layout_scene(index, split=split, seed=seed)
    drawn = _visible(scene_plan, BASE_SIZE)
    depths = _depths(drawn)
    far, near = (1 / edge for edge in _FLOOR)
    rows = (np.arange(size) + 0.5) / size
    plane = np.repeat((1 / (far + (near - far) * rows)).astype(np.float32)[:, None], size, axis=1)
    for number, _, coverage in drawn if size == BASE_SIZE else _visible(scene_plan, size):
        plane[coverage.window][coverage.alpha >= 0.5] = depths[number]
    return plane


def _depths(drawn: Sequence[tuple[int, Figure, Coverage]]) -> dict[int, float]:
    """Compute the depth in metres of each object by its number; they come back to front, at 96 px."""
    depths: dict[int, float] = {}
    over = np.full((BASE_SIZE, BASE_SIZE), np.inf)  # the least depth of what was drawn so far
    for number, figure, coverage in drawn:
        covered = over[coverage.window]
        mask = coverage.alpha > 0
        depths[number] = min(_REACH / figure.radius, _NEARER * float(covered[mask].min(initial=np.inf)))
        covered[mask] = depths[number]
    return depths


def _check(index: int, split: Split, seed: int, size: int) -> None:
    if not MIN_SIZE <= size <= MAX_SIZE:
        raise SceneError(f"a scene of {size} px cannot be drawn; choose a size from {MIN_SIZE} to {MAX_SIZE}")
    if split not in SPLITS:
        raise SceneError(f"unknown split {split!r}; the world has {' and '.join(SPLITS)}")
    if not 0 <= index < 2**63 or not 0 <= seed < 2**63:
        raise SceneError(f"index {index} and seed {seed} must be whole numbers from 0 to 2^63 - 1")


def _cover(figure: Figure, size: int) -> Coverage:
    return cover(
        figure.shape,
        centre=(figure.x * size, figure.y * size),
        radius=figure.radius * size,
        angle=figure.angle,
        stretch=figure.stretch,
        size=size,
    )


def _visible(scene_plan: Plan, size: int) -> list[tuple[int, Figure, Coverage]]:
    """List the objects to draw, back to front, each with its number (1: the main object).

    The choice is made at 96 px whatever the size, so that every size shows the same objects: a small object
    that would hide too much of the main one goes behind it; one that is mostly hidden itself is left out.
    """
    main = _cover(scene_plan.main, BASE_SIZE)
    main_area = np.count_nonzero(main.alpha >= 0.5)
    taken = np.zeros((BASE_SIZE, BASE_SIZE), dtype=bool)
    front: list[tuple[Figure, Coverage]] = []
    behind: list[tuple[Figure, Coverage]] = []
    for figure in scene_plan.above:
        coverage = _cover(figure, BASE_SIZE)
        before = taken[coverage.window].copy()
        if not _claim(taken, coverage):
            continue
        if np.count_nonzero((main.alpha >= 0.5) & ~taken[main.window]) >= _MAIN_VISIBLE * main_area:
            front.append((figure, coverage))
        else:
            taken[coverage.window] = before
            behind.append((figure, coverage))
    taken[main.window] |= main.alpha >= 0.5
    behind += [(figure, _cover(figure, BASE_SIZE)) for figure in scene_plan.below]
    back = [entry for entry in behind if _claim(taken, entry[1])]
    topmost_first = [*front, (scene_plan.main, main), *back]
    numbers = [*range(2, 2 + len(front)), 1, *range(2 + len(front), 2 + len(front) + len(back))]
    entries = [
        (number, figure, coverage) for number, (figure, coverage) in zip(numbers, topmost_first, strict=True)
    ]
    if size != BASE_SIZE:
        entries = [(number, figure, _cover(figure, size)) for number, figure, _ in entries]
    return entries[::-1]


def _claim(taken: NDArray[np.bool_], coverage: Coverage) -> bool:
    """Check whether enough of an object is visible outside `taken`; if so, add its pixels to `taken`."""
    mask = coverage.alpha >= 0.5
    free = np.count_nonzero(mask & ~taken[coverage.window])
    if free == 0 or free < _OTHER_VISIBLE * np.count_nonzero(mask):
        return False
    taken[coverage.window] |= mask
    return True


def _background(scene_plan: Plan, size: int) -> Canvas:
    first, second, texture = scene_plan.backdrop
    plane = crop(*texture, size)
    canvas = np.empty((3, size, size), dtype=np.float32)
    for channel in range(3):
        np.multiply(plane, np.float32(second[channel] - first[channel]), out=canvas[channel])
        canvas[channel] += np.float32(first[channel])
    return canvas


def _paint(canvas: Canvas, figure: Figure, coverage: Coverage, size: int) -> None:
    rows, columns = coverage.window
    plane = _texture_of(figure, coverage, size)
    for channel in range(3):
        light, dark = figure.light[channel], figure.dark[channel]
        target = canvas[channel, rows, columns]
        colour = plane * np.float32(light - dark)
        colour += np.float32(dark)
        colour -= target
        colour *= coverage.alpha
        target += colour


def _texture_of(figure: Figure, coverage: Coverage, size: int) -> Plane:
    """Return a figure's texture inside its window [h, w]; in a further view it has moved with the object."""
    rows, columns = coverage.window
    if figure.first_pose is None:
        return crop(*figure.texture, size)[rows, columns]
    points = (np.moveaxis(np.mgrid[rows, columns][::-1], 0, -1) + 0.5) / size
    return sample(*figure.texture, move_points(points, figure.pose, figure.first_pose))


def _photograph(canvas: Canvas, camera: Camera, size: int) -> NDArray[np.uint8]:
    """Apply light, blur and noise, and round to whole grey levels: [3, H, W]."""
    ramp = _ramp(size)
    across = camera.slope[0] * ramp + camera.bow[0] * ramp * ramp
    down = camera.slope[1] * ramp + camera.bow[1] * ramp * ramp
    field = across[None, :] + (1 + down)[:, None]
    for channel in range(3):
        canvas[channel] *= field
        canvas[channel] *= np.float32(camera.tint[channel])
    if camera.blur:
        canvas = _blur(canvas, camera.blur * size / BASE_SIZE)
    for channel in range(3):
        canvas[channel] += np.float32(camera.noise) * noise(camera.grain[channel], size)
    np.rint(canvas, out=canvas)
    np.clip(canvas, 0, 255, out=canvas)
    return canvas.astype(np.uint8)


@lru_cache(maxsize=8)
def _ramp(size: int) -> NDArray[np.float32]:
    """Compute pixel centres from -1 to 1: [size]."""
    return ((np.arange(size) + 0.5) * (2 / size) - 1).astype(np.float32)


def _blur(canvas: Canvas, sd: float) -> Canvas:
    """Apply a Gaussian blur, one axis after the other, with mirrored borders."""
    reach = max(1, math.ceil(2.5 * sd))
    taps = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sd) ** 2)
    taps = (taps / taps.sum()).astype(np.float32)
    for axis in (1, 2):
        pad = [(0, 0), (0, 0), (0, 0)]
        pad[axis] = (reach, reach)
        padded = np.pad(canvas, pad, mode="symmetric")
        length = canvas.shape[axis]
        canvas = np.zeros_like(canvas)
        for step, tap in enumerate(taps):
            canvas += tap * (
                padded[:, step : step + length] if axis == 1 else padded[:, :, step : step + length]
            )
    return canvas


def _take_stock(
    figures: Sequence[Figure], instances: NDArray[np.uint8]
) -> tuple[tuple[SceneObject, ...], NDArray[np.uint8]]:
    """Compute the visible part of each figure; drop those without visible pixels and renumber the rest."""
    objects: list[SceneObject] = []
    renumbered = instances.copy()
    for number, figure in enumerate(figures, start=1):
        mask = instances == number
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        if not rows.size:
            continue
        box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
        objects.append(
            SceneObject(figure.shape, figure.colour, box, int(np.count_nonzero(mask)), number == 1)
        )
        if len(objects) != number:
            renumbered[mask] = len(objects)
    return tuple(objects), renumbered
