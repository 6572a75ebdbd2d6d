"""Preemption: a request to stop, on which all ranks agree after the same step."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self, final

import torch
import torch.distributed as distributed
from torch import Tensor

from radio.dist import Ranks

REQUEUE = 85  # exit code of a run that was stopped by a signal and has saved: start it again

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


def outlast_signals(worker: int) -> None:
    """Keep a loader's process alive when its run is requested to stop.

    torchrun and schedulers signal all processes of a group, but the run still needs its images. Only signals
    of the parent process end a loader: it terminates its loaders with SIGTERM and waits for them.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    threading.Thread(target=_heed_parent, daemon=True).start()


def _heed_parent() -> None:
    while signal.sigwaitinfo(_SIGNALS).si_pid != os.getppid():
        pass
    os._exit(0)


@final
class Preemption:
    """SIGTERM or SIGUSR1 on any rank, agreed on by all ranks. As a context manager it handles the signals.

    The ranks' flags are reduced on the CPU during a step, so that no step waits for them: all ranks stop
    one step after the first of them got the signal.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._channel = ranks.channel()
        self._requested = False
        self._flag: Tensor | None = None
        self._reduction: Any = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {name: signal.signal(name, self._request) for name in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name, handler in self._before.items():
            signal.signal(name, handler)
        if kind is None:
            self._read_flag()

    def agreed(self) -> bool:
        """Check whether all ranks stop now; every rank calls it after every step."""
        if self._ranks.world == 1:
            return self._requested
        stop = self._read_flag()
        self._flag = torch.tensor(int(self._requested))
        self._reduction = distributed.all_reduce(
            self._flag, distributed.ReduceOp.MAX, group=self._channel, async_op=True
        )
        return stop

    def _read_flag(self) -> bool:
        if self._reduction is None or self._flag is None:
            return False
        self._reduction.wait()
        self._reduction = None
        return bool(self._flag)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self._requested = True
