"""SAM after its image encoder: neck, prompt encoder, mask decoder; many prompts on many images at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn

from ..checkpoint import digest, load_state
from ..errors import CheckpointError, require
from .sam import ANCHORS, MEAN, MEMBERS, STD
from .scenes import scenes_sam
from .weights_file import read_weights

# Letters: B images, C neck width, D width before it, h w embedding grid, P prompts, K clicks per prompt.

_NECK = 256  # neck width of the released SAMs
_PARTS = ("image_encoder.neck.", "prompt_encoder.", "mask_decoder.")


class Decoded(NamedTuple):
    """Three masks per prompt, and the decoder's estimate of their quality."""

    logits: Tensor  # [P, 3, 4 * h, 4 * w]
    quality: Tensor  # [P, 3], predicted intersection over union


@final
class SamHead(nn.Module):
    """The parts of a SAM other than its image encoder's trunk.

    Args:
        sam: a `segment_anything.modeling.Sam`; its encoder's blocks are dropped.
        name: name for reports.
    """

    def __init__(self, sam: Any, name: str) -> None:
        super().__init__()
        self.name = name
        self.neck: nn.Module = sam.image_encoder.neck
        self.prompt_encoder: Any = sam.prompt_encoder
        self.mask_decoder: Any = sam.mask_decoder
        self.side = int(
            sam.image_encoder.img_size
        )  # side in pixels of the square frame of the prompts' coordinates
        self.grid: tuple[int, int] = tuple(sam.prompt_encoder.image_embedding_size)
        self.token_dim = int(sam.image_encoder.neck[0].in_channels)  # D
        self.mean = tuple((sam.pixel_mean.flatten() / 255).tolist())  # of RGB in [0, 1]
        self.threshold = float(sam.mask_threshold)
        self.requires_grad_(False)
        self.eval()

    @property
    def fingerprint(self) -> str:
        """Hex hash of all weights, the frame's side, the grid and the mask threshold."""
        return digest(self.state_dict(), f"{self.side} {self.grid} {self.threshold}")

    def embed(self, tokens: Tensor) -> Tensor:
        """Apply the neck to the tokens before it as a map: [B, D, h, w] -> [B, C, h, w]."""
        embeddings: Tensor = self.neck(tokens)
        return embeddings


def load_sam_head(spec: str, file: Path | None = None) -> SamHead:
    """Load the head of a released SAM, recognised by its shapes; for `scenes:sam` without a file, its own.

    Raises:
        CheckpointError: no file, not a SAM's, or one of another architecture.
        MissingExtraError: segment-anything is not installed.
    """
    if spec == "scenes:sam" and file is None:
        return SamHead(scenes_sam(), spec)
    weights = read_weights(spec, file, ANCHORS)
    tensors = {key: value for key, value in weights.items() if key.startswith(_PARTS)}
    first = tensors.get("image_encoder.neck.0.weight")
    widths = {member.width: name for name, member in MEMBERS.items()}
    if first is None or first.ndim != 4 or first.shape[1] not in widths:
        raise CheckpointError(
            f"{file}: not a SAM checkpoint: wanted image_encoder.neck.0.weight of width "
            f"{', '.join(f'{width} ({name})' for width, name in widths.items())}, as released"
        )
    sam = new_released_sam(first.shape[1])
    load_state(_Parts(sam), tensors, str(file))
    return SamHead(sam, f"sam:{widths[first.shape[1]]}")


def new_released_sam(width: int) -> Any:
    """Build an untrained `Sam` of the released shape whose image encoder, `width` wide, has no blocks.

    Raises:
        MissingExtraError: segment-anything is not installed.
    """
    library = require("segment_anything.modeling", extra="sam")
    encoder = library.ImageEncoderViT(
        img_size=1024, patch_size=16, embed_dim=width, depth=0, out_chans=_NECK, use_abs_pos=False
    )
    prompts = library.PromptEncoder(
        embed_dim=_NECK, image_embedding_size=(64, 64), input_image_size=(1024, 1024), mask_in_chans=16
    )
    decoder = library.MaskDecoder(
        transformer_dim=_NECK,
        transformer=library.TwoWayTransformer(depth=2, embedding_dim=_NECK, num_heads=8, mlp_dim=2048),
    )
    mean, std = ([255 * value for value in values] for values in (MEAN, STD))
    return library.Sam(encoder, prompts, decoder, pixel_mean=mean, pixel_std=std)


def decode(
    sam: Any,
    embeddings: Tensor,
    which: Tensor,
    *,
    boxes: Tensor | None = None,
    points: Tensor | None = None,
    labels: Tensor | None = None,
) -> Decoded:
    """Decode masks for prompts on many images in one pass.

    `MaskDecoder.forward` takes one image and repeats it for each of its prompts; here `which` gives the image
    of each prompt, so a batch needs no loop. If both kinds are given, boxes come first.

    Args:
        sam: a `SamHead` or a whole `Sam`.
        embeddings: after the neck: [B, C, h, w].
        which: the image of each prompt: [P] int64.
        boxes: [P1, 4] as x0 y0 x1 y1 in pixels of the encoder's input.
        points: [P2, K, 2] as x y, the K clicks of each prompt; P1 + P2 = P.
        labels: [P2, K], 1 on the object and 0 beside it (default: all 1).
    """
    sparse = torch.cat(
        ([sam.prompt_encoder(None, boxes, None)[0]] if boxes is not None else [])
        + ([_embed_points(sam, points, labels)] if points is not None else [])
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
    ]  # the first mask token is for several prompts on one object
    logits = torch.einsum("pmc,pchw->pmhw", torch.stack(masks, dim=1), upscaled)
    return Decoded(logits, decoder.iou_prediction_head(seen[:, 0])[:, 1:])


def _embed_points(sam: Any, points: Tensor, labels: Tensor | None) -> Tensor:
    if labels is None:
        labels = torch.ones(points.shape[:2], device=points.device)
    sparse: Tensor = sam.prompt_encoder((points, labels), None, None)[0]
    return sparse


@final
class _Parts(nn.Module):
    """The modules of a `Sam` that the head uses, under their names in a released file."""

    def __init__(self, sam: Any) -> None:
        super().__init__()
        self.image_encoder = nn.Module()
        self.image_encoder.neck = sam.image_encoder.neck
        self.prompt_encoder = sam.prompt_encoder
        self.mask_decoder = sam.mask_decoder
