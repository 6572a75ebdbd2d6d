"""The domains of the generated world: what each does to an image, and what every image follows from."""

import io

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFont
from torch.nn import functional

from radio.data import SceneImages
from radio.errors import DataError
from radio.scenes import DOMAINS, SceneError, domains, render, render_domain


def drawn(count: int, domain: str) -> NDArray[np.uint8]:
    return np.stack([render_domain(index, domain=domain, seed=2) for index in range(count)])


def only(monkeypatch: pytest.MonkeyPatch, *effects: str) -> None:
    """Make some effects of the web certain and the others impossible."""
    for name in ("_COLLAGE", "_GREY", "_FRAME", "_TEXT", "_SHRINK", "_JPEG"):
        monkeypatch.setattr(domains, name, 1.0 if name in effects else 0.0)


def test_own_is_the_world_itself() -> None:
    for index, size in ((0, 96), (5, 48)):
        scene = render(index, split="val", seed=3, size=size)
        assert np.array_equal(render_domain(index, split="val", seed=3, size=size), scene.image)


@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize("size", [33, 96])
def test_an_image_follows_from_its_arguments_alone(domain: str, size: int) -> None:
    forward = [render_domain(index, domain=domain, seed=2, size=size) for index in range(12)]
    backward = [render_domain(index, domain=domain, seed=2, size=size) for index in reversed(range(12))]
    assert all(np.array_equal(a, b) for a, b in zip(forward, backward[::-1], strict=True))
    assert {(image.shape, image.dtype) for image in forward} == {((3, size, size), np.dtype(np.uint8))}
    assert len({image.tobytes() for image in forward}) == 12
    assert forward[0].flags["C_CONTIGUOUS"]


def test_night_is_dark_cold_and_lit_by_a_lamp() -> None:
    own, night = drawn(60, "own").astype(float), drawn(60, "night").astype(float)
    assert night.mean() < 0.5 * own.mean()
    assert np.all(night.mean(axis=(1, 2, 3)) < 0.75 * own.mean(axis=(1, 2, 3)))
    red, _, blue = night.mean(axis=(0, 2, 3)) / own.mean(axis=(0, 2, 3))
    assert blue > 1.15 * red
    middle, corners = np.s_[:, :, 32:64, 32:64], np.s_[:, :, [0, 0, -1, -1], [0, -1, 0, -1]]
    falloff = [images[middle].mean() / images[corners].mean() for images in (own, night)]
    assert falloff[1] > 1.5 * falloff[0]


def test_night_by_hand_for_white_without_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """With every draw in the middle of its range, white is 255 times the factor, the tint and the lamp."""

    class Middle:
        def uniform(self, low: float, high: float) -> float:
            return (low + high) / 2

        def random(self) -> float:
            return 0.5

    monkeypatch.setattr(domains, "noise", lambda u, size: np.zeros((size, size), np.float32))
    dark = domains._night(np.full((3, 96, 96), 255, np.uint8), Middle())  # type: ignore[arg-type]
    corner = (0.5 / 96 - 0.5) / 0.375  # of the lamp's width from its centre, along each axis
    for place, distance in (((48, 48), 0.5 / 96 / 0.375), ((0, 95), corner)):
        light = 0.275 + 0.725 * np.exp(-(distance**2))
        wanted = [255 * 0.7 * tint * light for tint in (0.775, 0.9, 1.075)]
        assert dark[:, place[0], place[1]].tolist() == [round(value) for value in wanted]


def test_the_mixture_is_half_own_and_a_quarter_each_of_the_others() -> None:
    parts = {domain: drawn(400, domain) for domain in DOMAINS}
    mixture = parts.pop("mixture")
    same = {
        name: [np.array_equal(a, b) for a, b in zip(images, mixture, strict=True)]
        for name, images in parts.items()
    }
    assert all(any(row) for row in zip(*same.values(), strict=True))  # each is of one of the parts
    night = sum(same["night"])
    untouched = [np.array_equal(a, b) for a, b in zip(parts["own"], parts["web"], strict=True)]
    web = sum(same["web"][i] and not same["own"][i] for i in range(400))
    own = sum(same["own"])  # with those of the web that nothing happened to
    share = sum(untouched) / 400
    deviation = (400 * 0.25 * 0.75) ** 0.5
    assert abs(night - 100) < 3 * deviation
    assert abs(web - 100 * (1 - share)) < 3 * deviation
    assert abs(own - 200 - 100 * share) < 3 * 10  # sqrt(400 / 4) = 10


def test_three_quarters_of_web_images_are_altered() -> None:
    """The shares multiply: 1 - 0.9 * 0.88 * 0.8 * 0.8 * 0.75 * 0.65 = 0.753."""
    own, web = drawn(300, "own"), drawn(300, "web")
    altered = sum(not np.array_equal(a, b) for a, b in zip(own, web, strict=True)) / 300
    assert altered == pytest.approx(0.753, abs=3 * (0.753 * 0.247 / 300) ** 0.5)


def test_grey_is_the_luma_of_the_scene(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "_GREY")
    image = render(4, seed=2).image
    luma = np.tensordot([0.299, 0.587, 0.114], image.astype(float), axes=1)
    grey = render_domain(4, domain="web", seed=2).astype(float)
    assert all(np.abs(plane - luma).max() <= 1 for plane in grey)


def test_a_frame_is_of_one_colour_around_the_scene(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "_FRAME")
    image, framed = render(4, seed=2).image, render_domain(4, domain="web", seed=2)
    width = int(np.argmax(np.all(image == framed, axis=0)[48]))
    assert round(0.03 * 96) <= width <= round(0.1 * 96)
    inside = np.s_[:, width : 96 - width, width : 96 - width]
    assert np.array_equal(framed[inside], image[inside])
    border = np.ones((96, 96), bool)
    border[inside[1:]] = False
    assert np.ptp(framed[:, border], axis=1).tolist() == [0, 0, 0]


def test_a_bar_of_text_covers_some_rows_only(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "_TEXT")
    font = ImageFont.load_default_imagefont()
    assert font.getbbox("moon") == (0, 0, 24, 11)  # the height that the bar is made for
    for index in range(20):
        image, barred = render(index, seed=2).image, render_domain(index, domain="web", seed=2)
        rows = np.flatnonzero((image != barred).any(axis=(0, 2)))
        assert 0.12 * 96 - 1 <= rows[-1] + 1 - rows[0] <= 0.2 * 96 + 1
        bar = barred[:, rows[0] : rows[-1] + 1]
        assert bar.std(axis=(1, 2)).max() > 10  # there are letters on it


def test_shrinking_loses_what_is_smaller_than_two_or_three_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "_SHRINK")
    factors = set()
    for index in range(10):
        image = torch.from_numpy(render(index, seed=2).image)[None].float()
        shrunk = torch.from_numpy(render_domain(index, domain="web", seed=2))[None].float()
        for factor in (2, 3):
            small = functional.avg_pool2d(image, factor)
            wanted = functional.interpolate(small, (96, 96), mode="bilinear", align_corners=False)
            if (shrunk - wanted).abs().max() <= 1.5:  # both are rounded, after each step
                factors.add(factor)
                break
        else:
            pytest.fail(f"scene {index} is shrunk neither to a half nor to a third")
    assert factors == {2, 3}


def test_a_jpeg_is_what_pillow_reads_back(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "_JPEG")
    image = Image.fromarray(render(4, seed=2).image.transpose(1, 2, 0))
    stored = []
    for quality in range(5, 41):
        image.save(file := io.BytesIO(), "JPEG", quality=quality)
        stored.append(np.asarray(Image.open(file)).transpose(2, 0, 1))
    result = render_domain(4, domain="web", seed=2)
    assert any(np.array_equal(result, other) for other in stored)


def test_a_collage_is_two_strips_with_the_main_objects(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "_COLLAGE")
    for index in range(10):
        scenes = (render(index, seed=2), render(2**62 + index, seed=2))
        result = render_domain(index, domain="web", seed=2)
        for half, scene in zip((result[:, :, :48], result[:, :, 48:]), scenes, strict=True):
            starts = [s for s in range(49) if np.array_equal(scene.image[:, :, s : s + 48], half)]
            (start,) = starts
            x0, _, x1, _ = scene.objects[0].box
            hidden = max(0, start - x0) + max(0, x1 - start - 48)
            assert hidden <= max(0, x1 - x0 - 48) + 1


def test_bad_domains_and_indices_are_errors() -> None:
    with pytest.raises(SceneError, match=r"no domain 'nigth'; did you mean night\?"):
        render_domain(0, domain="nigth")
    with pytest.raises(SceneError, match="no domain 'imagenet'; it has own, night, web, mixture"):
        render_domain(0, domain="imagenet")
    with pytest.raises(SceneError, match=r"must be below 2\^62 in the domain web"):
        render_domain(2**62, domain="web")
    with pytest.raises(SceneError, match="must be whole numbers"):
        render_domain(-1, domain="night")
    with pytest.raises(DataError, match=r"no domain 'wed'; did you mean web\?"):
        SceneImages("train", count=3, domain="wed")


def test_the_source_draws_its_domain_and_tells_it() -> None:
    sources = {domain: SceneImages("train", count=9, seed=2, domain=domain) for domain in DOMAINS}
    for domain, source in sources.items():
        wanted = torch.from_numpy(render_domain(7, domain=domain, seed=2))
        assert torch.equal(source.read(7), wanted)
        assert torch.equal(source.load(7), wanted)
    assert [source.location for source in sources.values()] == [
        "scenes:train?seed=2",
        *(f"scenes:train?seed=2&domain={domain}" for domain in ("night", "web", "mixture")),
    ]
    assert len({source.fingerprint for source in sources.values()}) == 4
    assert np.array_equal(sources["own"].labels, sources["web"].labels)
