"""Stages of a run: what each trains, and with which of them a run goes on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from radio.config import check_options
from radio.dist import Ranks
from radio.errors import CheckpointError, ConfigError, RadioError
from radio.model import RadioModel

from .checkpoints import find_last_step
from .config import RENAMED, SidesConfig, StageConfig, TrainConfig
from .data.crops import seed_of
from .groups import teacher_groups
from .normalise import check_loss_weights
from .plan import build_meta_models
from .setup import check_settings, load_teachers, round_resolutions
from .warm_start import check_next


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One stage; steps and images are counted over all stages of its run."""

    config: TrainConfig  # of a run of this stage alone
    run: TrainConfig  # of the whole run
    index: int = 0
    first_step: int = 0  # steps of the stages before
    first_sample: int = 0  # images of the stages before
    before: tuple[TrainConfig, ...] = ()  # the stages before

    @property
    def last_step(self) -> int:
        """The step that the stage ends with."""
        return self.first_step + self.config.steps

    @property
    def is_last(self) -> bool:
        """Whether the run ends with this stage."""
        return self.index == len(self.run.stages)


def split_stages(config: TrainConfig) -> tuple[Stage, ...]:
    """Return the stages of a run: that of its own settings, then each of `stages`.

    A later stage has the settings of the one before, except for those that it names, and draws its images and
    crops anew. It starts from the weights of the one before, so that `init` is for the first alone.

    Raises:
        ConfigError: a stage changes the teachers of a student with a class token for each.
    """
    stages = [Stage(config=replace(config, stages=()), run=config)]
    for index, changes in enumerate(config.stages, start=1):
        last = stages[-1]
        own = _apply(changes, last.config, seed_of(config.seed, "stage", index))
        names = [[t.name for t in each.teachers if t.adaptor is None] for each in (last.config, own)]
        if config.summary == "per-teacher" and names[0] != names[1]:
            raise ConfigError(
                f"stage {index + 1} has the teachers {', '.join(names[1])} and the one before "
                f"{', '.join(names[0])}, and with --summary per-teacher each has a class token; keep them "
                f"all in their order, or take --summary shared"
            )
        images = sum(group.batch_size for group in teacher_groups(last.config))
        samples = last.first_sample + last.config.steps * images
        stages.append(
            Stage(
                config=own,
                run=config,
                index=index,
                first_step=last.last_step,
                first_sample=samples,
                before=(*last.before, last.config),
            )
        )
    return tuple(stages)


def _apply(changes: StageConfig, config: TrainConfig, seed: int) -> TrainConfig:
    # one resolution of a stage replaces several of the stage before
    kept = SidesConfig() if changes.resolution else config.resolutions
    return replace(
        config,
        steps=changes.steps,
        resolution=changes.resolution or config.resolution,
        resolutions=changes.resolutions or kept,
        batch_size=changes.batch_size or config.batch_size,
        teachers=changes.teachers or config.teachers,
        optim=changes.optim or config.optim,
        freeze_trunk_steps=changes.freeze_trunk_steps,
        init=None,
        seed=seed,
    )


def check_stages(config: TrainConfig, world: int) -> None:
    """Check the settings of every stage; errors name the later stage that they are of.

    The models of all stages are built without weights, so that no stage before is trained in vain.

    Raises:
        ConfigError: as `check_settings`, `check_loss_weights`, `split_stages` and `build_meta_models`; or a
            student that is built for one size cannot start from the stage before, which has another.
        CheckpointError: as `check_settings`.
        SizeError: a teacher or the student cannot take its resolution in a later stage.
    """
    check_options(config, RENAMED)
    check_loss_weights(config)
    first, *others = split_stages(config)
    check_settings(first.config, world)
    if not others:
        return
    before = build_meta_models(round_resolutions(first.config)[0]).model
    for stage in others:
        try:
            check_settings(stage.config, world)
            model = build_meta_models(round_resolutions(stage.config)[0]).model
            _check_sizes(stage, model, before)
        except RadioError as error:
            raise type(error)(f"stage {stage.index + 1}: {error}") from error
        before = model


def _check_sizes(stage: Stage, model: RadioModel, before: RadioModel) -> None:
    """Check that a stage's model can start from that of the stage before."""
    try:
        check_next(model, before)
    except CheckpointError as error:
        raise ConfigError(
            f"{stage.config.student} is built for one size, and its weights have other shapes at "
            f"{stage.config.resolution} px than at {stage.before[-1].resolution} px in the stage before, "
            f"which it starts from; keep that resolution, or take another student ({error})"
        ) from error


def check_next_teachers(stages: Sequence[Stage]) -> None:
    """Load each teacher that the first of these stages does not load, one at a time, and drop it again.

    So a weights file that is absent or wrong is found now, and not when its stage begins.

    Raises:
        ConfigError, CheckpointError: as `load_teachers`; the message names the stage.
    """
    known = {(t.model, t.fingerprint) for stage in stages[:1] for t in stage.config.teachers}
    for stage in stages[1:]:
        for t in stage.config.teachers:
            if (t.model, t.fingerprint) not in known:
                known.add((t.model, t.fingerprint))
                try:
                    load_teachers(stage.config, torch.device("cpu"), [t.name])
                except RadioError as error:
                    raise type(error)(f"stage {stage.index + 1}: {error}") from error


def find_stage(stages: tuple[Stage, ...], out: Path, ranks: Ranks) -> int:
    """Return the index of the stage that the newest whole state in a run folder is of; 0 without a state.

    Every rank calls it. At a border it is the earlier stage: its trainer makes sure of the checkpoint that
    the next one starts from.
    """
    if len(stages) == 1:
        return 0
    last = ranks.on_leader(lambda: find_last_step(out / "state"))
    return next((stage.index for stage in stages if last <= stage.last_step), stages[-1].index)
