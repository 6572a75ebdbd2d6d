"""The shipped scenes teachers: what they give, and that their files are what the metadata say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from radio.checkpoint import load
from radio.errors import CheckpointError, ConfigError
from radio.scenes.language import TEMPLATES, VOCABULARY, captions
from radio.scenes.world import CLASSES, render
from radio.teachers import families
from radio.teachers.sam import decode
from radio.teachers.scenes import (
    CONTEXT,
    NAMES,
    NECK,
    WEIGHTS,
    TextError,
    scenes_sam,
    scenes_teacher,
    tokenize,
    weights_file,
)


@pytest.mark.parametrize(
    ("name", "side", "grid", "summary", "tokens"),
    [("clip", 96, 8, 128, 128), ("dense", 108, 9, 128, 128), ("sam", 112, 14, 96, 96)],
)
def test_each_teacher_gives_features_of_its_own_grid_and_widths(name, side, grid, summary, tokens):
    teacher = families["scenes"](name, None)
    assert teacher.name == f"scenes:{name}"
    assert teacher.native_size == (side, side)
    features = teacher(torch.rand(2, 3, side, side))
    assert features.grid == (grid, grid)
    assert features.summary.shape == (2, summary)
    assert features.tokens.shape == (2, grid * grid, tokens)
    assert features.tokens.dtype == torch.float32
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert (teacher.text is not None) == (name == "clip")


@pytest.mark.parametrize("name", NAMES)
def test_features_after_a_block_are_those_of_the_teacher_cut_there(name):
    teacher = scenes_teacher(name)
    assert teacher.num_blocks == 4 and teacher.intermediate is not None
    images = torch.rand(2, 3, *teacher.native_size)
    for block, features in zip([3, 1], teacher.intermediate(images, [3, 1]), strict=True):
        cut = scenes_teacher(name)
        trunk: Any = cut.trunk
        if name == "sam":
            trunk.num_blocks, trunk.encoder.blocks = block + 1, trunk.encoder.blocks[: block + 1]
        else:
            vit = trunk.vit if name == "clip" else trunk
            vit.config, vit.blocks = replace(vit.config, depth=block + 1), vit.blocks[: block + 1]
        expected = cut(images)
        torch.testing.assert_close(features.summary, expected.summary)
        torch.testing.assert_close(features.tokens, expected.tokens)


def test_patch_teachers_take_other_multiples_of_their_patch_and_sam_does_not():
    assert scenes_teacher("clip")(torch.rand(1, 3, 120, 60)).grid == (10, 5)
    with pytest.raises(ValueError, match="112x112"):
        scenes_teacher("sam")(torch.rand(1, 3, 96, 96))


def test_the_files_are_small_and_loading_twice_gives_the_same_teacher():
    assert sum(weights_file(name).stat().st_size for name in NAMES) <= 10_000_000
    assert scenes_teacher("dense").fingerprint == scenes_teacher("dense").fingerprint
    assert len({scenes_teacher(name).fingerprint for name in NAMES}) == 3


@pytest.mark.parametrize("name", NAMES)
def test_each_card_says_how_the_teacher_was_made_and_what_it_reaches(name):
    metadata = load(weights_file(name)).metadata
    assert metadata["name"] == f"scenes:{name}"
    assert metadata["command"].startswith("radio-train scenes-teachers")  # now tools/scene_teachers
    assert metadata["samples"] > 10_000
    assert {"settings", "scenes", "minutes", "versions", "protocols", "curve"} <= metadata.keys()
    aims = {"clip": {"zero_shot": 75, "knn": 75}, "dense": {"knn": 60}, "sam": {"box_miou": 75}}[name]
    scores = metadata["scores"]["full"]
    assert all(aim <= scores[key] <= 95 for key, aim in aims.items()), scores


def test_an_unknown_teacher_or_a_file_is_refused():
    with pytest.raises(ConfigError, match="did you mean clip"):
        families["scenes"]("clop", None)
    with pytest.raises(ConfigError, match="known: clip, dense, sam"):
        families["scenes"]("zzz", None)
    with pytest.raises(CheckpointError, match=r"brings its own weights; leave out @x\.pt"):
        families["scenes"]("clip", Path("x.pt"))


def test_an_absent_or_damaged_file_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        scenes_teacher("dense", tmp_path)
    whole = weights_file("dense").read_bytes()
    weights_file("dense", tmp_path).write_bytes(whole[:-7])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        scenes_teacher("dense", tmp_path)
    assert WEIGHTS.is_dir()


def test_tokens_are_start_words_end_padding():
    (row,) = tokenize(["A photo, of a RED circle."])
    words = ["a", "photo", "of", "a", "red", "circle"]
    wanted = [1, *(2 + VOCABULARY.index(word) for word in words), 2 + len(VOCABULARY)]
    assert row.tolist() == wanted + [0] * (CONTEXT - len(wanted))


def test_every_caption_and_prompt_can_be_read():
    texts = [text for index in range(60) for text in captions(render(index))]
    texts += [template.format(name) for template in TEMPLATES for name in CLASSES]
    assert tokenize(texts).shape == (len(texts), CONTEXT)


def test_foreign_words_and_long_texts_are_refused():
    with pytest.raises(TextError, match="did you mean circle"):
        tokenize(["a red circel"])
    with pytest.raises(TextError, match="does not know 'labrador'"):
        tokenize(["a labrador"])
    with pytest.raises(TextError, match="has 15 words"):
        tokenize(["a " * 15])


def test_text_vectors_do_not_depend_on_their_neighbours_and_name_the_class():
    text = scenes_teacher("clip").text
    assert text is not None
    together = text.encode(["a red circle", "a photo of a red circle", "a blue ring"])
    assert together.shape == (3, 128) and not together.requires_grad
    torch.testing.assert_close(text.encode(["a blue ring"])[0], together[2], atol=1e-5, rtol=1e-4)
    alike = torch.nn.functional.cosine_similarity(together[0], together[1:], dim=1)
    assert alike[0] > alike[1]
    assert text.fingerprint == scenes_teacher("clip").text.fingerprint


def test_decoding_many_images_at_once_equals_the_library_one_by_one():
    sam = scenes_sam()
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(3, NECK, 14, 14, generator=generator)
    which = torch.tensor([2, 0, 2, 1])
    boxes = torch.tensor([[10.0, 20.0, 60.0, 70.0], [0.0, 0.0, 30.0, 30.0]])
    points = torch.tensor([[50.0, 40.0], [90.0, 7.0]])
    found = decode(sam, embeddings, which, boxes=boxes, points=points[:, None])
    for row, image in enumerate(which.tolist()):
        box = boxes[row][None] if row < 2 else None
        point = (points[row - 2].view(1, 1, 2), torch.ones(1, 1)) if row >= 2 else None
        sparse, dense = sam.prompt_encoder(point, box, None)
        logits, quality = sam.mask_decoder(
            image_embeddings=embeddings[image][None],
            image_pe=sam.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=True,
        )
        torch.testing.assert_close(found.logits[row], logits[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found.quality[row], quality[0], atol=1e-4, rtol=1e-4)


def test_the_teachers_tokens_are_what_the_neck_of_the_whole_sam_reads():
    sam, teacher = scenes_sam(), scenes_teacher("sam")
    images = torch.rand(2, 3, 112, 112)
    plane = teacher(images).map()
    normalised = (images * 255 - sam.pixel_mean) / sam.pixel_std
    torch.testing.assert_close(
        sam.image_encoder.neck(plane), sam.image_encoder(normalised), atol=1e-4, rtol=1e-4
    )
