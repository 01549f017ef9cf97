"""Keeping processors awake while something is timed.

On a virtual machine two threads at times read memory at the speed of one, for seconds or minutes,
and the system inside cannot see why; probably the host woke two processors that had slept where
they share one path to memory. What was measured: after all of them have slept for a second the
speed is another one, mostly the good one (`Awake.move`). Loops of the lowest priority (Linux's
SCHED_IDLE, which gives way to anything else at once) keep every processor busy in between.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import Self

_SPIN = (
    "import os, sys\n"
    "os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))\n"
    "os.sched_setaffinity(0, {int(sys.argv[1])})\n"
    "while os.getppid() == int(sys.argv[2]):\n"
    "    for _ in range(100_000): pass\n"
)
SUPPORTED = sys.platform == "linux"


class Awake:
    """A context in which no processor that this process may use falls asleep; elsewhere than on
    Linux it does nothing."""

    REST_S = 1.0  # asleep, when moved
    SETTLE_S = 0.3  # until the loops run

    def __init__(self) -> None:
        self._loops: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def move(self) -> None:
        """Let all processors sleep for a moment, so that they wake up elsewhere."""
        self._stop()
        time.sleep(self.REST_S)
        self._start()

    def _start(self) -> None:
        if sys.platform != "linux":
            return
        for number in sorted(os.sched_getaffinity(0)):
            command = [sys.executable, "-S", "-c", _SPIN, str(number), str(os.getpid())]
            # Ctrl-C at the terminal is not for them. In a session of their own they would be
            # weighed against this one as a whole, whatever their priority.
            self._loops.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, process_group=0))
        time.sleep(self.SETTLE_S)

    def _stop(self) -> None:
        for loop in self._loops:
            loop.kill()
        for loop in self._loops:
            loop.wait()
        self._loops.clear()
