"""Being told to stop: a run finishes the update at hand, saves a state and leaves."""

import os
import signal
import threading
from contextlib import ExitStack

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Remembers a signal to stop; a second one stops the process at once.

    Attributes:
        is_made: whether a signal came since :meth:`listen`.
    """

    def __init__(self) -> None:
        self.is_made = False

    def listen(self, closing: ExitStack) -> None:
        """Take over the signals until ``closing`` closes; Python lets only the main thread."""
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                closing.callback(signal.signal, number, signal.getsignal(number))
                signal.signal(number, self._on_signal)

    def ignore(self) -> None:
        """Ignore the signals for good: a launcher repeats them when the first rank has left."""
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def _on_signal(self, number: int, _frame: object) -> None:
        if self.is_made:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.is_made = True
