"""When a run saves within an epoch, and when it stops there."""

import signal
import time
from types import FrameType

from utils.processes import largest


class Stopped(Exception):
    """A signal asked the run to stop, and it has saved."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = 128 + number


class Interruptions:
    """While it is entered, SIGINT and SIGTERM are only noted. The second of them does what it always did.

    Args:
        save_minutes: at least so often a run saves.
    """

    def __init__(self, save_minutes: float) -> None:
        self.seconds = 60 * save_minutes
        self.saved = time.monotonic()
        self.noted = self.agreed = 0

    def __enter__(self) -> "Interruptions":
        self.before = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number: int, _frame: FrameType | None) -> None:
        self.noted = number
        self.__exit__()

    def save_is_due(self) -> bool:
        """After every step, in all processes, which answer alike: what one of them has noted stops all."""
        minutes_are_over = time.monotonic() - self.saved >= self.seconds
        self.agreed, minutes_are_over = largest(self.noted, int(minutes_are_over))
        return bool(self.agreed or minutes_are_over)

    def after_saving(self) -> None:
        """Raises Stopped where that is why the run has saved."""
        self.saved = time.monotonic()
        if self.agreed:
            raise Stopped(self.agreed)
