"""SAM (Kirillov et al. 2023): its image encoder as a teacher, and its neck, prompt encoder and mask decoder.

The encoders are ViT-B/L/H at 1024 pixels; the head decodes many prompts on many images at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn

from ..checkpoint import digest, load_state
from ..errors import CheckpointError, require
from ..teachers import families
from ..types import Features, Teacher
from .base import Frozen, find_member, read_weights

# Letters: B images (or windows), T tokens, D width, H W grid, h w pixels or embedding grid, C neck width,
# P prompts, K clicks per prompt; in attention h heads, C width of a head, Q query and K key coordinates.

MEAN = (123.675 / 255, 116.28 / 255, 103.53 / 255)
STD = (58.395 / 255, 57.12 / 255, 57.375 / 255)
ANCHORS = ("image_encoder.patch_embed.proj.bias", "image_encoder.neck.0.weight")
"""Names that every released checkpoint of the whole SAM has."""

_PREFIX = "image_encoder."
_HEAD_PARTS = ("image_encoder.neck.", "prompt_encoder.", "mask_decoder.")


@final
class SamAttention(nn.Module):
    """segment-anything's `Attention` with the same weight names and bit-identical results.

    The library makes the indices of its relative positions on the CPU in every forward: on a GPU two blocking
    copies per block. Here they are non-persistent buffers, which move with the weights.

    Args:
        attention: the library's module, whose weights are reused.
    """

    rows: Tensor  # [Q, K]
    columns: Tensor  # [Q, K]

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.num_heads: int = attention.num_heads
        self.scale: float = attention.scale
        self.qkv: nn.Linear = attention.qkv
        self.proj: nn.Linear = attention.proj
        self.rel_pos_h: nn.Parameter = attention.rel_pos_h
        self.rel_pos_w: nn.Parameter = attention.rel_pos_w
        for name, table in (("rows", self.rel_pos_h), ("columns", self.rel_pos_w)):
            line = torch.arange((len(table) + 1) // 2, device=table.device)
            self.register_buffer(name, line[:, None] - line[None, :] + len(line) - 1, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Apply attention to [B, H, W, D]; H and W are those that the tables were made for."""
        b, height, width, _ = x.shape
        qkv = self.qkv(x).reshape(b, height * width, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.reshape(3, b * self.num_heads, height * width, -1).unbind(0)
        scores = (q * self.scale) @ k.transpose(-2, -1)
        query = q.reshape(b * self.num_heads, height, width, -1)
        by_row = torch.einsum("bhwc,hkc->bhwk", query, self.rel_pos_h[self.rows])
        by_column = torch.einsum("bhwc,wkc->bhwk", query, self.rel_pos_w[self.columns])
        scores = scores.view(-1, height, width, height, width) + by_row[..., None] + by_column[:, :, :, None]
        weights = scores.view(-1, height * width, height * width).softmax(dim=-1)
        mixed = (weights @ v).view(b, self.num_heads, height, width, -1).permute(0, 2, 3, 1, 4)
        out: Tensor = self.proj(mixed.reshape(b, height, width, -1))
        return out


@dataclass(frozen=True, kw_only=True, slots=True)
class SamArchitecture:
    """The architecture of one released image encoder."""

    width: int
    depth: int
    num_heads: int
    global_blocks: tuple[int, ...]


MEMBERS = {
    "vit_b": SamArchitecture(width=768, depth=12, num_heads=12, global_blocks=(2, 5, 8, 11)),
    "vit_l": SamArchitecture(width=1024, depth=24, num_heads=16, global_blocks=(5, 11, 17, 23)),
    "vit_h": SamArchitecture(width=1280, depth=32, num_heads=16, global_blocks=(7, 15, 23, 31)),
}


@families.register("sam")
def sam(name: str, file: Path | None, *, meta: bool = False) -> Teacher:
    """Load the image encoder of the member `name` from an official checkpoint of the whole SAM.

    Its tokens are the last block's output, before the neck, and its summary is their mean. It accepts only
    1024 x 1024 pixels.

    Raises:
        ConfigError: no such member.
        CheckpointError: no file, not a SAM's, or one of another member (which is named).
        MissingExtraError: segment-anything is not installed.
    """
    member = find_member(MEMBERS, name, "SAM member")
    spec = f"sam:{name}"
    tensors = {} if meta else _read_encoder(name, file)
    with torch.device("meta"):
        encoder = build_encoder(member)
    if not meta:
        load_state(encoder, tensors, f"{spec}@{file}")
    whole = partial(_new_meta_sam, member.width) if meta else partial(load_released_sam, spec, file)
    return freeze_sam(SamTrunk(encoder), name=spec, mean=MEAN, std=STD, weights_file=file, sam=whole)


def build_encoder(member: SamArchitecture) -> nn.Module:
    """Build segment-anything's own image encoder of a released member, untrained.

    Raises:
        MissingExtraError: segment-anything is not installed.
    """
    library = require("segment_anything.modeling", extra="sam")
    encoder: nn.Module = library.ImageEncoderViT(
        img_size=1024,
        patch_size=16,
        embed_dim=member.width,
        depth=member.depth,
        num_heads=member.num_heads,
        mlp_ratio=4,
        out_chans=256,
        qkv_bias=True,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=14,
        global_attn_indexes=member.global_blocks,
    )
    return encoder


@final
class SamTrunk(nn.Module):
    """Any `segment_anything` `ImageEncoderViT` as a trunk; its neck stays at `encoder.neck`, unused here.

    The attention of blocks with relative positions is replaced in place by `SamAttention`.
    """

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        for block in encoder.blocks:
            if not isinstance(block.attn, SamAttention) and block.attn.use_rel_pos:
                block.attn = SamAttention(block.attn)
        self.encoder = encoder
        self.num_blocks = len(encoder.blocks)

    def forward(self, images: Tensor) -> Features:
        """Map normalised [B, 3, size, size] to the last block's tokens, before the neck, and their mean."""
        return self.intermediate(images, [self.num_blocks - 1])[0]

    def intermediate(self, images: Tensor, blocks: Sequence[int]) -> list[Features]:
        """Compute the tokens after each of the given blocks and their mean; SAM has no final norm."""
        x = self.encoder.patch_embed(images)  # [B, H, W, D]
        if self.encoder.pos_embed is not None:
            x = x + self.encoder.pos_embed
        outputs = {}
        for index, block in enumerate(self.encoder.blocks):
            if index > max(blocks):
                break
            x = block(x)
            if index in blocks:
                tokens = x.flatten(1, 2)
                outputs[index] = Features(tokens.mean(1), tokens, (x.shape[1], x.shape[2]))
        return [outputs[index] for index in blocks]


def freeze_sam(
    trunk: SamTrunk,
    *,
    name: str,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    weights_file: Path | None = None,
    sam: Callable[[], Any] | None = None,
) -> Frozen:
    """Wrap a SAM trunk as a teacher that accepts only the trunk's own size."""
    embed, side = trunk.encoder.patch_embed.proj, int(trunk.encoder.img_size)
    return Frozen(
        trunk=trunk,
        name=name,
        mean=mean,
        std=std,
        native_size=(side, side),
        patch_size=int(embed.stride[0]),
        fixed_size=True,
        summary_dim=int(embed.out_channels),
        token_dim=int(embed.out_channels),
        weights_file=weights_file,
        sam=sam,
    )


def _read_encoder(name: str, file: Path | None) -> dict[str, Tensor]:
    """Read the image encoder's weights in a checkpoint of the whole SAM; refuse those of another member."""
    source = f"sam:{name}@{file}"
    weights = read_weights(f"sam:{name}", file, ANCHORS)
    tensors = {key.removeprefix(_PREFIX): value for key, value in weights.items() if key.startswith(_PREFIX)}
    if not tensors:
        raise CheckpointError(
            f"{source}: no key starts with {_PREFIX!r}; wanted a checkpoint of the whole SAM, as released"
        )
    bias = tensors.get("patch_embed.proj.bias")
    for other, member in MEMBERS.items():
        if bias is not None and other != name and bias.shape == (member.width,):
            raise CheckpointError(f"{source}: these are the weights of {other}; name it sam:{other}@FILE")
    return tensors


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
        self.side = int(sam.image_encoder.img_size)  # in pixels, of the frame of the prompts' coordinates
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


def load_sam_head(spec: str, file: Path | None) -> SamHead:
    """Load the head of a released SAM; see `load_released_sam`."""
    sam = load_released_sam(spec, file)
    widths = {member.width: name for name, member in MEMBERS.items()}
    return SamHead(sam, f"sam:{widths[sam.image_encoder.neck[0].in_channels]}")


def load_released_sam(spec: str, file: Path | None) -> Any:
    """Load a released SAM, recognised by its shapes, without its image encoder's blocks.

    Raises:
        CheckpointError: no file, not a SAM's, or one of another architecture.
        MissingExtraError: segment-anything is not installed.
    """
    weights = read_weights(spec, file, ANCHORS)
    tensors = {key: value for key, value in weights.items() if key.startswith(_HEAD_PARTS)}
    first = tensors.get("image_encoder.neck.0.weight")
    widths = {member.width: name for name, member in MEMBERS.items()}
    if first is None or first.ndim != 4 or first.shape[1] not in widths:
        raise CheckpointError(
            f"{file}: not a SAM checkpoint: wanted image_encoder.neck.0.weight of width "
            f"{', '.join(f'{width} ({name})' for width, name in widths.items())}, as released"
        )
    sam = new_released_sam(first.shape[1])
    parts = {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items()}
    load_state(SamHead(sam, spec), parts, str(file))  # the head's modules are the SAM's own
    return sam


def _new_meta_sam(width: int) -> Any:
    with torch.device("meta"):
        return new_released_sam(width)


def new_released_sam(width: int) -> Any:
    """Build an untrained `Sam` of the released shape whose image encoder, `width` wide, has no blocks.

    Raises:
        MissingExtraError: segment-anything is not installed.
    """
    library = require("segment_anything.modeling", extra="sam")
    encoder = library.ImageEncoderViT(
        img_size=1024, patch_size=16, embed_dim=width, depth=0, out_chans=256, use_abs_pos=False
    )
    return assemble_sam(encoder, MEAN, STD, heads=8, mlp_dim=2048)


def assemble_sam(
    encoder: Any,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    *,
    heads: int,
    mlp_dim: int,
    iou_head: int = 256,
) -> Any:
    """Build an untrained `Sam` around an `ImageEncoderViT`; mean and std are those of RGB in [0, 1]."""
    library = require("segment_anything.modeling", extra="sam")
    width, side = encoder.neck[0].out_channels, encoder.img_size
    grid = side // encoder.patch_embed.proj.stride[0]
    prompts = library.PromptEncoder(
        embed_dim=width, image_embedding_size=(grid, grid), input_image_size=(side, side), mask_in_chans=16
    )
    decoder = library.MaskDecoder(
        transformer_dim=width,
        transformer=library.TwoWayTransformer(depth=2, embedding_dim=width, num_heads=heads, mlp_dim=mlp_dim),
        iou_head_hidden_dim=iou_head,
    )
    pixel_mean, pixel_std = ([255 * value for value in values] for values in (mean, std))
    return library.Sam(encoder, prompts, decoder, pixel_mean=pixel_mean, pixel_std=pixel_std)


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
    if points is not None and labels is None:
        labels = torch.ones(points.shape[:2], device=points.device)
    sparse = torch.cat(
        ([sam.prompt_encoder(None, boxes, None)[0]] if boxes is not None else [])
        + ([sam.prompt_encoder((points, labels), None, None)[0]] if points is not None else [])
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
