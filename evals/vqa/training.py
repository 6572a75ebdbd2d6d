"""The stages of LLaVA by transformers' Trainer: the tiny model's words, the projector, instruction tuning.

A finished stage is one file of learned weights under a hash of all that decides them. A killed stage
continues from the last of the Trainer's checkpoints that is whole; on as many ranks it ends with the same
weights as an uninterrupted one. On another number of ranks it starts again.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, final

import torch

from evals.core.evaluator import EvalRun
from evals.core.report import DatasetInfo
from radio import checkpoint
from radio.chunks import DamagedError, TensorSpec, check_all_there, read_tensors, write_tensors
from radio.data import ImageSource
from radio.errors import ConfigError, DataError, require
from radio.model import seeded
from radio.nn.phi_s import FeatureNormaliser
from radio.resources import collect

from .data import Conversations, Piece, Record, format_prompt, shuffle_images, tokenize
from .language import LanguageModel
from .llava import PROJECTOR, Grid, TokenEncoder, learn, make_llava, restore
from .settings import Preset, StagePlan, VqaSettings, plan_stage
from .stage_trainer import StageJob, plan_memory, train

# Letters: B batch, S tokens of a sample, E width of the language model, D token width.

_FORMAT = "am-radio-vqa/3"
_LEAST_TEXT = 64  # tokens of a sample that must remain for question and answer beside the image
_PARTS = {"projector": (PROJECTOR,), "language": ("model.language_model.", "lm_head.")}


class TrainingData(NamedTuple):
    """The training data of a stage."""

    records: list[Record]
    source: ImageSource | None  # of the images; None if no record has one
    name: str
    fingerprint: str
    notes: tuple[str, ...] = ()  # on dropped records

    def info(self, role: str) -> DatasetInfo:
        """Return the data's row in the report."""
        return DatasetInfo(
            role=role,
            name=self.name,
            fingerprint=self.fingerprint,
            count=len(self.records),
            num_classes=0,
            scored=False,
        )


class Finished(NamedTuple):
    """A finished stage."""

    plan: StagePlan
    losses: list[float]  # in nats per token, of every step

    @property
    def final_loss(self) -> float:
        """Mean loss over the last tenth of the steps, at least ten steps."""
        last = self.losses[-max(10, len(self.losses) // 10) :]
        return sum(last) / len(last)


class Trained(NamedTuple):
    """A LLaVA after its last stage."""

    model: Any
    stages: dict[str, Finished]
    key: str  # hash of all that decided the weights


class _PlannedStage(NamedTuple):
    """A stage that is to be trained, or loaded."""

    name: str
    option: str  # by which --stages asks for it
    plan: StagePlan
    data: TrainingData
    key: str
    path: Path  # of its weights
    parts: tuple[str, ...]  # prefixes of the weights that learn
    names: list[str]  # of these weights


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class LlavaTraining:
    """The stages of one run, and what they share."""

    settings: VqaSettings
    preset: Preset
    encoder: TokenEncoder
    language: LanguageModel
    data: Mapping[str, TrainingData]  # of the stages `pretrain` and `instruct`
    layer_norm: bool
    seed: int
    run: EvalRun
    normaliser: FeatureNormaliser | None = None  # of the encoder's tokens

    def check_room(self) -> None:
        """Check that an image's tokens fit into a training sample beside its text.

        Raises:
            ConfigError: an image would be cut off.
        """
        prompt = [Piece(format_prompt("", has_image=True), False)]
        num_tokens, longest = self.encoder.num_tokens, self.preset.longest
        lead, _ = tokenize(prompt, self.language.tokenizer, num_tokens)
        if len(lead) + _LEAST_TEXT > longest:
            most = longest - _LEAST_TEXT - (len(lead) - num_tokens)
            raise ConfigError(
                f"{self.encoder.model.name} gives {num_tokens} tokens an image, and a training sample of "
                f"{longest} tokens has room for {most}; give --image-tokens (1024, for instance) to average "
                f"them over a coarser grid, or a smaller --size"
            )

    @property
    def _token_grid(self) -> Grid | None:
        """(H, W) that tokens are averaged over; None if they are not."""
        return None if self.encoder.grid == self.encoder.own_grid else self.encoder.grid

    def train(self) -> Trained:
        """Train the requested stages, or load those that are finished.

        Raises:
            ConfigError: a stage that is not requested and has not been trained before, one that does not fit
                into the memory, or a batch that cannot be divided among the ranks.
            RadioError: values that are not finite.
        """
        model = self._build()
        stages = self._plan_stages(model)
        self._check_memory(model, stages)
        finished: dict[str, Finished] = {}
        entries: dict[Path, list[str]] = {}  # names of the weights in each finished stage's file
        for stage in stages:
            losses = self._load(model, stage.names, stage.path)
            if losses is None:
                if stage.option not in self.settings.stages:
                    raise ConfigError(
                        f"the stage {stage.option} with these settings has not been trained, and --stages "
                        f"leaves it out; add {stage.option} there"
                    )
                learn(model, stage.parts)
                model, losses = self._train(model, stage, entries)
            if self.run.ranks.leads:  # also of a run that was killed just here
                shutil.rmtree(stage.path.with_suffix(""), ignore_errors=True)  # the checkpoints
            entries[stage.path] = stage.names
            finished[stage.name] = Finished(stage.plan, losses)
        return Trained(model, finished, stages[-1].key)

    def _plan_stages(self, model: Any) -> list[_PlannedStage]:
        """Resolve the stages in their order; a stage's key is a hash of all that decides its weights."""
        stages = {"pretrain": self.preset.pretrain, "instruct": self.preset.instruct}
        if not {"instruct", "score"} & set(self.settings.stages):
            del stages["instruct"]
        is_pretrained = self.language.name != "tiny"
        if not is_pretrained and self.preset.words is not None:
            stages = {"words": self.preset.words, **stages}
        merged_tokens = self.encoder.merged_tokens
        key = digest(_FORMAT, self.encoder.model.fingerprint, self.language.fingerprint, self.layer_norm)
        if self.normaliser is not None:
            key = digest(key, checkpoint.digest(self.normaliser.state_dict()))
        planned = []
        for name, stage in stages.items():
            option = "pretrain" if name == "words" else name
            data = self.data[option]
            if name == "words":
                records = [record._replace(image=None) for record in data.records]
                data = data._replace(records=records, source=None)
            plan = plan_stage(stage, self.preset, self.settings, len(data.records), opened=is_pretrained)
            key = digest(
                key,
                plan.describe(),
                data.fingerprint,
                self.encoder.size,
                self.seed,
                self.run.precision,
                self.settings.lora_rank,
                self.settings.shuffle_images,
                self.preset.longest,
                self._token_grid if merged_tokens is None else ["merged", merged_tokens],
            )
            parts = tuple(part for learned in plan.learns for part in _PARTS[learned])
            names = [weight for weight, _ in model.named_parameters() if weight.startswith(parts)]
            path = self.run.cache / "vqa" / "stages" / f"{key}.safetensors"
            planned.append(_PlannedStage(name, option, plan, data, key, path, parts, names))
        return planned

    def _check_memory(self, model: Any, stages: Sequence[_PlannedStage]) -> None:
        """Check that every stage that is to be trained fits, before the first begins; note what each takes.

        LoRA's own weights, below 1 % of the others, are not counted.
        """
        there = self.run.ranks.on_leader(lambda: [stage.path.exists() for stage in stages])
        for stage, is_finished in zip(stages, there, strict=True):
            if is_finished or stage.option not in self.settings.stages:
                continue
            learn(
                model, (PROJECTOR,) if stage.name == "instruct" and self.settings.lora_rank else stage.parts
            )
            if text := plan_memory(model, self.settings, self.run).describe():
                self.run.notes.append(f"{stage.name}: {text.strip(' ()')}")

    def _build(self) -> Any:
        encoder = self.encoder
        return make_llava(
            encoder.model,
            self.language,
            encoder.size,
            encoder.num_tokens,
            layer_norm=self.layer_norm,
            seed=self.seed,
            token_grid=self._token_grid,
            merged_tokens=encoder.merged_tokens,
            normaliser=self.normaliser,
        )

    def _load(self, model: Any, names: Sequence[str], path: Path) -> list[float] | None:
        """Load a finished stage into the model; return its losses, or None where it has to be trained."""
        weights = dict(model.named_parameters())
        specs = {name: TensorSpec(torch.float32, tuple(weights[name].shape)) for name in names}
        entry = None
        if path.exists():
            try:
                entry = read_tensors(path, specs)
            except DamagedError as error:
                if self.run.ranks.leads:
                    self.run.damage.add(error)
        if len(set(self.run.ranks.gather_objects(entry is not None))) > 1:
            raise DataError(f"{path}: ranks see different files; give --cache a folder that all share")
        if entry is None:
            if self.run.ranks.leads and path.is_dir():  # a file cannot replace it
                shutil.rmtree(path)
            return None
        restore(model, entry.tensors, str(path))
        losses: list[float] = json.loads(entry.metadata["losses"])
        return losses

    def _train(
        self, model: Any, stage: _PlannedStage, entries: Mapping[Path, list[str]]
    ) -> tuple[Any, list[float]]:
        """Train a stage and write its weights; `entries` are those of the stages before."""
        plan, data, path, names = stage.plan, stage.data, stage.path, stage.names
        rank = self.settings.lora_rank if stage.name == "instruct" else None
        if rank is not None:
            add_lora(model, rank, self.seed)
        needs = plan_memory(model, self.settings, self.run)
        tokenizer, records, inputs = self.language.tokenizer, data.records, None
        if data.source is not None:
            inputs = self.encoder.encode(data.source, plan.view)
            if self.settings.shuffle_images:
                records = shuffle_images(records, data.source.keys, self.seed)
        job = StageJob(
            title=f"{stage.name} {self.encoder.model.name}{needs.describe()}",
            plan=plan,
            data=Conversations(records, plan.template, tokenizer, inputs, self.preset.longest),
            pad_token=self.language.pad_token,
            seed=self.seed,
            folder=path.with_suffix(""),
            needs=needs,
            run=self.run,
        )
        weights, losses = train(model, job)
        if needs.changes_model:  # sharded, or frozen weights rounded: only the learned ones are of use
            del model
            collect()
            model = self._build()
            for entry, own in entries.items():
                self._load(model, own, entry)
            if rank is not None:
                add_lora(model, rank, self.seed)
            restore(model, weights, str(path))  # on the leader; others load the file
        if rank is not None:
            model.model.language_model = model.model.language_model.merge_and_unload()
        if self.run.ranks.leads:
            merged = {
                name: weight.detach().cpu() for name, weight in model.named_parameters() if name in names
            }
            write_tensors(path, merged, {"losses": json.dumps(losses)})
        self.run.ranks.barrier()
        check_all_there([path])
        if needs.changes_model and not self.run.ranks.leads:
            self._load(model, names, path)
        return model, losses


def digest(*parts: Any) -> str:
    """Compute a hash of the parts, as text."""
    return hashlib.sha256(json.dumps([str(part) for part in parts]).encode()).hexdigest()


def add_lora(model: Any, rank: int, seed: int) -> None:
    """Freeze the language model and add trainable LoRA layers, drawn from the seed, to its linear layers.

    Raises:
        MissingExtraError: peft is not installed.
    """
    peft = require("peft", extra="vqa")
    learn(model, (PROJECTOR,))
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.05, target_modules="all-linear")
    with warnings.catch_warnings(), seeded(seed):
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing")  # peft uses the old name
        model.model.language_model = peft.get_peft_model(model.model.language_model, config)
