from __future__ import annotations

import importlib.util
import io
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from radio import images
from radio.errors import DataError, SizeError
from radio.images import (
    Box,
    _jpeg_frame,
    center_crop,
    cover,
    crop_and_resize,
    decode,
    decode_crop,
    evaluation_view,
    orientation,
    resize,
    sample_crop,
)

IMAGE = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)


def smooth(height: int, width: int, seed: int = 0) -> np.ndarray:
    """An image without fine detail, so that JPEG keeps it nearly as it is."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR))


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def chw(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "PPM"])
def test_lossless_formats_give_the_stored_pixels(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    assert torch.equal(decode(encoded(Image.fromarray(IMAGE), kind, **options)), chw(IMAGE))


@pytest.mark.parametrize("subsampling", [0, 2])
def test_a_colour_jpeg_is_within_two_levels_of_pil(subsampling: int) -> None:
    data = encoded(Image.fromarray(smooth(37, 53)), "JPEG", quality=95, subsampling=subsampling)
    wanted = chw(np.array(Image.open(io.BytesIO(data)).convert("RGB")))
    assert (decode(data).int() - wanted.int()).abs().max() <= 2


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_grey_is_repeated(kind: str) -> None:
    data = encoded(Image.fromarray(smooth(16, 16)).convert("L"), kind)
    image = decode(data)
    assert image.shape == (3, 16, 16)
    assert torch.equal(image[0], image[1]) and torch.equal(image[0], image[2])
    assert torch.equal(image[0], torch.from_numpy(np.array(Image.open(io.BytesIO(data)))))


def test_cmyk_becomes_rgb() -> None:
    data = encoded(Image.fromarray(smooth(16, 16)).convert("CMYK"), "JPEG", quality=95)
    wanted = chw(np.array(Image.open(io.BytesIO(data)).convert("RGB")))
    assert torch.equal(decode(data), wanted)


def test_sixteen_bit_grey_keeps_its_upper_byte() -> None:
    deep = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    image = decode(encoded(Image.fromarray(deep), "PNG"))
    assert torch.equal(image[1].long(), torch.arange(256).reshape(16, 16))


def test_alpha_is_dropped() -> None:
    alpha = np.random.default_rng(1).integers(0, 256, (24, 32, 1), dtype=np.uint8)
    data = encoded(Image.fromarray(np.concatenate([IMAGE, alpha], 2)), "PNG")
    assert torch.equal(decode(data), chw(IMAGE))


def test_a_palette_with_transparency_gives_its_colours() -> None:
    coarse = Image.fromarray(IMAGE // 64 * 64).quantize(16)
    data = encoded(coarse, "PNG", transparency=bytes([0] * 8))
    assert torch.equal(decode(data), chw(np.array(coarse.convert("RGB"))))


def test_black_and_white_spans_the_range() -> None:
    data = encoded(Image.fromarray(IMAGE).convert("1"), "PNG")
    assert set(decode(data).unique().tolist()) == {0, 255}


def test_exif_orientation_is_not_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode(encoded(Image.fromarray(smooth(16, 24)), "JPEG", exif=exif)).shape == (3, 16, 24)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("share", [0.3, 0.7])
def test_a_truncated_file_is_a_data_error(kind: str, share: float) -> None:
    data = encoded(Image.fromarray(IMAGE), kind)
    with pytest.raises(DataError, match="damaged"):
        decode(data[: int(len(data) * share)])


def with_chunk(data: bytes, kind: bytes, content: bytes) -> bytes:
    """A PNG with one chunk more, behind its header."""
    chunk = kind + content
    made = struct.pack(">I", len(content)) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return data[:33] + made + data[33:]


@pytest.mark.parametrize(
    ("kind", "head"), [(b"zTXt", b"Comment\0\0"), (b"iCCP", b"icc\0\0"), (b"iTXt", b"Comment\0\1\0\0\0")]
)
def test_a_png_with_texts_longer_than_pil_takes_is_whole(kind: bytes, head: bytes) -> None:
    data = with_chunk(encoded(Image.fromarray(IMAGE), "PNG"), kind, head + zlib.compress(bytes(2 << 20)))
    with pytest.raises(ValueError, match="too large"):
        Image.open(io.BytesIO(data)).load()
    assert torch.equal(decode(data), chw(IMAGE))


def wide_header(kind: str, side: int = 13_500) -> bytes:
    """An image file whose header promises side x side pixels, which are not there."""
    data = bytearray(encoded(Image.fromarray(IMAGE), kind))
    if kind == "PNG":
        data[16:24] = struct.pack(">II", side, side)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    elif kind == "JPEG":
        at = data.index(b"\xff\xc0")
        data[at + 5 : at + 9] = struct.pack(">HH", side, side)
    else:
        data[18:26] = struct.pack("<ii", side, side)
    return bytes(data)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP"])
@pytest.mark.parametrize(("side", "said"), [(13_500, "182 million"), (30_000, "900 million")])
def test_one_limit_of_pixels_holds_for_every_format(kind: str, side: int, said: str) -> None:
    with pytest.raises(DataError, match=f"^{said} pixels, the limit is 179 million; make it smaller$"):
        decode(wide_header(kind, side))


def test_the_header_of_a_jpeg_is_found_behind_other_segments() -> None:
    exif = Image.Exif()
    exif[0x010E] = "\xff\xc0 in a text"
    for options in ({"exif": exif}, {"progressive": True}, {"comment": b"\xff\xc0" * 9}, {"quality": 50}):
        data = encoded(Image.fromarray(IMAGE), "JPEG", **options)
        assert _jpeg_frame(data)[1:3] == (24, 32)
        assert _jpeg_frame(data[:2] + b"\xff\xff\xff" + data[3:])[1:3] == (24, 32)  # fill bytes
    assert _jpeg_frame(b"\xff\xd8\xff") == (0, 0, 0, 0)


def test_a_jpeg_of_thousands_of_scans_is_refused() -> None:
    data = encoded(Image.fromarray(IMAGE), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    many = data[:last] + data[last:-2] * 2000 + data[-2:]
    with pytest.raises(DataError, match=r"a JPEG of 2,00\d scans, the limit is 1,000"):
        decode(many)
    assert decode(data).shape == (3, 24, 32)


def test_a_format_that_starts_programs_is_not_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*arguments: object, **options: object) -> None:
        pytest.fail("a program was started")

    monkeypatch.setattr("subprocess.Popen", never)
    monkeypatch.setattr("subprocess.check_call", never)
    eps = encoded(Image.fromarray(IMAGE), "EPS")
    with pytest.raises(DataError, match=r"^not an image, or a damaged one \(opens as none of JPEG, "):
        decode(eps)


@pytest.mark.parametrize("kind", ["DDS", "ICO", "TGA", "PCX"])
def test_formats_of_other_trades_are_not_opened(kind: str) -> None:
    with pytest.raises(DataError, match="opens as none of"):
        decode(encoded(Image.fromarray(IMAGE), kind))


def test_reasons_hold_no_addresses() -> None:
    for data in (b"", b"just text", bytes(100), encoded(Image.fromarray(IMAGE), "PNG")[:60]):
        with pytest.raises(DataError) as caught:
            decode(data)
        assert "0x" not in str(caught.value)


def test_orientations_are_told() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind in ("JPEG", "PNG", "WEBP"):
        assert orientation(encoded(Image.fromarray(IMAGE), kind, exif=exif)) == 6
        assert orientation(encoded(Image.fromarray(IMAGE), kind)) == 1
    exif[0x0112] = 99
    assert orientation(encoded(Image.fromarray(IMAGE), "JPEG", exif=exif)) == 1
    assert orientation(b"no image") == 1


KINDS = {
    "JPEG": {},
    "PNG": {},
    "WEBP": {},
    "AVIF": {},
    "BMP": {},
    "PPM": {},
    "TIFF": {"compression": "tiff_lzw"},
    "GIF": {},
    "JPEG2000": {},
}
FILES = {kind: encoded(Image.fromarray(IMAGE), kind, **options) for kind, options in KINDS.items()}


@pytest.mark.filterwarnings("ignore::UserWarning")  # PIL's, of damaged EXIF
@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damaged_images_give_pixels_or_one_error(data: st.DataObject) -> None:
    content = bytearray(FILES[data.draw(st.sampled_from(sorted(FILES)))])
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
    cut = data.draw(st.integers(0, len(content)))
    try:
        image = decode(bytes(content[: cut or None]))
    except DataError as error:
        said = str(error)
    else:
        said = ""
        assert image.dtype == torch.uint8
        assert image.shape[0] == 3
    assert "object at" not in said
    assert "\n" not in said


def textured(height: int, width: int) -> Image.Image:
    """An image with detail at every scale, less at the finer ones, as photographs have."""
    random, image = np.random.default_rng(0), np.full((height, width, 3), 128.0)
    for side in (4, 8, 16, 32, 64, 128):
        noise = Image.fromarray(random.integers(0, 256, (side, side, 3), dtype=np.uint8))
        layer = np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float64)
        image += (layer - 128) * 4 / side
    return Image.fromarray(image.clip(0, 255).astype(np.uint8))


PHOTO = textured(200, 300)
EVEN, ODD, CORNER, BOTTOM, WHOLE = (
    *(Box(20, 40, 96, 100), Box(51, 33, 81, 87), Box(1, 3, 90, 81)),
    *(Box(120, 200, 80, 100), Box(0, 0, 200, 300)),
)


@pytest.mark.parametrize("box", [EVEN, ODD, CORNER, BOTTOM, WHOLE])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
def test_a_large_crop_of_a_jpeg_comes_from_half_the_resolution(
    box: Box, subsampling: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = encoded(PHOTO, "JPEG", quality=90, subsampling=subsampling)
    exact = crop_and_resize(decode(data), box, (32, 40)).int()
    monkeypatch.setattr("radio.images._decode", lambda data: pytest.fail("decoded in full"))
    asked = []
    crop = decode_crop(data, lambda height, width: asked.append((height, width)) or box, (32, 40))
    assert asked == [(200, 300)]
    assert crop.dtype == torch.uint8
    half = Image.open(io.BytesIO(data))
    half.draft("RGB", (150, 100))
    edges = (box.left / 2, box.top / 2, (box.left + box.width) / 2, (box.top + box.height) / 2)
    wanted = chw(np.array(half.resize((40, 32), Image.Resampling.BICUBIC, edges))).int()
    inside = (crop.int() - wanted)[:, 2:-2, 2:-2].abs().float()  # PIL's kernel ends at the edges of the box
    assert inside.mean() < 0.7
    assert inside.max() <= 6
    assert (crop.int() - exact).abs().float().mean() < 1.5


def test_other_crops_and_files_are_decoded_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("radio.images._decode_half", lambda *arguments: pytest.fail("decoded at half"))
    cases = [
        (encoded(PHOTO, "JPEG"), Box(20, 40, 63, 100)),
        (encoded(PHOTO, "JPEG"), Box(20, 40, 100, 79)),
        (encoded(PHOTO, "JPEG", progressive=True), EVEN),
        (encoded(PHOTO.convert("L"), "JPEG"), EVEN),
        (encoded(PHOTO.convert("CMYK"), "JPEG"), EVEN),
        (encoded(PHOTO, "PNG"), EVEN),
    ]
    for data, box in cases:
        crop = decode_crop(data, lambda height, width, box=box: box, (32, 40))
        assert torch.equal(crop, crop_and_resize(decode(data), box, (32, 40)))


def test_what_pil_refuses_is_decoded_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise DataError("refused")

    monkeypatch.setattr("radio.images._decode_half", refuse)
    data = encoded(PHOTO, "JPEG")
    crop = decode_crop(data, lambda height, width: EVEN, (32, 40))
    assert torch.equal(crop, crop_and_resize(decode(data), EVEN, (32, 40)))


JPEGS = [
    encoded(PHOTO, "JPEG", **options)
    for options in ({}, {"subsampling": 0}, {"restart_marker_rows": 2}, {"progressive": True})
]


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_crop_of_a_damaged_jpeg_is_refused_if_the_image_is(data: st.DataObject) -> None:
    content = bytearray(data.draw(st.sampled_from(JPEGS)))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1) | st.integers(0, 700))
        content[at : at + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
    cut = data.draw(st.just(0) | st.integers(0, len(content)))
    file = bytes(content[: cut or None])
    try:
        decode(file)
    except DataError:
        with pytest.raises(DataError):
            decode_crop(file, lambda height, width: Box(0, 0, height, width), (24, 24))
    else:
        crop = decode_crop(file, lambda height, width: Box(0, 0, height, width), (24, 24))
        assert crop.shape == (3, 24, 24)


@pytest.mark.parametrize("data", [b"", b"just text", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", bytes(100)])
def test_foreign_bytes_are_a_data_error(data: bytes) -> None:
    with pytest.raises(DataError, match="damaged"):
        decode(data)


def test_floating_point_pixels_are_refused() -> None:
    data = encoded(Image.fromarray(np.ones((4, 4), dtype=np.float32)), "TIFF")
    with pytest.raises(DataError, match="8 or 16 bits"):
        decode(data)


@pytest.mark.parametrize(
    ("height", "width", "side"), [(24, 32, 17), (32, 24, 40), (24, 24, 24), (25, 77, 13)]
)
def test_the_short_side_is_resized_as_torchvision_does(height: int, width: int, side: int) -> None:
    image = chw(smooth(height, width))
    wanted = TF.resize(TF.to_dtype(image, scale=True), [side], TF.InterpolationMode.BICUBIC, antialias=True)
    assert torch.allclose(resize(image, cover(height, width, (side, side))), wanted.clamp(0, 1), atol=1e-6)


def test_resize_is_within_a_level_and_a_half_of_pil() -> None:
    image = smooth(48, 64)
    wanted = Image.fromarray(image).resize((20, 15), Image.Resampling.BICUBIC)
    assert (resize(chw(image), (15, 20)) * 255 - chw(np.array(wanted))).abs().max() < 1.5


def test_pil_stands_in_for_the_jpeg_operator_with_the_same_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(Image.fromarray(smooth(37, 53)), "JPEG", quality=90)
    fast = decode(data)
    monkeypatch.setattr("radio.images._decode_jpeg", None)
    assert (decode(data).int() - fast.int()).abs().max() <= 2


@pytest.mark.parametrize(("height", "width"), [(24, 32), (33, 24), (10, 9), (300, 217), (64, 64)])
def test_evaluation_view_equals_the_torchvision_pipeline(height: int, width: int) -> None:
    image = chw(smooth(height, width, seed=height))
    pipeline = v2.Compose(
        [
            v2.ToDtype(torch.float32, scale=True),
            v2.Resize(32, v2.InterpolationMode.BICUBIC, antialias=True),
            v2.CenterCrop(28),
        ]
    )
    view = evaluation_view(image, (28, 28))
    assert view.dtype == torch.float32 and view.min() >= 0 and view.max() <= 1
    assert torch.allclose(view, pipeline(image).clamp(0, 1), atol=1e-6)


def test_a_non_square_view_covers_and_keeps_the_aspect() -> None:
    ramp = torch.arange(64, dtype=torch.uint8).expand(3, 64, 64).contiguous()
    view = evaluation_view(ramp, (16, 32), ratio=1.0)
    assert view.shape == (3, 16, 32)
    assert view[0, 8, 16] * 255 == pytest.approx(32, abs=1.5)  # the middle, at half the resolution
    assert (view[0, 8, 20] - view[0, 8, 12]) * 255 == pytest.approx(16, abs=0.1)


@pytest.mark.parametrize(("size", "margin"), [((6, 6), (1, 2)), ((9, 11), (0, 0)), ((1, 1), (4, 5))])
def test_center_crop_equals_torchvision(size: tuple[int, int], margin: tuple[int, int]) -> None:
    image = torch.arange(99).reshape(1, 9, 11)
    crop = center_crop(image, size)
    assert torch.equal(crop, TF.center_crop(image, list(size)))
    assert int(crop[0, 0, 0]) // 11 in (margin[0], margin[0] + 1)


@pytest.mark.parametrize(("height", "width"), [(96, 96), (37, 120), (500, 20), (3, 400)])
def test_random_crops_equal_torchvision_draw_for_draw(height: int, width: int) -> None:
    transform = v2.RandomResizedCrop(8, scale=(0.2, 1.0), ratio=(3 / 4, 4 / 3), antialias=True)
    for seed in range(20):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            wanted = transform.make_params([torch.empty(3, height, width)])
        generator = torch.Generator().manual_seed(seed)
        box = sample_crop(height, width, (0.2, 1.0), (3 / 4, 4 / 3), generator)
        assert box == (wanted["top"], wanted["left"], wanted["height"], wanted["width"])


def test_crop_and_resize_equals_torchvision() -> None:
    image = chw(IMAGE)
    wanted = TF.resized_crop(
        TF.to_dtype(image, scale=True), 3, 5, 12, 20, [7, 9], TF.InterpolationMode.BICUBIC, antialias=True
    )
    crop = crop_and_resize(image, Box(3, 5, 12, 20), (7, 9))
    assert crop.dtype == torch.uint8
    assert (crop - wanted.clamp(0, 1) * 255).abs().max() < 1.5  # rounded after each axis


def test_the_whole_image_as_crop_stays_as_it_is() -> None:
    assert torch.equal(crop_and_resize(chw(IMAGE), Box(0, 0, 24, 32), (24, 32)), chw(IMAGE))


def test_sizes_that_cannot_be_are_errors() -> None:
    image = chw(IMAGE)
    with pytest.raises(SizeError, match="resize the image first"):
        center_crop(image, (25, 10))
    with pytest.raises(SizeError, match="1 or more"):
        evaluation_view(image, (8, 8), ratio=0.9)
    with pytest.raises(SizeError, match="every side needs a pixel"):
        resize(image, cover(24, 32, (0, 0)))
    with pytest.raises(SizeError, match="low, high"):
        sample_crop(8, 8, (0.0, 1.0), (0.75, 1.33), torch.Generator())


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_damaged_exif_is_no_matter_of_the_pixels(kind: str) -> None:
    exif = b"Exif\0\0II*\0\x08\0\0\0\xff\0\x12\x01"  # 255 entries are told, and none is there
    data = encoded(Image.fromarray(IMAGE).convert("L"), kind, exif=exif)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="Corrupt EXIF data"):
            Image.open(io.BytesIO(data)).getexif()
        spec = importlib.util.spec_from_file_location("radio.images_again", images.__file__)
        assert spec is not None and spec.loader is not None
        again = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(again)  # as its import sets the filters, before those of the tests
        assert again.decode(data).shape == (3, 24, 32)
        assert again.orientation(data) == 1
