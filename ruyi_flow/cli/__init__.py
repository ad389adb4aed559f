"""The command line: one function a subcommand, by what they are about."""

from __future__ import annotations

import _thread
import atexit
import os
import signal
import sys
import threading
from contextlib import suppress
from typing import Any

__all__ = ["main"]

_INTERRUPTED = 130
"""Exit status of an interrupted command: 128 and the number of SIGINT."""


def main() -> None:
    """Run the command line. Ctrl-C at any time ends in the line "interrupted" and exit status 130."""
    interrupted: list[bool] = []
    atexit.register(_leave, interrupted)  # as the first one registered, it runs last
    show_unraisable = sys.unraisablehook

    def on_unraisable(lost: Any) -> None:
        if lost.exc_type is KeyboardInterrupt:  # raised where Python drops exceptions, such as in __del__: once more
            again = threading.Timer(0.05, _thread.interrupt_main)
            again.daemon = True
            again.start()
        else:
            show_unraisable(lost)

    sys.unraisablehook = on_unraisable
    try:
        from ruyi_flow.cli.app import run  # here, so that Ctrl-C while modules are loaded prints no stack trace

        run()
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # the next one ends the process at once
        interrupted.append(True)
        sys.stderr.write("interrupted\n")
        sys.exit(_INTERRUPTED)
    finally:
        sys.unraisablehook = show_unraisable


def _leave(interrupted: list[bool]) -> None:
    """End an interrupted process with its exit status.

    Python would end it with a signal if the interrupt was raised within `exec`, as dataclasses use it.
    """
    if interrupted:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(_INTERRUPTED)
