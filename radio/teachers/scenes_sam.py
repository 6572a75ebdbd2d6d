"""segment_anything's own modules at the size of the scenes, and a decoder call for many pictures at once."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import require
from ..nn.normalise import IMAGENET_MEAN, IMAGENET_STD

# Letters: B pictures, C neck width, h w embedding grid, P prompts.

SIDE, PATCH = 112, 8
WIDTH, NECK = 96, 64
_GRID = SIDE // PATCH


class Decoded(NamedTuple):
    """Three masks a prompt, and how good the decoder thinks they are."""

    logits: Tensor  # [P, 3, 4 * h, 4 * w]
    quality: Tensor  # [P, 3], predicted intersection over union


def new_sam() -> Any:
    """An untrained `segment_anything.modeling.Sam`: 112 px, patch 8, width 96, neck and decoder of width 64.

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


def decode(
    sam: Any, embeddings: Tensor, which: Tensor, *, boxes: Tensor | None = None, points: Tensor | None = None
) -> Decoded:
    """Masks for prompts on many pictures, in one pass.

    `MaskDecoder.forward` takes one picture and repeats it for each of its prompts; here `which` says whose
    prompt each one is, so a batch needs no loop. Boxes come first where both kinds are given.

    Args:
        sam: a `Sam` as `new_sam` builds it.
        embeddings: after the neck: [B, C, h, w].
        which: the picture of each prompt: [P] int64.
        boxes: [P1, 4] as x0 y0 x1 y1 in pixels of the encoder's input.
        points: [P2, 2] as x y, one foreground point a prompt; P1 + P2 = P.
    """
    sparse = torch.cat(
        ([sam.prompt_encoder(None, boxes, None)[0]] if boxes is not None else [])
        + ([_embed_points(sam, points)] if points is not None else [])
    )
    decoder = sam.mask_decoder
    own = torch.cat((decoder.iou_token.weight, decoder.mask_tokens.weight))
    tokens = torch.cat((own.expand(len(sparse), -1, -1), sparse), dim=1)
    source = embeddings[which] + sam.prompt_encoder.no_mask_embed.weight.view(1, -1, 1, 1)
    places = sam.prompt_encoder.get_dense_pe().expand(len(sparse), -1, -1, -1)
    seen, source = decoder.transformer(source, places, tokens)
    upscaled = decoder.output_upscaling(source.transpose(1, 2).unflatten(2, embeddings.shape[-2:]))
    masks = [
        network(seen[:, 1 + i]) for i, network in enumerate(decoder.output_hypernetworks_mlps) if i > 0
    ]  # the first is for many prompts on one object
    logits = torch.einsum("pmc,pchw->pmhw", torch.stack(masks, dim=1), upscaled)
    return Decoded(logits, decoder.iou_prediction_head(seen[:, 0])[:, 1:])


def _embed_points(sam: Any, points: Tensor) -> Tensor:
    labels = torch.ones(len(points), 1, device=points.device)
    sparse: Tensor = sam.prompt_encoder((points[:, None], labels), None, None)[0]
    return sparse
