"""Signals: SIGTERM and Ctrl-C end a training between two steps."""

import contextlib
import signal
import threading

import jax
from jax.experimental import multihost_utils


class Signals:
    """SIGTERM and SIGINT, which end training between two steps, where the state and the batches are at the same place."""

    def __init__(self):
        self._got, self._waiting, self._before = [], False, {}

    def __enter__(self):
        # JAX catches SIGTERM where there are several processes, and agrees with them on a step.
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            caught = [number for number in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(number) is not signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._catch) for number in caught}
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def at(self, n):
        """The signal that came before step n, to this process or, where there are several, to one of them; or None."""
        if jax.process_count() > 1:
            return signal.SIGTERM if multihost_utils.reached_preemption_sync_point(n) else None
        return self.got()

    def got(self):
        """The signal that came to this process, where JAX does not catch it; or None."""
        return self._got[0] if self._got else None

    @contextlib.contextmanager
    def waiting(self):
        """Here, where no step is half taken, a second SIGINT does not wait."""
        self._waiting = True
        try:
            yield
        finally:
            self._waiting = False

    def _catch(self, number, frame):
        again = number in self._got and number == signal.SIGINT
        self._got.append(number)
        if again and self._waiting:
            self._waiting = False
            raise KeyboardInterrupt
