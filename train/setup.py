"""Set up a run: check its settings, load its teachers, configure its student."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from radio.config import check_options
from radio.dist import Ranks
from radio.errors import CheckpointError, ConfigError, SizeError, shown
from radio.hub import load_teacher
from radio.model import AdaptorConfig, ModelConfig, RadioModel, make_student
from radio.ops import resize_images
from radio.students import StudentOptions, resolve_options, students
from radio.teachers.base import Frozen
from radio.types import Features, Student, Teacher

from .config import RENAMED, SidesConfig, TeacherConfig, TrainConfig
from .data.crops import generator
from .data.errors import ERROR_LIST
from .distributed import check_shardable, is_half
from .groups import Partition, make_partition, sees_run_sides, student_sides, teacher_groups
from .losses import check_balance
from .mesa import check_mesa
from .mosaic import mosaic_features, tiles_per_side
from .normalise import check_normalise
from .reparametrise import noisy_layers
from .shift import LEAST_SHIFT, Frame, Framing, Input, cut
from .warm_start import check_init

FOLDERS = ("state", "reports", "tensorboard")  # in a run folder
FILES = ("metrics.jsonl", "config.yaml", "ckpt.pt", "ckpt-ema.pt")


class TeacherFacts(NamedTuple):
    """What a run needs to know about a teacher that may live on another rank."""

    fingerprint: str
    sizes: Mapping[int, tuple[int, int]]  # (height, width) of its input in pixels, by the student's side
    summary_dim: int
    token_dim: int
    patch_size: int  # pixels along one side of its token


def check_settings(config: TrainConfig, world: int) -> Partition:
    """Check that the settings are consistent, before anything is loaded; return the ranks of the groups.

    Raises:
        ConfigError: a setting is out of bounds, the run folder is unusable, the student is unknown, no loss
            has a weight, no student can start from `init`, the trunk never learns, or the ranks cannot share
            the batches.
        CheckpointError: the checkpoint to start from does not exist.
    """
    check_options(config, RENAMED)
    for name, (low, high) in {
        "--data.crop-scale": config.data.crop_scale,
        "--data.crop-aspect": config.data.crop_aspect,
    }.items():
        if low > high:
            raise ConfigError(f"{name} {low} {high}: the first is to be the lower one; swap them")
    for option, folder in {"--out": config.out, "--cache.folder": config.cache.folder}.items():
        if any("\ud800" <= char <= "\udfff" for char in str(folder)):
            raise ConfigError(f"{option} {shown(folder)}: is no UTF-8 text; choose another name")
    _check_folder(config.out)
    students[config.student]  # an unknown name raises here, with the nearest ones
    _check_weights(config)
    _check_teachers(config)
    _check_shift(config)
    check_mesa(config)
    check_balance(config)
    check_normalise(config)
    if config.init is not None:
        check_init(config.init)
    if config.freeze_trunk_steps >= config.steps:
        raise ConfigError(
            f"--freeze-trunk-steps {config.freeze_trunk_steps}: the trunk would learn in none of the "
            f"{config.steps} steps; give fewer"
        )
    if config.parallel == "fsdp":
        facts = {t.name: TeacherFacts("", {}, 1, 1, 1) for t in config.teachers}
        described = model_config(config, facts)
        with torch.device("meta"):
            check_shardable(RadioModel(described).student)
    return make_partition(config, world)


def _check_weights(config: TrainConfig) -> None:
    """Check that some loss has a weight: without one a run would silently learn nothing."""
    spatial = config.loss.cosine or config.loss.smooth_l1 or config.normalise.kind != "none"
    if config.teachers and not any(
        t.summary_weight or (t.spatial_weight and spatial) for t in config.teachers
    ):
        raise ConfigError(
            "no loss of any teacher has a weight, and nothing would be learned; give a teacher a "
            "summary-weight above 0, or a spatial-weight beside --loss.cosine or --loss.smooth-l1"
        )


def _check_teachers(config: TrainConfig) -> None:
    """Check that teachers can share adaptors, that no cache keeps what changes, and no setting is idle.

    The features of mosaics depend on the images beside an image.
    """
    if (
        config.teachers
        and config.resolutions != SidesConfig()
        and not any(map(sees_run_sides, config.teachers))
    ):
        raise ConfigError(
            "--resolutions.sides has no effect where every teacher has student-resolution or "
            "student-resolutions of its own; leave one of both out (a later stage ends the sides of the one "
            "before with a resolution)"
        )
    own = {t.name: t for t in config.teachers if t.adaptor is None}
    for t in config.teachers:
        if t.adaptor == t.name:
            raise ConfigError(f"teacher {t.name} has an adaptor of its own anyway; leave adaptor out")
        owner = next((each.adaptor for each in config.teachers if each.name == t.adaptor), None)
        if owner is not None:
            raise ConfigError(
                f"teacher {t.name}: {t.adaptor!r} has no adaptor of its own, it trains that of {owner}; give "
                f"adaptor {owner}"
            )
        if t.adaptor is not None and (t.adaptor not in own or own[t.adaptor].model != t.model):
            raise ConfigError(
                f"teacher {t.name} is {t.model}, and its adaptor {t.adaptor!r} is not that of a teacher of "
                f"the same model; leave adaptor out, or name one of "
                f"{', '.join(name for name, each in own.items() if each.model == t.model) or 'those'}"
            )
        if t.mosaic and t.same_grid:
            raise ConfigError(
                f"teacher {t.name}: same-grid has no effect on mosaics, whose tiles follow the "
                f"student's side anyway; leave one of both out"
            )
        changes = "mosaic" if t.mosaic else "same-grid" if t.same_grid else ""
        if changes and config.cache.folder is not None:
            raise ConfigError(
                f"teacher {t.name}: with {changes} its features change from step to step, so a cache cannot "
                f"keep them; leave --cache.folder or its {changes} out"
            )


def _check_shift(config: TrainConfig) -> None:
    """Check that shifts move something, and that no shifted features would be kept in a cache.

    A cache's crops do not change.
    """
    if 0 < config.loss.shift < LEAST_SHIFT:
        raise ConfigError(
            f"--loss.shift {config.loss.shift} is rounded to a whole patch in fewer than one draw in a "
            f"thousand; give {LEAST_SHIFT} or more (C-RADIOv4: 0.5), or leave it out"
        )
    if config.loss.shift and config.cache.folder is not None:
        raise ConfigError(
            f"--loss.shift {config.loss.shift}: shifts change from step to step, so a cache cannot keep the "
            f"teachers' features; leave --cache.folder or --loss.shift out"
        )


def _check_folder(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out}: is no folder; give another one")
    for name in FOLDERS:
        if (out / name).exists() and not (out / name).is_dir():
            raise ConfigError(f"{out / name}: is no folder, and the run needs one of that name; move it")
    for name in (*FILES, ERROR_LIST):
        if (out / name).is_dir():
            raise ConfigError(f"{out / name}: is a folder, and the run writes a file of that name; move it")


def check_memory(
    config: TrainConfig, model: ModelConfig, partition: Partition, rank: int, memory: int
) -> None:
    """Check that the least memory a rank needs fits the bytes it has.

    Counted are weights, gradients, the optimizer's moments, and the images of a step.

    Raises:
        ConfigError: it does not fit; the message gives each amount.
    """
    with torch.device("meta"):
        shape = RadioModel(model)
    weights = sum(weight.numel() * 4 for weight in shape.parameters())
    held = weights * (4 + bool(config.ema)) // (partition.world if config.parallel == "fsdp" else 1)
    if config.damp:  # the noise is whole on every rank
        held += sum(layer.weight.numel() * 4 for layer in noisy_layers(shape).values())
    images = sum(12 * max(group.sides) ** 2 * group.share for group in partition.of(rank))
    if held + images > memory:
        raise ConfigError(
            f"a rank needs {held / 1e9:,.1f} GB for the student's weights, gradients and moments and "
            f"{images / 1e9:,.1f} GB for the images of a step, and can have {memory / 1e9:,.1f} GB; give a "
            f"smaller --batch-size, --resolution, --adaptor.hidden or --student, or start more ranks"
        )


def check_names(config: TrainConfig) -> None:
    """Check that there are teachers, and that each has a name of its own.

    Raises:
        ConfigError: it is not so, or a name is no UTF-8 text.
    """
    known = [t.name for t in config.teachers]
    if half := next((name for name in known if any("\ud800" <= char <= "\udfff" for char in name)), None):
        raise ConfigError(f"a teacher cannot be named {half!r}, which is no UTF-8 text; choose another name")
    if not known or len(set(known)) != len(known):
        raise ConfigError(f"a run needs teachers with names of their own, got {', '.join(known) or 'none'}")


def load_teachers(
    config: TrainConfig, device: torch.device, names: Collection[str] | None = None
) -> dict[str, Teacher]:
    """Load the named teachers (default: all) onto the device; return them by name in the config's order.

    Raises:
        ConfigError: as `check_names`.
        CheckpointError: a weights file does not match the architecture or the configured fingerprint.
    """
    check_names(config)
    chosen = [t for t in config.teachers if names is None or t.name in names]
    loaded: dict[str, Teacher] = {}  # one for all that share an adaptor
    teachers = {}
    for t in chosen:
        if t.adaptor_name not in loaded:
            loaded[t.adaptor_name] = load_teacher(t.model).to(torch.device("cpu"), torch.float32)
        teachers[t.name] = loaded[t.adaptor_name]
        _verify(t, teachers[t.name])
    for teacher in loaded.values():
        # On a CPU torch's attention uses another kernel for bfloat16 weights, which rounds differently.
        make_lean(teacher, config, half=device.type == "cuda" and is_half(config, device))
        assert isinstance(teacher, nn.Module)
        teacher.to(device)  # each weight keeps its dtype
    return teachers


def _verify(config: TeacherConfig, teacher: Teacher) -> None:
    if config.fingerprint not in (None, teacher.fingerprint):
        raise CheckpointError(
            f"teacher {config.name}: {config.model} has other weights than configured: their fingerprint is "
            f"{teacher.fingerprint}, not {config.fingerprint}; bring the right file, or mend the setting"
        )


def gather_facts(
    config: TrainConfig, teachers: Mapping[str, Teacher], ranks: Ranks
) -> dict[str, TeacherFacts]:
    """Gather the facts of every teacher of the run from all ranks, in the config's order.

    Raises:
        SizeError: a teacher cannot take its resolution; the message names the nearest valid one.
    """
    sizes = teacher_sizes(config, teachers)
    local = {
        name: TeacherFacts(
            teacher.fingerprint, sizes[name], teacher.summary_dim, teacher.token_dim, teacher.patch_size
        )
        for name, teacher in teachers.items()
    }
    known: dict[str, TeacherFacts] = {}
    for facts in ranks.gather_objects(local):
        known.update(facts)
    return {t.name: known[t.name] for t in config.teachers}


def teacher_sizes(
    config: TrainConfig, teachers: Mapping[str, Teacher]
) -> dict[str, dict[int, tuple[int, int]]]:
    """Return the input size (height, width) of each of these teachers, by the student's side.

    Raises:
        SizeError: a teacher cannot take its resolution; the message names the nearest valid one. Or no
            side lets its mosaics hold more than one image.
    """
    patch = student_patch(config) if any(t.same_grid for t in config.teachers) else 1
    sizes = {}
    for t in config.teachers:
        if t.name in teachers:
            teacher = teachers[t.name]
            own = {side: _teacher_size(t, teacher, side, patch) for side in student_sides(t, config)[0]}
            if t.mosaic and all(tiles_per_side(teacher, tile) == 1 for tile, _ in own.values()):
                raise SizeError(
                    f"teacher {t.name}: its {min(teacher.native_size)} px hold one image of "
                    f"{min(tile for tile, _ in own.values())} px; leave its mosaic out"
                )
            sizes[t.name] = own
    return sizes


def _teacher_size(t: TeacherConfig, teacher: Teacher, side: int, patch: int) -> tuple[int, int]:
    """Return the size (height, width) at which a teacher, or a tile of its mosaics, sees an image.

    The student sees it at `side`, by patches of `patch` pixels.
    """
    size = teacher.native_size if t.resolution is None else (t.resolution, t.resolution)
    if t.same_grid:
        own = side // patch * teacher.patch_size
        size = (own, own) if own < max(size) else size
    if t.mosaic:
        own, whole = teacher.patch_size, min(teacher.native_size)
        tile = t.resolution or min(max(own, round(side / own) * own), whole)
        tiles_per_side(teacher, tile)  # raises where it does not fit
        return tile, tile
    _check_size(f"teacher {t.name}", size, teacher.nearest_size(*size))
    return size


def student_patch(config: TrainConfig) -> int:
    """Return the pixels along one side of the student's token."""
    options = _with_image_size(resolve_options(config.student, config.options), config)
    with torch.device("meta"):
        return make_student(config.student, options).patch_size


def mosaic_shifts(config: TrainConfig, step: int) -> dict[str, tuple[int, int]]:
    """Draw the place of the images in the mosaics of a step, by teacher: equal on all ranks."""
    shifts = {}
    for t in config.teachers:
        if t.mosaic:
            drawn = generator(config.seed, "mosaic", step)
            down, right = torch.randint(0, 1 << 20, (2,), generator=drawn).tolist()
            shifts[t.name] = (down, right)
    return shifts


def teacher_features(
    teachers: Mapping[str, Teacher],
    sizes: Mapping[str, tuple[int, int]],
    images: Tensor,
    shifts: Mapping[str, tuple[int, int]] | None = None,
    frames: Mapping[str, Frame] | None = None,
) -> dict[str, Features]:
    """Compute each teacher's features at its size (height, width); those with a shift by mosaics.

    With frames the images are canvases, of which each teacher sees its own part.
    """
    features = {}
    for name, teacher in teachers.items():
        resized = resize_images(images, sizes[name]) if frames is None else cut(images, frames[name])
        shift = (shifts or {}).get(name)
        features[name] = teacher(resized) if shift is None else mosaic_features(teacher, resized, shift)
    return features


def make_framing(config: TrainConfig, teachers: Mapping[str, TeacherFacts]) -> Framing | None:
    """Build what shifts the crops of a run, all of whose teachers are given; None where nothing does.

    Raises:
        ConfigError: a model has so few patches that shifted crops may have nothing in common.
    """
    if not config.loss.shift:
        return None
    inputs = {
        name: {side: Input(size, facts.patch_size) for side, size in facts.sizes.items()}
        for name, facts in teachers.items()
    }
    framing = Framing(config.loss.shift, config.seed, student_patch(config), inputs, second=config.mesa > 0)
    for group in teacher_groups(config):
        framing.crop_sides(group)
    return framing


def student_resolutions(config: TrainConfig) -> dict[str, tuple[int, ...]]:
    """Return the student's input sides in pixels for each teacher."""
    return {t.name: student_sides(t, config)[0] for t in config.teachers}


def round_resolutions(config: TrainConfig) -> tuple[TrainConfig, list[str]]:
    """Round the student's resolutions for each teacher to the nearest ones that the student takes.

    Returns the config and one line per change. The run's own are not changed, nor those of a student that is
    built for one size.
    """
    options = _with_image_size(resolve_options(config.student, config.options), config)
    with torch.device("meta"):
        student = make_student(config.student, options)
    if student.fixed_size:
        return config, []
    if student.with_window is not None and options.get("window") is None:
        student = student.with_window(None)
    changes: list[str] = []

    def nearest(side: int, name: str) -> int:
        taken = student.nearest_size(side, side)[0]
        if taken != side:
            changes.append(
                f"{config.student} cannot see {side} px beside {name}; it sees {taken}, the nearest that it "
                f"takes"
            )
        return taken

    teachers = []
    for teacher in config.teachers:
        if teacher.student_resolution:
            side = nearest(teacher.student_resolution, teacher.name)
            teacher = replace(teacher, student_resolution=side)
        several = teacher.student_resolutions
        sides = tuple(nearest(side, teacher.name) for side in several.sides)
        teachers.append(replace(teacher, student_resolutions=replace(several, sides=sides)))
    return replace(config, teachers=tuple(teachers)), changes


def _with_image_size(options: StudentOptions, config: TrainConfig) -> StudentOptions:
    """Let a student that is built for a size be built for the run's, unless the options name another."""
    if options.has("image_size") and options.get("image_size") is None:
        return options.change(image_size=config.resolution)
    return options


def model_config(config: TrainConfig, teachers: Mapping[str, TeacherFacts | Teacher]) -> ModelConfig:
    """Build the model's config: the student and one adaptor per teacher that has its own.

    Raises:
        ConfigError: class tokens are set twice, by `summary` and by the options.
    """
    own = {t.name: teachers[t.name] for t in config.teachers if t.adaptor is None and t.name in teachers}
    options = resolve_options(config.student, config.options)
    if config.summary == "per-teacher" and not options.has("class_tokens"):
        raise ConfigError(
            f"{config.student} has no class tokens, its summary is a mean; take --summary shared or mean"
        )
    if config.summary != "shared" and options.has("class_tokens"):
        if options.get("class_tokens") is not None:
            raise ConfigError(
                f"--summary {config.summary} decides the class tokens; leave --student.class-tokens out"
            )
        options = options.change(class_tokens=len(own) if config.summary == "per-teacher" else 0)
    options = _with_image_size(options, config)
    adaptors = tuple(
        AdaptorConfig(
            name=name,
            summary_dim=teacher.summary_dim,
            token_dim=teacher.token_dim,
            hidden=config.adaptor.hidden,
            slot=index if config.summary == "per-teacher" else None,
            resample=config.adaptor.resample,
        )
        for index, (name, teacher) in enumerate(own.items())
    )
    return ModelConfig(student=config.student, options=options, adaptors=adaptors)


def choose_windows(student: Student, config: TrainConfig) -> dict[int, tuple[int, ...]]:
    """Return the window sides to sample from at each resolution: those of the config that divide its grid.

    Empty where none fits or the student decides itself: it has no windows, its window follows the input's
    size, or the options fix it.

    Raises:
        SizeError: the student does not take a resolution of the run; the message names the nearest valid one.
    """
    sides = chain.from_iterable(student_resolutions(config).values())
    windows: dict[int, tuple[int, ...]] = dict.fromkeys(sides, ())
    if student.window is not None and config.options.get("window") is None:
        for side in windows:
            grid = side // student.patch_size
            windows[side] = tuple(w for w in config.windows if grid % w == 0 and w < grid)
    for side, candidates in windows.items():
        used = student
        if student.with_window is not None and candidates:
            used = student.with_window(candidates[0])
        _check_size(f"student {student.name}", (side, side), used.nearest_size(side, side))
    return windows


def _check_size(model: str, size: tuple[int, int], nearest: tuple[int, int]) -> None:
    if size != nearest:
        raise SizeError(
            f"{model} cannot take {size[0]}x{size[1]} px; "
            f"the nearest size that it can is {nearest[0]}x{nearest[1]}"
        )


# Exactly these, no subclasses: autocast casts the weights that they pass to the kernel, and a subclass may
# compute with them first (as convolutions with standardised weights do).
_CAST = (nn.Linear, NonDynamicallyQuantizableLinear, nn.Conv2d, nn.ConvTranspose2d, nn.MultiheadAttention)


def make_lean(teacher: Teacher, config: TrainConfig, *, half: bool) -> None:
    """Drop weights and precision that the run's forwards do not use; features stay bit-identical.

    Call it after computing the fingerprint. A teacher cache is made in float32, so its teachers stay in it.

    Args:
        teacher: loaded, or on the meta device.
        config: the run's settings.
        half: whether forwards run in bfloat16, under autocast.
    """
    if isinstance(teacher, Frozen):
        teacher.text = None
    if half and config.cache.folder is None and isinstance(teacher, nn.Module):
        halve(teacher)


def halve(module: nn.Module) -> None:
    """Store in bfloat16, in place, the weights that autocast would cast in each forward."""
    for part in module.modules():
        if type(part) in _CAST:
            for weight in part.parameters(recurse=False):
                weight.data = weight.data.to(torch.bfloat16)
