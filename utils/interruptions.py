"""When a run saves within an epoch, and when it stops there."""

import signal
import time
from types import FrameType

import torch
from torch import Tensor, nn

from utils.checkpoint import Checkpoints, Progress
from utils.processes import Failure, is_first, largest

SIGNALS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)
]
AT_ONCE = 2.0  # seconds: a scheduler signals torchrun and its processes, and torchrun hands the signal on to them


class Stopped(Failure):
    """A signal asked the run to stop, and it has saved, unless it was still being compiled."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code, self.of_all = 128 + number, True


def heard() -> list[signal.Signals]:
    """The signals that stop a run: SIGINT, SIGTERM, and of the others those that the system has, and that neither a
    parent has set to ignore (nohup) nor a debugger has taken."""
    always = (signal.SIGINT, signal.SIGTERM)
    return [number for number in SIGNALS if number in always or signal.getsignal(number) not in (signal.SIG_IGN, None)]


class Interruptions:
    """Within `with`, the signals that stop a run are only noted. The same one again does what it always did, unless it
    comes at once: a scheduler may send SIGTERM while the run still saves for the SIGUSR1 that came before.

    Args:
        save_minutes: at least so often a run saves.
    """

    def __init__(self, save_minutes: float) -> None:
        self.seconds = 60 * save_minutes
        self.saved = time.monotonic()
        self.noted = self.agreed = 0
        self.noted_at: dict[int, float] = {}

    def __enter__(self) -> "Interruptions":
        self.before = {number: signal.signal(number, self.note) for number in heard()}
        return self

    def __exit__(self, _kind: object = None, error: BaseException | None = None, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        # Ctrl-C also ends the C++ compiler that torch has started.
        if self.noted and isinstance(error, torch._dynamo.exc.TorchDynamoException):
            raise Stopped(self.noted) from error

    def note(self, number: int, _frame: FrameType | None) -> None:
        self.noted = self.noted or number
        if time.monotonic() - self.noted_at.setdefault(number, time.monotonic()) > AT_ONCE:
            self.__exit__()
            signal.raise_signal(number)

    def save_is_due(self) -> bool:
        """After every step, in all processes, which answer alike: what one of them has noted stops all."""
        minutes_are_over = time.monotonic() - self.saved >= self.seconds
        self.agreed, minutes_are_over = largest(self.noted, int(minutes_are_over))
        return bool(self.agreed or minutes_are_over)

    def after_saving(self) -> None:
        """Raises Stopped where that is why the run has saved, in no process before all are here: torchrun ends the
        others when one ends, and the first may still be writing."""
        self.saved = time.monotonic()
        if self.agreed:
            largest(self.agreed)
            raise Stopped(self.agreed)


def save_within_epoch(
    checkpoints: Checkpoints,
    interruptions: Interruptions,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    rows: tuple[dict[str, float], ...],
    start: float,
    step: int,
    totals: Tensor,
) -> None:
    """Saves a run that has finished `rows`, began its next epoch at `start`, and is at `step` in it, with `totals`.

    Raises:
        Stopped: that is why it has saved.
    """
    if is_first():
        checkpoints.save(model, optimizer, Progress(step, rows, totals, time.perf_counter() - start))
    interruptions.after_saving()
