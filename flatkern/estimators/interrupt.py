"""Ctrl-C as a wish to stop after the present step."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any, Self

__all__ = ["Interruptible"]


class Interruptible:
    """While it is entered, the first Ctrl-C sets ``requested``; a second one raises at once.

    A handler of the user's own is called as well. Signals reach the main thread only: entered in another
    thread, or where SIGINT is ignored, it does nothing. One inside another passes the wish on to the outer
    one. The earlier handler is restored on exit.

    Raises:
        KeyboardInterrupt: a second Ctrl-C.

    Example:
        >>> from flatkern.estimators.interrupt import Interruptible
        >>> with Interruptible() as stop:
        ...     for step in range(3):
        ...         if stop.requested:
        ...             break
        >>> step
        2
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: Any = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            previous = signal.getsignal(signal.SIGINT)
            # None: a handler that Python did not install and could not restore
            if previous is not None and previous != signal.SIG_IGN:
                self._previous = previous
                signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        if callable(self._previous) and self._previous is not signal.default_int_handler:
            self._previous(number, frame)
