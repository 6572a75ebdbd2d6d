"""SAM's image encoder as a teacher against segment-anything's own classes."""

from __future__ import annotations

import copy

import pytest
import torch

from radio.errors import CheckpointError, ConfigError
from radio.teachers import families
from radio.teachers import sam as sam_module
from radio.teachers.sam import (
    MEAN,
    MEMBERS,
    STD,
    SamArchitecture,
    SamAttention,
    SamTrunk,
    build_encoder,
    freeze_sam,
)

pytest.importorskip("segment_anything")

NARROW = SamArchitecture(width=32, depth=2, num_heads=2, global_blocks=())


def tiny_encoder():
    from segment_anything.modeling import ImageEncoderViT

    return ImageEncoderViT(
        img_size=96,
        patch_size=8,
        embed_dim=32,
        depth=3,
        num_heads=2,
        out_chans=8,
        use_rel_pos=True,
        window_size=5,
        global_attn_indexes=(2,),
    )


def whole_sam(name: str, member: SamArchitecture):
    from segment_anything.build_sam import _build_sam

    return _build_sam(member.width, member.depth, member.num_heads, list(member.global_blocks))


def test_the_necks_answer_to_our_tokens_is_the_encoders(randomised):
    encoder = randomised(tiny_encoder())
    teacher = freeze_sam(SamTrunk(encoder), name="tiny", mean=(0.0,) * 3, std=(1.0,) * 3)
    assert teacher.native_size == (96, 96) and teacher.nearest_size(50, 200) == (96, 96)
    images = torch.rand(2, 3, 96, 96)
    features = teacher(images)
    assert features.grid == (12, 12) and features.tokens.shape == (2, 144, 32)
    with torch.no_grad():
        torch.testing.assert_close(encoder.neck(features.map()), encoder(images), atol=1e-5, rtol=0)
    torch.testing.assert_close(features.summary, features.tokens.mean(1))


def test_features_after_a_block_are_those_of_the_encoder_cut_there(randomised):
    encoder = randomised(tiny_encoder())
    teacher = freeze_sam(SamTrunk(copy.deepcopy(encoder)), name="tiny", mean=(0.0,) * 3, std=(1.0,) * 3)
    assert teacher.num_blocks == 3 and teacher.intermediate is not None
    images = torch.rand(2, 3, 96, 96)
    for block, features in zip([2, 0], teacher.intermediate(images, [2, 0]), strict=True):
        cut = copy.deepcopy(encoder)
        cut.blocks = cut.blocks[: block + 1]
        with torch.no_grad():
            torch.testing.assert_close(cut.neck(features.map()), cut(images), atol=1e-5, rtol=0)
        torch.testing.assert_close(features.summary, features.tokens.mean(1))


def test_the_blocks_attention_is_the_librarys_bit_for_bit(randomised):
    theirs = randomised(tiny_encoder())
    ours = SamTrunk(copy.deepcopy(theirs)).eval()
    assert all(isinstance(block.attn, SamAttention) for block in ours.encoder.blocks)
    assert ours.encoder.state_dict().keys() == theirs.state_dict().keys()
    images = torch.rand(2, 3, 96, 96)
    with torch.no_grad():
        x = theirs.patch_embed(images) + theirs.pos_embed
        for block in theirs.blocks:
            x = block(x)
    assert torch.equal(ours(images).tokens.detach(), x.flatten(1, 2))
    ours(images).tokens.square().mean().backward()
    assert all(block.attn.rel_pos_h.grad.abs().sum() > 0 for block in ours.encoder.blocks)


def test_a_forward_makes_no_index_off_the_weights_device(randomised, monkeypatch):
    trunk = SamTrunk(randomised(tiny_encoder()))
    monkeypatch.setattr(torch, "arange", lambda *_, **__: pytest.fail("an index was made in the forward"))
    trunk(torch.rand(1, 3, 96, 96))


def check_file(name: str, member: SamArchitecture, randomised, tmp_path) -> None:
    sam = randomised(whole_sam(name, member))
    torch.save(sam.state_dict(), tmp_path / "sam.pth")
    teacher = families["sam"](name, tmp_path / "sam.pth")
    assert teacher.native_size == (1024, 1024)
    images = torch.rand(1, 3, 1024, 1024, generator=torch.Generator().manual_seed(3))
    features = teacher(images)
    assert features.grid == (64, 64) and features.summary.shape == (1, member.width)
    with torch.no_grad():
        theirs = sam.image_encoder(sam.preprocess(images[0] * 255)[None])
        torch.testing.assert_close(sam.image_encoder.neck(features.map()), theirs, atol=1e-5, rtol=0)


def test_an_official_files_encoder_with_sams_own_normalisation(randomised, tmp_path, monkeypatch):
    monkeypatch.setitem(sam_module.MEMBERS, "vit_b", NARROW)
    check_file("vit_b", NARROW, randomised, tmp_path)


@pytest.mark.slow
def test_vit_b_from_an_official_file(randomised, tmp_path):
    check_file("vit_b", MEMBERS["vit_b"], randomised, tmp_path)


@pytest.mark.parametrize("name", list(MEMBERS))
def test_names_and_shapes_are_the_official_files(name):
    from segment_anything import sam_model_registry

    with torch.device("meta"):
        official = sam_model_registry[name]().state_dict()
        ours = build_encoder(MEMBERS[name]).state_dict()
    prefix = "image_encoder."
    theirs = {
        key.removeprefix(prefix): value.shape for key, value in official.items() if key.startswith(prefix)
    }
    assert {key: value.shape for key, value in ours.items()} == theirs


def test_another_members_file_is_named(tmp_path):
    torch.save({"image_encoder.patch_embed.proj.bias": torch.zeros(1280)}, tmp_path / "sam_vit_h.pth")
    with pytest.raises(CheckpointError, match="the weights of vit_h; name it sam:vit_h@FILE"):
        families["sam"]("vit_b", tmp_path / "sam_vit_h.pth")


def test_partial_and_foreign_files(tmp_path):
    torch.save({"image_encoder.patch_embed.proj.bias": torch.zeros(768)}, tmp_path / "partial.pth")
    with pytest.raises(CheckpointError, match=r"sam:vit_b@.*missing: pos_embed, .* and \d+ more"):
        families["sam"]("vit_b", tmp_path / "partial.pth")
    torch.save({"cls_token": torch.zeros(768)}, tmp_path / "foreign.pth")
    with pytest.raises(CheckpointError, match=r"no key starts with 'image_encoder\.'"):
        families["sam"]("vit_b", tmp_path / "foreign.pth")


def test_unknown_members_and_a_missing_file():
    with pytest.raises(ConfigError, match="unknown SAM member 'vit-h'; did you mean vit_h"):
        families["sam"]("vit-h", None)
    with pytest.raises(CheckpointError, match="sam:vit_h@FILE"):
        families["sam"]("vit_h", None)


def test_the_normalisation_is_sams():
    assert [round(255 * value, 3) for value in MEAN] == [123.675, 116.28, 103.53]
    assert [round(255 * value, 3) for value in STD] == [58.395, 57.12, 57.375]
