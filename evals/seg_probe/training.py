"""Training and test of one head by mmengine's Runner, without its output and with resuming."""

from __future__ import annotations

import hashlib
import json
import logging
import random
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, final

import numpy as np
import torch
from mmengine.dist import get_dist_info
from mmengine.hooks import Hook
from mmengine.logging import MMLogger
from mmengine.model import MMDistributedDataParallel
from mmengine.runner import Runner
from mmengine.visualization import Visualizer
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from evals.core.evaluator import EvalRun
from evals.core.states import resume_state, save_state
from radio.dist import Ranks
from radio.errors import RadioError
from radio.progress import ProgressWithText, UpdateProgress
from radio.types import Backbone

from .areas import Areas
from .plugin import AreaMetric, Images, Sample, TokenMaps, build_model, one_thread
from .protocol import ProbeConfig

# Letters: H W an image's own height and width.

_FORMAT = "am-radio-seg-head/1"
_TEST_BATCH = 32  # cached tokens

Keep = Callable[[int, NDArray[np.uint8]], None]
"""Takes a validation image's index and its predicted classes [H, W]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadState:
    """The state of a training; iteration 0 means not started."""

    iteration: int = 0
    head: dict[str, Tensor] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    schedulers: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True, slots=True)
class Probe:
    """What the trainings of all heads have in common."""

    model: Backbone  # on its device
    config: ProbeConfig
    num_classes: int
    train: Images | TokenMaps
    val: Images | TokenMaps
    key: Sequence[object]  # everything that determines a head, except its seed
    save_every: int  # iterations

    @property
    def keeps_tokens(self) -> bool:
        """Whether the backbone's tokens are cached."""
        return isinstance(self.train, TokenMaps)


class TrainedHead(NamedTuple):
    """A trained head and its test results."""

    areas: Areas
    weights: dict[str, Tensor]


def train_head(probe: Probe, seed: int, run: EvalRun, label: str, keep: Keep | None = None) -> TrainedHead:
    """Train a head, resuming an earlier run, and test it.

    Args:
        label: of the progress bars.
        keep: takes every prediction on a validation image.

    Raises:
        RadioError: the loss is not finite.
        DataError: ranks do not share the folder of the states.
    """
    key = hashlib.sha256(json.dumps([_FORMAT, *probe.key, probe.keeps_tokens, seed]).encode()).hexdigest()
    path = run.cache / "seg-heads" / f"{key}.pt"
    start = resume_state(path, _FORMAT, key, HeadState(), run.ranks, run.damage)
    with TemporaryDirectory(prefix="am-radio-seg-") as folder, _own_randomness(run.device):
        metric, observer = AreaMetric(run.ranks), Observer(run.ranks.world, keep)
        hooks = [SaveState(path, key, probe.save_every, run.ranks), observer]
        runner = _make_runner(probe, seed, run, start, metric, hooks, folder)
        with run.progress(f"training {label}", probe.config.iterations) as observer.advance:
            if start.iteration:
                observer.advance(start.iteration)
            runner.train()
        with run.progress(f"testing {label}", len(probe.val)) as observer.advance:
            runner.test()
    weights = {name: tensor.cpu() for name, tensor in _bare(runner.model).state_dict().items()}
    return TrainedHead(metric.areas, weights)


def _make_runner(
    probe: Probe,
    seed: int,
    run: EvalRun,
    start: HeadState,
    metric: AreaMetric,
    hooks: list[Hook],
    folder: str,
) -> ProbeRunner:
    config, ranks = probe.config, run.ranks
    workers = 0 if probe.keeps_tokens else run.workers
    loader: dict[str, Any] = {"num_workers": workers, "collate_fn": _collate}
    loader |= {"persistent_workers": workers > 0, "worker_init_fn": one_thread}
    return ProbeRunner(
        start=start,
        device=run.device,
        model=build_model(
            probe.model, run.dtype, config, probe.num_classes, ranks, cached=probe.keeps_tokens
        ),
        work_dir=folder,
        train_dataloader=DataLoader(
            Stream(probe.train, seed, probe.train.metainfo),
            batch_size=config.train_batch_size // ranks.world,
            sampler=Positions(len(probe.train), config.train_batch_size, ranks.rank, ranks.world),
            **loader,
        ),
        train_cfg={"type": "IterBasedTrainLoop", "max_iters": config.iterations},
        optim_wrapper={
            "type": "OptimWrapper",
            "optimizer": {"type": "AdamW", "lr": config.lr, "weight_decay": config.weight_decay},
        },
        param_scheduler=_schedules(config),
        test_dataloader=DataLoader(
            probe.val,
            batch_size=_TEST_BATCH if probe.keeps_tokens else 1,  # images differ in size
            sampler=range(ranks.rank, len(probe.val), ranks.world),
            **loader,
        ),
        test_cfg={"type": "TestLoop"},
        test_evaluator=[metric],
        default_hooks=dict.fromkeys(("runtime_info", "timer", "sampler_seed", "logger", "checkpoint")),
        custom_hooks=hooks,
        launcher="none" if ranks.world == 1 else "pytorch",
        randomness={"seed": seed % 2**32},  # NumPy's limit
        default_scope="mmseg",
        experiment_name=secrets.token_hex(8),  # mmengine caches loggers by name
    )


def _schedules(config: ProbeConfig) -> list[dict[str, Any]]:
    """Build the schedule: linear warm-up (none for a single iteration), then linear to zero."""
    rising = {"type": "LinearLR", "start_factor": 1e-6, "by_epoch": False, "begin": 0, "end": config.warmup}
    falling = {"type": "PolyLR", "power": 1.0, "eta_min": 0.0, "by_epoch": False}
    falling |= {"begin": config.warmup, "end": config.iterations}
    return [rising, falling] if config.warmup else [falling]


@final
class ProbeRunner(Runner):  # type: ignore[misc]
    """mmengine's Runner without side effects: no log files, no environment dump, no global settings."""

    def __init__(self, *, start: HeadState, device: torch.device, **arguments: Any) -> None:
        self._start_state, self._device, self._resumed = start, device, False
        super().__init__(**arguments)

    def setup_env(self, env_cfg: dict[str, Any]) -> None:
        """Set ranks and a time stamp only; the original changes the start method and number of threads."""
        self._rank, self._world_size = get_dist_info()
        self._timestamp = time.strftime("%Y%m%d_%H%M%S")

    def build_logger(self, *arguments: Any, **settings: Any) -> Any:
        """Build a logger for errors only, without a file."""
        return MMLogger.get_instance(name=self._experiment_name, log_level="ERROR")

    def build_visualizer(self, visualizer: Any = None) -> Any:
        """Build a visualizer that writes nothing; the loops pass it the class names."""
        return Visualizer.get_instance(name=self._experiment_name)

    def dump_config(self) -> None:
        """Do nothing: our report contains the settings."""

    def _log_env(self, env_cfg: dict[str, Any]) -> None:
        """Do nothing: the original runs compilers to get their versions."""

    def wrap_model(self, model_wrapper_cfg: dict[str, Any] | None, model: nn.Module) -> nn.Module:
        """Move the model to the chosen device; wrap it in DDP with several ranks, on GPUs or CPUs."""
        model = model.to(self._device)
        if not self.distributed:
            return model
        wrapped: nn.Module = MMDistributedDataParallel(model, forward_sync_buffers=False)
        return wrapped

    def load_or_resume(self) -> None:
        """Restore head, optimizer and schedules from the earlier run's state."""
        state = self._start_state
        if not state.iteration or self._resumed:
            return
        _bare(self.model).load_state_dict(state.head)
        self.optim_wrapper.optimizer.load_state_dict(state.optimizer)
        for scheduler, values in zip(self.param_schedulers, state.schedulers, strict=True):
            scheduler.load_state_dict(values)
        self._train_loop._iter = state.iteration
        self._resumed = True


@final
class SaveState(Hook):  # type: ignore[misc]
    """Saves the training state every `every` iterations and at the end."""

    priority = "VERY_LOW"  # after the schedules' step

    def __init__(self, path: Path, key: str, every: int, group: Ranks) -> None:
        self._path, self._key, self._every, self._group = path, key, every, group

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Save the state if due; `batch_idx` counts from 0 over the whole training.

        Raises:
            RadioError: the loss is not finite.
        """
        done = batch_idx + 1
        if done % self._every and done != runner.max_iters:
            return
        loss = outputs["loss"].detach()
        if not bool(torch.isfinite(loss)):
            raise RadioError(
                f"iteration {done}: the loss is {float(loss)}; what was saved last stands. Lower --lr, or "
                f"look for values that are not finite in the backbone's tokens (--precision fp32)"
            )
        if self._group.leads:
            state = HeadState(
                iteration=done,
                head=_bare(runner.model).state_dict(),
                optimizer=runner.optim_wrapper.optimizer.state_dict(),
                schedulers=[scheduler.state_dict() for scheduler in runner.param_schedulers],
            )
            save_state(self._path, _FORMAT, self._key, state)


@final
class Observer(Hook):  # type: ignore[misc]
    """Advances the progress bars, shows the loss at intervals, and passes predictions on."""

    def __init__(self, world: int, keep: Keep | None) -> None:
        self.advance: UpdateProgress = lambda steps: None  # of the present bar
        self._world, self._keep, self._shown = world, keep, 0.0

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Advance by one iteration; read the loss at most twice a second, as it waits for the device."""
        self.advance(1)
        if isinstance(self.advance, ProgressWithText) and time.monotonic() - self._shown > 0.5:
            self._shown = time.monotonic()
            self.advance.set_postfix(f"loss {float(outputs['loss'].detach()):.4f}")

    def after_test_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Sequence[Any] | None = None
    ) -> None:
        """Advance by this rank's images times the number of ranks, assumed to be equally far."""
        self.advance(len(outputs or ()) * self._world)
        if self._keep is not None:
            for sample in outputs or ():
                classes = sample.pred_sem_seg.data.squeeze(0).to(torch.uint8)  # of the image's original size
                self._keep(sample.metainfo["index"], classes.cpu().numpy())


def _bare(model: nn.Module) -> nn.Module:
    module: Any = model.module if isinstance(model, MMDistributedDataParallel) else model
    assert isinstance(module, nn.Module)
    return module


def _collate(samples: list[Sample]) -> dict[str, list[Any]]:
    """Collate samples as lists: the data preprocessor pads and stacks images of several sizes."""
    return {name: [sample[name] for sample in samples] for name in samples[0]}


@final
class Stream(Dataset[Sample]):
    """An endless stream of samples: the sample at a position depends on the seed and the position only.

    Every N positions contain each image once. The transforms draw from numpy's and Python's global
    generators, which are seeded for each sample and then restored: workers, ranks and a restart change
    nothing.
    """

    def __init__(self, samples: Images | TokenMaps, seed: int, metainfo: dict[str, Any]) -> None:
        self._samples, self._seed, self.metainfo = samples, seed, metainfo
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._samples)

    def index_at(self, position: int) -> int:
        """Return the index in the data set of the sample at a position."""
        epoch, within = divmod(position, len(self._samples))
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng([self._seed, epoch]).permutation(len(self._samples))
        return int(self._order[within])

    def __getitem__(self, position: int) -> Sample:
        with seeded(self._seed, position):
            return self._samples[self.index_at(position)]


@final
class Positions(Sampler[int]):
    """The positions in the stream of one rank: its share of every batch, in order."""

    def __init__(self, count: int, batch: int, rank: int, world: int) -> None:
        self._batch, self._share, self._rank, self._start = batch, batch // world, rank, 0
        self._length = -(-count // world)

    def __len__(self) -> int:
        """Return the size of this rank's share of the data set: the length of an epoch for mmengine."""
        return self._length

    def __iter__(self) -> Iterator[int]:
        step = self._start
        while True:
            first = step * self._batch + self._rank * self._share
            yield from range(first, first + self._share)
            step += 1

    def skip(self, num_samples: int) -> None:
        """Skip this number of the rank's positions; mmengine's loop calls it to resume."""
        self._start = num_samples // self._share


@contextmanager
def seeded(*entropy: int) -> Iterator[None]:
    """Seed numpy's and Python's global generators with the entropy inside; restore them afterwards."""
    state = np.random.SeedSequence(entropy).generate_state(4)
    with restored_generators():
        np.random.seed(state)  # noqa: NPY002 (what mmcv draws from)
        random.seed(int(state[0]))
        yield


@contextmanager
def restored_generators() -> Iterator[None]:
    """Restore numpy's and Python's global generators afterwards."""
    before, before_python = np.random.get_state(), random.getstate()  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(before)  # noqa: NPY002
        random.setstate(before_python)


@contextmanager
def _own_randomness(device: torch.device) -> Iterator[None]:
    """Restore global generators and the logging level afterwards, whatever mmengine sets inside."""
    level = logging.root.level
    try:
        # Without a list of devices, torch would fork the generators of all GPUs.
        with restored_generators(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        logging.root.setLevel(level)
