"""segment_anything's own modules at the size for the scenes."""

from __future__ import annotations

from typing import Any

from ..errors import require
from ..nn.normalise import IMAGENET_MEAN, IMAGENET_STD

SIDE, PATCH = 112, 8
WIDTH, NECK = 96, 64
_GRID = SIDE // PATCH


def new_sam() -> Any:
    """Build an untrained `segment_anything.modeling.Sam`: 112 px, patch 8, width 96, neck and decoder 64.

    Raises:
        MissingExtraError: segment_anything is not installed.
    """
    library = require("segment_anything.modeling", extra="sam")
    encoder = library.ImageEncoderViT(
        img_size=SIDE,
        patch_size=PATCH,
        embed_dim=WIDTH,
        depth=4,
        num_heads=4,
        out_chans=NECK,
        use_rel_pos=True,
        window_size=7,
        global_attn_indexes=(1, 3),
    )
    prompts = library.PromptEncoder(
        embed_dim=NECK,
        image_embedding_size=(_GRID, _GRID),
        input_image_size=(SIDE, SIDE),
        mask_in_chans=16,
    )
    decoder = library.MaskDecoder(
        transformer_dim=NECK,
        transformer=library.TwoWayTransformer(depth=2, embedding_dim=NECK, num_heads=4, mlp_dim=256),
        iou_head_hidden_dim=NECK,
    )
    mean, std = ([255 * value for value in values] for values in (IMAGENET_MEAN, IMAGENET_STD))
    return library.Sam(encoder, prompts, decoder, pixel_mean=mean, pixel_std=std)
