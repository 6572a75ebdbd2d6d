"""The training stages in order: the tiny model's words, the projector, the instruction tuning."""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, final

import numpy as np
import torch
from torch import Tensor

from radio.chunks import Damage, DamagedError
from radio.data import ImageSource
from radio.dist import Group
from radio.errors import CheckpointError, ConfigError, DataError
from radio.progress import ProgressFactory
from radio.provenance import has_tf32

from .conversations import Piece, Record, fingerprint, read_records
from .encoding import Encoder
from .images import Images
from .language import Language
from .library import require_peft
from .llava import PROJECTOR, learn, make_llava, restore
from .memory import plan_memory
from .presets import Preset, Stage, StagePlan, plan_stage
from .prompts import VICUNA_V1, ask
from .samples import Conversations, ShuffledImages, VisionInputs, tokenize
from .scenes_mix import IMAGES, INSTRUCT, PRETRAIN, Mix, write_mix
from .settings import VqaSettings
from .stages import Job, final_loss, train
from .states import StageState, read_state

_FORMAT = "am-radio-vqa/2"
_LEAST_TEXT = 64  # tokens of a sample that must remain for question and answer beside the image
_PARTS = {"projector": (PROJECTOR,), "language": ("model.language_model.", "lm_head.")}


class Material(NamedTuple):
    """The training data of a stage."""

    records: list[Record]
    source: ImageSource | None  # of the images; None if no record has one
    name: str
    fingerprint: str
    notes: tuple[str, ...] = ()  # on dropped records


class Done(NamedTuple):
    """A finished stage."""

    plan: StagePlan
    losses: tuple[float, ...]

    @property
    def final_loss(self) -> float:
        """Loss in nats per token, over the last tenth of the steps."""
        return final_loss(self.losses)


def open_material(
    settings: VqaSettings, preset: Preset, cache: Path, group: Group, damage: Damage
) -> dict[str, Material]:
    """Load the data of both stages and check every record.

    Args:
        damage: collects damaged files of the cache.

    Raises:
        DataError: a file that is absent, or a record that cannot be used.
    """
    memo = cache / "fingerprints"
    if settings.pretrain_data is not None and settings.instruct_data is not None:
        given = {
            "pretrain": (settings.pretrain_data, settings.pretrain_images),
            "instruct": (settings.instruct_data, settings.instruct_images),
        }
        found = {stage: _material(*paths, settings, memo, None) for stage, paths in given.items()}
        blank = [record.id for record in found["pretrain"].records if record.image is None]
        if blank:
            raise DataError(
                f"{settings.pretrain_data}: {len(blank)} records have no image, the first has the id "
                f"{blank[0]}; the projector learns from images only, remove them"
            )
        return found
    mix = Mix(count=(settings.scenes or preset.scenes)[0], seed=settings.seed)
    root = cache / "scenes" / f"vqa-mix{mix.version}-{mix.count}-seed{mix.seed}"
    if group.leads:
        write_mix(root, mix, damage)
    group.barrier()
    return {
        stage: _material(root / file, root / IMAGES, settings, memo, "scenes:train")
        for stage, file in (("pretrain", PRETRAIN), ("instruct", INSTRUCT))
    }


def _material(
    file: Path, folder: Path | None, settings: VqaSettings, memo: Path, title: str | None
) -> Material:
    images = Images(folder) if folder is not None else None
    records, notes = read_records(
        file,
        lambda name: images is not None and name in images,
        settings.limit,
        settings.max_error_fraction,
    )
    names = {record.image for record in records if record.image is not None}
    source = images.source(names, memo, title) if images is not None and names else None
    content = source.fingerprint if source is not None else "no images"
    return Material(records, source, title or file.name, _hash(fingerprint(records), content), notes)


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Course:
    """Trains the stages of one run, and holds what they share."""

    settings: VqaSettings
    preset: Preset
    encoder: Encoder
    language: Language
    material: dict[str, Material]
    num_tokens: int
    layer_norm: bool
    folder: Path  # of the states
    device: torch.device
    group: Group
    watch: ProgressFactory

    def stages(self) -> dict[str, Stage]:
        """Return the stages by name, in order; a tiny language model first learns the captions' words."""
        stages = {"pretrain": self.preset.pretrain, "instruct": self.preset.instruct}
        if self.language.name == "tiny" and self.preset.words is not None:
            return {"words": self.preset.words, **stages}
        return stages

    def run(self) -> tuple[dict[str, Done], dict[str, Tensor], str]:
        """Train the requested stages or load them; return the stages, all learned weights, and their hash.

        Raises:
            ConfigError: a stage that is not requested and has not been trained before.
        """
        done: dict[str, Done] = {}
        weights: dict[str, Tensor] = {}
        key = _hash(_FORMAT, self.encoder.model.fingerprint, self.language.fingerprint, self.layer_norm)
        last = "instruct" if {"instruct", "score"} & set(self.settings.stages) else "pretrain"
        for name, stage in self.stages().items():
            material = self._material(name)
            plan = plan_stage(
                stage, self.preset, self.settings, len(material.records), opened=self.language.name != "tiny"
            )
            key = self._key(key, plan, material)
            state = self._stage(name, plan, material, key, weights)
            weights |= state.weights
            done[name] = Done(plan, state.losses)
            if name == last:
                break
        return done, weights, key

    def check_room(self) -> None:
        """Check that an image's tokens fit into a training sample beside its text.

        Raises:
            ConfigError: an image would be cut off.
        """
        lead, _ = tokenize([Piece(ask(VICUNA_V1, "", True), False)], self.language, self.num_tokens)
        longest = self.preset.longest
        if len(lead) + _LEAST_TEXT > longest:
            most = longest - _LEAST_TEXT - (len(lead) - self.num_tokens)
            raise ConfigError(
                f"{self.encoder.model.name} gives {self.num_tokens} tokens an image, and a training sample "
                f"of {longest} tokens has room for {most}; give --image-tokens (1024, for instance) to "
                f"average them over a coarser grid, or a smaller --size"
            )

    @property
    def numbers(self) -> str:
        """Precision that networks compute in: fp32, bf16, or TF32 for fp32 on a GPU that has it."""
        is_tf32 = self.settings.precision == "fp32" and has_tf32(self.device)
        return "TF32" if is_tf32 else self.settings.precision

    @property
    def _token_grid(self) -> tuple[int, int] | None:
        return None if self.encoder.grid == self.encoder.own_grid else self.encoder.grid

    def build(self, weights: dict[str, Tensor]) -> Any:
        """Build LLaVA with these learned weights, on the CPU."""
        model = make_llava(
            self.encoder.model,
            self.language,
            self.encoder.size,
            self.num_tokens,
            layer_norm=self.layer_norm,
            seed=self.settings.train_seed,
            token_grid=self._token_grid,
        )
        restore(model, weights, str(self.folder))
        return model

    def _material(self, name: str) -> Material:
        if name != "words":
            return self.material[name]
        seen = self.material["pretrain"]
        return seen._replace(records=[record._replace(image=None) for record in seen.records], source=None)

    def _stage(
        self, name: str, plan: StagePlan, material: Material, key: str, weights: dict[str, Tensor]
    ) -> StageState:
        path = self.folder / f"{key}.pt"
        found = self._read(path, key)
        rank = self.settings.lora_rank if name == "instruct" else None
        if found.step >= plan.steps:
            return found if rank is None else self._merged(found, rank, weights)
        asked = "pretrain" if name == "words" else name
        if asked not in self.settings.stages:
            raise ConfigError(
                f"the stage {asked} with these settings has not been trained, and --stages leaves it out; "
                f"add {asked} there"
            )
        model = self.build(weights)
        learn(model, tuple(part for what in plan.learns for part in _PARTS[what]))
        if rank is not None:
            add_lora(model, rank)
        needs = plan_memory(model, self.settings, self.device, self.group.world)
        job = Job(
            title=f"{name} {self.encoder.model.name}{needs.told}",
            plan=plan,
            data=self._samples(material, plan),
            pad_token=self.language.pad_token,
            seed=self.settings.train_seed,
            state=path,
            key=key,
            device=self.device,
            bf16=self.settings.precision == "bf16",
            shard=needs.is_sharded,
            is_checkpointed=needs.is_checkpointed,
            workers=self.encoder.workers,
            group=self.group,
        )
        state = train(model, job, self.watch)
        return state if rank is None else self._merged(state, rank, weights)

    def _read(self, path: Path, key: str) -> StageState:
        """Read the state of a stage; if its file is damaged, delete it and return a fresh state."""
        try:
            return read_state(path, key, self.group)
        except CheckpointError as error:
            self.encoder.damage.add(DamagedError(str(error)))
        self.group.barrier()  # every rank has seen it
        if self.group.leads:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        self.group.barrier()
        return StageState()

    def _merged(self, state: StageState, rank: int, weights: dict[str, Tensor]) -> StageState:
        """Merge LoRA's weights into the language model's own; return the state with the merged weights."""
        model = self.build(weights)
        add_lora(model, rank)
        restore(model, state.weights, str(self.folder))
        model.model.language_model = model.model.language_model.merge_and_unload()
        learned = {name: parameter.detach() for name, parameter in model.named_parameters()}
        return replace(state, weights=learned)

    def _samples(self, material: Material, plan: StagePlan) -> Conversations:
        shown = self._shown(material, plan)
        return Conversations(material.records, plan.template, self.language, shown, self.preset.longest)

    def _shown(self, material: Material, plan: StagePlan) -> VisionInputs | None:
        if material.source is None:
            return None
        shown = self.encoder.show(material.source, plan.view)
        if not self.settings.shuffle_images:
            return shown
        names = material.source.keys
        generator = np.random.default_rng([self.settings.train_seed, len(names)])
        return ShuffledImages(shown, dict(zip(names, generator.permutation(names).tolist(), strict=True)))

    def _key(self, before: str, plan: StagePlan, material: Material) -> str:
        settings = self.settings
        return _hash(
            before,
            plan.describe(),
            material.fingerprint,
            self.encoder.size,
            settings.train_seed,
            self.numbers,
            settings.lora_rank,
            settings.shuffle_images,
            self.preset.longest,
            *([] if self._token_grid is None else [self._token_grid]),
        )


def add_lora(model: Any, rank: int) -> None:
    """Freeze the language model and add trainable LoRA layers to its linear layers.

    Raises:
        MissingExtraError: peft is not installed.
    """
    peft = require_peft()
    learn(model, (PROJECTOR,))
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.05, target_modules="all-linear")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing")  # peft uses the old name
        model.model.language_model = peft.get_peft_model(model.model.language_model, config)


def _hash(*parts: Any) -> str:
    return hashlib.sha256(json.dumps([str(part) for part in parts]).encode()).hexdigest()
