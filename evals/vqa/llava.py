"""LLaVA on any backbone: transformers' LlavaForConditionalGeneration with our encoder as its vision tower.

The tower has no trained weights: cached tokens of the encoder pass through it, and images are encoded on the
fly. `save_llava` puts the encoder's own file into the folder, so that
`LlavaForConditionalGeneration.from_pretrained` opens it wherever this module has been imported.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, cast, final

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from evals.core.evaluator import EvalRun
from evals.core.features import Extraction, View, extract
from radio.data import ImageSource
from radio.errors import CheckpointError, ConfigError, DataError, RadioError
from radio.hub import load_backbone
from radio.image_files import spread
from radio.io import make_folder
from radio.model import RadioModel
from radio.nn.phi_s import FeatureNormaliser, FeatureStatistics
from radio.nn.token_merging import merge_tokens
from radio.resources import check_memory, fast_products
from radio.types import Backbone, Features

from .data import PaddedImages, Piece, VisionInputs, format_prompt, pad, tokenize
from .language import LanguageModel
from .scoring import BenchmarkQuestion
from .settings import Size
from .settings import View as ViewName

# Letters: B batch, N images, S tokens of a prompt, T tokens of an image, D token width, H W grid, h w input
# size.

PROJECTOR = "model.multi_modal_projector."
_NORM_EPS = 1e-6
_NORMALISER_IMAGES = 1000

Grid = tuple[int, int]


class RadioTowerConfig(PreTrainedConfig):  # type: ignore[misc]
    """The configuration of the tower, with everything needed to open it again."""

    model_type = "am_radio_tower"

    def __init__(
        self,
        hidden_size: int = 1,
        image_size: tuple[int, int] = (1, 1),
        layer_norm: bool = False,
        normalised: bool = False,
        encoder: str = "",
        fingerprint: str = "",
        encoder_bytes: int = 0,
        token_grid: tuple[int, int] | None = None,
        merged_tokens: int | None = None,
        **rest: Any,
    ) -> None:
        super().__init__(**rest)
        self.hidden_size = hidden_size  # D
        self.image_size = list(image_size)
        self.layer_norm = layer_norm
        self.normalised = normalised  # whether the tower has a `FeatureNormaliser`
        self.encoder = encoder  # a spec of radio.hub; empty if the encoder's file is in the weights
        self.fingerprint = fingerprint
        self.encoder_bytes = encoder_bytes
        self.token_grid = None if token_grid is None else list(token_grid)  # what tokens are averaged to
        self.merged_tokens = merged_tokens  # number that the most alike are merged into


@final
class RadioTower(PreTrainedModel):  # type: ignore[misc]
    """The vision tower of LLaVA: a frozen backbone, or its cached tokens passed through."""

    config_class = RadioTowerConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _no_split_modules: list[str] = []  # noqa: RUF012 (transformers' convention)

    def __init__(self, config: RadioTowerConfig) -> None:
        super().__init__(config)
        self._backbone: list[Backbone] = []  # in a list: not a submodule, so it is neither trained nor saved
        if config.encoder_bytes:
            self.register_buffer("encoder_file", torch.zeros(config.encoder_bytes, dtype=torch.uint8))
        self.normaliser = FeatureNormaliser(config.hidden_size) if config.normalised else nn.Identity()
        self.post_init()

    def attach(self, backbone: Backbone) -> None:
        """Set the backbone that encodes images."""
        self._backbone = [backbone.eval()]

    @property
    def backbone(self) -> Backbone:
        """The encoder, opened on first use.

        Raises:
            CheckpointError: it is not the one that was saved.
        """
        if not self._backbone:
            self.attach(self._open())
        return self._backbone[0]

    def forward(self, pixel_values: Tensor, return_dict: bool = True, **_: Any) -> Any:
        """Encode images [B, 3, h, w] in [0, 1] into tokens [B, T, D]; tokens [B, T, D] are not encoded again.

        The optional layer norm has no weights: the projector's first layer would absorb them.
        """
        tokens = self.normaliser(pixel_values if pixel_values.ndim == 3 else self._encode(pixel_values))
        if self.config.layer_norm:
            tokens = F.layer_norm(tokens.float(), tokens.shape[-1:], eps=_NORM_EPS).to(tokens.dtype)
        return BaseModelOutputWithPooling(last_hidden_state=tokens, hidden_states=(tokens,))

    def _encode(self, images: Tensor) -> Tensor:
        backbone = self.backbone.to(images.device, images.dtype)
        with torch.no_grad():
            features = backbone(images)
            height, width = self.config.token_grid or features.grid
            tokens = reduce_tokens(features, (height, width), self.config.merged_tokens)
        if not self.training and not bool(torch.isfinite(tokens).all()):
            raise RadioError(f"{backbone.name} gives values that are not finite; nothing can be asked")
        return tokens

    def _open(self) -> Backbone:
        if not self.config.encoder_bytes:
            if not self.config.encoder:
                raise CheckpointError(
                    "this LLaVA was made without its encoder; attach one with attach(backbone)"
                )
            backbone = load_backbone(self.config.encoder)
        else:
            data = cast(Tensor, self.encoder_file).cpu().numpy().tobytes()
            with tempfile.TemporaryDirectory(prefix="am-radio-vqa-") as folder:
                path = Path(folder, "encoder.safetensors")
                path.write_bytes(data)
                backbone = load_backbone(str(path))
        if backbone.fingerprint != self.config.fingerprint:
            raise CheckpointError(
                f"{self.config.encoder or 'the encoder in this folder'}: has the fingerprint "
                f"{backbone.fingerprint[:12]} instead of {self.config.fingerprint[:12]}; name the weights "
                f"that this LLaVA was trained on"
            )
        return backbone


def make_llava(
    backbone: Backbone,
    language: LanguageModel,
    size: tuple[int, int],
    num_tokens: int,
    *,
    layer_norm: bool,
    seed: int,
    token_grid: tuple[int, int] | None = None,
    merged_tokens: int | None = None,
    normaliser: FeatureNormaliser | None = None,
) -> Any:
    """Build LLaVA-1.5 from the backbone, a new projector drawn from `seed`, and the language model's weights.

    Args:
        size: (height, width) that images are encoded at.
        num_tokens: T that the language model receives at that size.
        token_grid: (H, W) that the backbone's tokens are averaged over (default: not averaged).
        merged_tokens: number that the most alike of them are merged into (default: not merged).
        normaliser: of these tokens (default: they are not normalised).
    """
    tower = RadioTowerConfig(
        hidden_size=backbone.token_dim,
        image_size=size,
        layer_norm=layer_norm,
        normalised=normaliser is not None,
        fingerprint=backbone.fingerprint,
        token_grid=token_grid,
        merged_tokens=merged_tokens,
    )
    network = language.load()
    config = LlavaConfig(
        vision_config=tower,
        text_config=network.config,
        image_token_index=language.image_token,
        image_seq_length=num_tokens,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        tie_word_embeddings=network.config.tie_word_embeddings,
    )
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    model.model.vision_tower = RadioTower(tower)
    model.model.vision_tower.attach(backbone)
    if normaliser is not None:
        model.model.vision_tower.normaliser = normaliser
    projector = model.model.multi_modal_projector.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in (projector.linear_1, projector.linear_2):  # as torch does it
            bound = layer.in_features**-0.5
            layer.weight.uniform_(-bound, bound, generator=generator)
            layer.bias.uniform_(-bound, bound, generator=generator)
    model.model.language_model = network.model
    model.lm_head = network.lm_head
    own = network.generation_config
    model.generation_config = GenerationConfig(  # without its penalties, limits and stop words
        bos_token_id=own.bos_token_id, eos_token_id=own.eos_token_id, pad_token_id=language.pad_token
    )
    return model.float().eval()


_FEW_WEIGHTS = 5_000_000


@contextmanager
def limit_threads(model: Any, device: torch.device) -> Iterator[None]:
    """Use one thread for a small language model on the CPU; leave the number unchanged for others.

    Its operations are so short that several threads wait for each other: on cores shared with other programs
    a step took 2.9 s on two threads and 0.17 s on one.
    """
    before = torch.get_num_threads()
    if device.type == "cpu" and sum(parameter.numel() for parameter in model.parameters()) < _FEW_WEIGHTS:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def learn(model: nn.Module, parts: tuple[str, ...]) -> None:
    """Make the parameters trainable whose names start with one of `parts`, and freeze all others."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(parts))


def restore(model: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Copy learned tensors into the model.

    Raises:
        CheckpointError: a name or shape that is not this model's.
    """
    own = dict(model.named_parameters(remove_duplicate=False))  # a tied weight has two names
    wrong = [name for name in tensors if name not in own or own[name].shape != tensors[name].shape]
    if wrong:
        raise CheckpointError(f"{source}: {wrong[0]} is none of this model's weights; remove it, train anew")
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)


def save_llava(model: Any, language: LanguageModel, folder: Path) -> None:
    """Write a folder that `LlavaForConditionalGeneration.from_pretrained` opens, whole or not at all.

    A RadioModel is saved in the weights; another backbone only by its name, which must be a spec.

    Raises:
        ConfigError: the folder exists, or the backbone cannot be opened by its name.
    """
    if folder.exists():
        raise ConfigError(f"{folder}: is there already; remove it, or choose another folder to save to")

    def fill(partial: Path) -> None:
        _with_encoder(model, partial).save_pretrained(partial)
        language.tokenizer.save_pretrained(partial)

    try:
        is_ours = make_folder(folder, fill)
    except SafetensorError as error:  # raised by its writer on a full disk
        raise RadioError(f"{folder}: the model could not be written ({error}); free some space") from error
    if not is_ours:
        raise ConfigError(f"{folder}: another process has just written it; choose another folder to save to")


def _with_encoder(model: Any, folder: Path) -> Any:
    """Replace the model's tower by one that can be opened again; return the model."""
    backbone: Backbone = model.model.vision_tower.backbone
    old = model.model.vision_tower.config
    encoder, data = "", b""
    if isinstance(backbone, RadioModel):
        path = folder / "encoder.safetensors"
        backbone.save(path)
        if load_backbone(str(path)).fingerprint != backbone.fingerprint:
            raise ConfigError(
                f"{backbone.name} with a chosen window cannot be kept in a folder; leave --save out"
            )
        data = path.read_bytes()
        path.unlink()
    else:
        encoder = backbone.name
        try:
            opened = load_backbone(encoder)
        except ValueError as error:
            raise ConfigError(
                f"{encoder} cannot be opened by its name alone, so a folder could not hold it; save a "
                f"checkpoint of ours, or leave --save out"
            ) from error
        if opened.fingerprint != backbone.fingerprint:
            raise ConfigError(f"{encoder}: its name opens other weights; leave --save out")
    config = RadioTowerConfig(
        hidden_size=old.hidden_size,
        image_size=tuple(old.image_size),
        layer_norm=old.layer_norm,
        normalised=old.normalised,
        encoder=encoder,
        fingerprint=backbone.fingerprint,
        encoder_bytes=len(data),
        token_grid=old.token_grid,
        merged_tokens=old.merged_tokens,
    )
    tower = RadioTower(config)
    if data:
        tower.encoder_file.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    tower.attach(backbone)
    tower.normaliser = model.model.vision_tower.normaliser
    model.model.vision_tower = tower
    model.config.vision_config = config
    model.model.config.vision_config = config
    return model


AutoConfig.register(RadioTowerConfig.model_type, RadioTowerConfig)
AutoModel.register(RadioTowerConfig, RadioTower)


@final
@dataclass(frozen=True, kw_only=True)
class TokenEncoder:
    """A frozen backbone at one size, whose tokens are cached."""

    model: Backbone
    size: Size
    run: EvalRun
    token_cache_gb: float
    image_tokens: int | None = None  # maximum of T
    merges: bool = False  # the most alike into one, instead of averaging over a coarser grid

    @cached_property
    def own_grid(self) -> Grid:
        """(H, W) of the backbone's tokens at this size."""
        check_memory(self.model, 1, self.size, self.run.device, torch.float32)
        model = self.model.to(self.run.device, torch.float32).eval()  # bf16 would round the weights in place
        with torch.inference_mode():
            return model(torch.zeros(1, 3, *self.size, device=self.run.device)).grid

    @property
    def grid(self) -> Grid:
        """(H, W) that the tokens are averaged over, or the backbone's own."""
        return self.own_grid if self.merges else choose_grid(self.own_grid, self.image_tokens)

    @property
    def merged_tokens(self) -> int | None:
        """Number that the tokens are merged into; None if they are not."""
        fits = self.image_tokens is None or math.prod(self.own_grid) <= self.image_tokens
        return self.image_tokens if self.merges and not fits else None

    @property
    def num_tokens(self) -> int:
        """Number of tokens T of an image that the language model receives."""
        return self.merged_tokens or math.prod(self.grid)

    @property
    def reduction(self) -> str:
        """Describe how the tokens are reduced; empty if they are not."""
        if self.merged_tokens is not None:
            return f"merged into {self.merged_tokens}"
        return "" if self.grid == self.own_grid else f"averaged to {self.grid[0]}x{self.grid[1]}"

    def encode(self, source: ImageSource, view: ViewName) -> VisionInputs:
        """Encode each image of the source once; if all tokens exceed `token_cache_gb`, return pixels instead.

        Raises:
            DataError: an image that cannot be read; names the first.
            RadioError: tokens that are not finite.
        """
        images: ImageSource = PaddedImages(source, self.size) if view == "pad" else source
        crop = View(kind="center", size=self.size, ratio=1.0, nearest_size=self.model.nearest_size)
        count = len(source.keys) * self.num_tokens * self.model.token_dim
        if 4 * count > self.token_cache_gb * 1e9:
            return Pixels(images, crop, self.num_tokens)
        grid, merged_tokens = self.grid, self.merged_tokens
        how = Extraction(
            view=crop,
            device=self.run.device,
            dtype=self.run.dtype,
            head=f"tokens {self.reduction}".strip(),
            project=lambda features: reduce_tokens(features, grid, merged_tokens),
            batch=self.run.batch_size(64),
            workers=self.run.workers,
        )
        stored = extract(
            self.model,
            images,
            how,
            cache=self.run.cache,
            group=self.run.ranks,
            watch=self.run.progress,
            damage=self.run.damage,
        )
        broken = stored.skipped()
        if broken:
            raise DataError(
                f"{source.name}: {len(broken)} of {len(source.keys)} images cannot be read; the first is "
                f"{broken[0].key}: {broken[0].reason}"
            )
        return Tokens(source.keys, stored.load().features)

    def fit_normaliser(self, source: ImageSource, view: ViewName) -> FeatureNormaliser:
        """Measure the distribution of the tokens on up to 1,000 images, evenly spread over the source."""
        inputs, statistics = self.encode(source, view), FeatureStatistics(self.model.token_dim)
        for name in spread(source.keys, _NORMALISER_IMAGES):
            tokens = inputs[name]
            if tokens.ndim == 3:  # pixels
                with torch.inference_mode():
                    features = self.model(tokens[None].to(self.run.device))
                    tokens = reduce_tokens(features, self.grid, self.merged_tokens)[0]
            statistics.update(tokens)
        return FeatureNormaliser.fit(statistics)


@final
class Tokens:
    """Tokens [N, T, D] by image name."""

    def __init__(self, names: Iterable[str], tokens: Tensor) -> None:
        self._rows = {name: row for row, name in enumerate(names)}
        self._tokens, self.num_tokens = tokens, tokens.shape[1]

    def __getitem__(self, name: str) -> Tensor:
        return self._tokens[self._rows[name]]


@final
class Pixels:
    """Pixels by image name, read on access; the vision tower then encodes them."""

    def __init__(self, source: ImageSource, view: View, num_tokens: int) -> None:
        self._source, self._view, self.num_tokens = source, view, num_tokens
        self._rows = {name: row for row, name in enumerate(source.keys)}

    def __getitem__(self, name: str) -> Tensor:
        try:
            return self._view(self._source.read(self._rows[name]))
        except DataError as error:
            raise DataError(f"{self._source.name}: {name}: {error}") from error


def choose_grid(grid: Grid, most: int | None) -> Grid:
    """Choose the largest grid of about the same aspect ratio and at most `most` tokens; `grid` if it fits."""
    height, width = grid
    if most is None or height * width <= most:
        return grid
    scale = math.sqrt(most / (height * width))
    rows = max(1, min(int(height * scale + 1e-6), most))
    return rows, max(1, min(int(width * scale + 1e-6), most // rows))


def resample(tokens: Tensor, grid: Grid, coarse: Grid) -> Tensor:
    """Average tokens [B, H*W, D] over a coarser grid: [B, h*w, D]."""
    if grid == coarse:
        return tokens
    spatial = tokens.transpose(1, 2).unflatten(2, grid)
    return F.adaptive_avg_pool2d(spatial, coarse).flatten(2).transpose(1, 2).contiguous()


def reduce_tokens(features: Features, grid: Grid, merged_tokens: int | None) -> Tensor:
    """Average tokens over a grid, then merge the most alike into a number of them: [B, T, D]."""
    tokens = resample(features.tokens, features.grid, grid)
    return tokens if merged_tokens is None else merge_tokens(tokens, grid, merged_tokens)


class Prompt(NamedTuple):
    """A question, ready for the language model."""

    id: str
    prompt: str  # with `<image>` where it has an image
    image: str | None


def make_prompt(question: BenchmarkQuestion, *, blind: bool = False) -> Prompt:
    """Format a benchmark's question as LLaVA-1.5's prompt; without its image if `blind`."""
    image = None if blind else question.image
    return Prompt(question.id, format_prompt(question.prompt, has_image=image is not None), image)


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Generator:
    """A trained LLaVA, and its settings of generation."""

    model: Any
    language: LanguageModel
    inputs: VisionInputs | None  # None if no question has an image
    device: torch.device
    new_tokens: int
    batch: int
    bf16: bool = False

    def answer(self, prompts: Sequence[Prompt]) -> list[str]:
        """Return the answers in order, generated in batches of similar length and one modality."""
        num_tokens = self.inputs.num_tokens if self.inputs else 0
        ids = [
            torch.tensor(tokenize([Piece(prompt.prompt, False)], self.language.tokenizer, num_tokens)[0])
            for prompt in prompts
        ]
        order = sorted(range(len(prompts)), key=lambda i: (prompts[i].image is None, len(ids[i]), i))
        answers = [""] * len(prompts)
        for start in range(0, len(order), self.batch):
            for is_blind in (False, True):
                rows = [
                    i for i in order[start : start + self.batch] if (prompts[i].image is None) == is_blind
                ]
                if rows:
                    texts = self._generate([ids[i] for i in rows], [prompts[i].image for i in rows])
                    for row, text in zip(rows, texts, strict=True):
                        answers[row] = text
        return answers

    def _generate(self, ids: Sequence[Tensor], images: Sequence[str | None]) -> list[str]:
        """Continue prompts of one modality."""
        padded = pad(ids, self.language.pad_token, left=True)
        batch = {name: value.to(self.device) for name, value in padded.items()}
        pixels = [self.inputs[image] for image in images if image is not None and self.inputs is not None]
        if pixels:
            batch["pixel_values"] = torch.stack(pixels).float().to(self.device)
        with (
            torch.inference_mode(),
            fast_products(self.device),
            torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16),
        ):
            output = self.model.generate(
                **batch,
                do_sample=False,
                num_beams=1,
                max_new_tokens=self.new_tokens,
                use_cache=True,
                eos_token_id=self.language.tokenizer.eos_token_id,
                pad_token_id=self.language.pad_token,
            )
        new = output[:, batch["input_ids"].shape[1] :]
        return [text.strip() for text in self.language.tokenizer.batch_decode(new, skip_special_tokens=True)]
