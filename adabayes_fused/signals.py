"""Signals held back while a step changes things, so that an interrupt finds a step made or not made."""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # what `signal` wraps in enumerations, which took most of a small step
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

_NUMBERS = tuple(int(number) for number in signal.valid_signals())


class held_back:
    """A context in which handlers that are written in Python do not run. What has been signalled meanwhile runs at its end.

    Only the main thread runs such handlers; elsewhere this does nothing.
    """

    def __enter__(self) -> None:
        self._handlers: dict[int, Any] = {}
        self._noted: list[tuple[int, FrameType | None]] = []
        if threading.current_thread() is not threading.main_thread():
            return
        try:
            for number in _NUMBERS:
                handler = _signal.getsignal(number)
                if callable(handler):
                    self._handlers[number] = handler
                    _signal.signal(number, self._note)
        except BaseException:  # a handler that was still in place
            self._restore()
            raise

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        handlers = dict(self._handlers)
        self._restore()
        for number, frame in self._noted:
            handlers[number](number, frame)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._noted.append((number, frame))

    def _restore(self) -> None:
        """Puts the handlers back, all of them even if one that is back already raises."""
        try:
            for number, handler in list(self._handlers.items()):
                _signal.signal(number, handler)
                del self._handlers[number]
        finally:
            if self._handlers:
                self._restore()
