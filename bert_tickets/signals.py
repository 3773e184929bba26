"""The signals by which people, terminals and schedulers stop a run or a sweep, which saves first."""

from __future__ import annotations

import ctypes
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

# Ctrl-C; kill, Slurm at the time limit; a closed terminal; warnings of Slurm (--signal), submitit, LSF and Grid Engine.
NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")
_KNOWN = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
# Not those that the parent ignores (nohup: SIGHUP) or the calling program handles. Ctrl-C always: the background commands of a
# shell script ignore it, and should stop with the script.
STOP_SIGNALS = [number for number in _KNOWN if number == signal.SIGINT or signal.getsignal(number) == signal.SIG_DFL]


@contextmanager
def stop_signals(handler: Callable[[int], None]) -> Iterator[None]:
    """Call `handler` with the number of a stop signal that arrives in the block. No effect outside the main thread."""
    if threading.current_thread() is not threading.main_thread():  # Python has no signals there
        yield
        return
    before = {number: signal.signal(number, lambda number, _: handler(number)) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, was in before.items():
            signal.signal(number, was)


def signal_at_parents_end(number: int) -> None:
    """Get a signal when the parent process ends; with 0 none. Linux only.

    It may arrive several times, as each of the parent's threads ends.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, number)  # PR_SET_PDEATHSIG
