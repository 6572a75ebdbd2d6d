import numpy as np
import pytest
from hypothesis import given, settings, strategies

from radio.scenes.export import compress, decompress, run_lengths


def runs_by_loop(mask: np.ndarray) -> list[int]:
    lengths, value = [0], False
    for pixel in mask.T.ravel().tolist():
        if pixel != value:
            lengths.append(0)
            value = pixel
        lengths[-1] += 1
    return lengths


# pycocotools 2.0 hands its own buffers to numpy 2 the old way
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("share", [0.0, 0.03, 0.5, 0.97, 1.0])
@pytest.mark.parametrize("shape", [(1, 1), (5, 9), (96, 96), (300, 200)])
def test_runs_equal_a_slow_loop_and_pycocotools_reads_the_text(share: float, shape: tuple[int, int]) -> None:
    mask_library = pytest.importorskip("pycocotools.mask")
    mask = np.random.default_rng(0).random(shape) < share
    lengths = run_lengths(mask)
    assert lengths == runs_by_loop(mask)
    rle = {"size": list(shape), "counts": compress(lengths)}
    assert np.array_equal(mask_library.decode(rle).astype(bool), mask)
    assert mask_library.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode() == rle["counts"]
    assert decompress(rle["counts"]) == lengths


def test_a_hand_value() -> None:
    mask = np.array([[0, 1], [1, 1]], dtype=bool)
    assert run_lengths(mask) == [1, 3]
    assert compress([1, 3]) == "13"
    assert compress([20]) == "d0"  # 20 has the sign bit of five set, so a zero group follows


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("1\n", "none of COCO's 64"),
        ("p", "none of COCO's 64"),
        ("é", "none of"),
        ("1d", "cut"),
        ("d" * 9, "cut"),
    ],
)
def test_texts_that_are_none(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        decompress(text)
    assert decompress("") == []
    assert decompress(compress([10**8, 5, 0, 3])) == [10**8, 5, 0, 3]


@settings(deadline=None)
@given(lengths=strategies.lists(strategies.integers(0, 2**27), max_size=40))
def test_any_lengths_come_back(lengths: list[int]) -> None:
    assert decompress(compress(lengths)) == lengths


@settings(deadline=None)
@given(text=strategies.text("".join(map(chr, range(48, 112))), max_size=12))
def test_any_text_is_numbers_or_refused(text: str) -> None:
    """By the loop of COCO's own C code, with Python's integers."""
    lengths, place, cut = [], 0, False
    while place < len(text) and not cut:
        value, groups, more = 0, 0, True
        while more and not cut:
            group = ord(text[place]) - 48 if place < len(text) else 0
            cut, more = place >= len(text), bool(group & 32)
            value |= (group & 31) << 5 * groups
            place, groups = place + 1, groups + 1
            if not more and group & 16:
                value -= 1 << 5 * groups
        lengths.append(value + (lengths[-2] if len(lengths) > 2 else 0))
        if groups > 6:
            cut = True
    if cut:
        with pytest.raises(ValueError, match=r"cut|more than 30 bits"):
            decompress(text)
    else:
        assert decompress(text) == lengths
