"""Signals and the launcher's death: how this process is asked to stop. Installed before anything heavy is imported.

The first signal is a request: before the first step there is nothing to save and the process leaves at once with exit
code 3; later it takes a note, and the ranks save together after the step under way. A second signal ends the process at
once with 128 + its number. A launcher that dies counts as a request too, with a limit of time, so that no worker stays
behind.

Python runs a signal's handler in the main thread between two of its instructions, which never come while that thread
waits in a collective or for its peers. So the handlers do nothing, and a thread reads the signals' numbers from the
descriptor that `signal.set_wakeup_fd` names: the interpreter writes there in whatever state the main thread is.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping

from megatron_doremi.cluster.launch import BY_HAND, DEEPSPEED, TORCHRUN, launcher_of, rank_of, stop_marker

EXIT_STOPPED = 3
STOPS = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGHUP", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGXCPU")
    if hasattr(signal, name)
)
# A terminal's Ctrl-C reaches the launcher, which passes it on, and often its workers too: one request.
_SECONDS_OF_ONE_REQUEST = 1.0
# From the launcher's death to the end of its workers, a save included.
_SECONDS_WITHOUT_LAUNCHER = 25
_SECONDS_BETWEEN_LOOKS = 1.0
# For the words, the marker and for telling the others (watchdog.tell: at most 12 s), whatever of them hangs.
_SECONDS_TO_LEAVE = 15.0
# Should the interpreter itself hang meanwhile, the kernel ends the process by SIGALRM.
_SECONDS_OF_ALARM = 20
_PR_SET_PDEATHSIG = 1


class Signals:
    """What this process was asked for, and whether there is something to save."""

    def __init__(self, environ: Mapping[str, str]):
        self._environ, self._rank = environ, rank_of(environ)
        self._lock = threading.Lock()
        self._asked_at: float | None = None
        self._saves, self._done, self._done_at = False, -1, 0.0
        # Of a launcher only: a shell may go before its jobs do (nohup, setsid).
        launcher = launcher_of(environ)
        self._parent = 0 if launcher == BY_HAND else os.getppid()
        # These two start their workers from the main thread; to others' workers the death of a mere thread would look
        # like the launcher's.
        self._by_main_thread = launcher in (TORCHRUN, DEEPSPEED)
        self.asked = 0
        self.before_leaving: Callable[[int], None] = lambda code: None
        # From `finish` to the end of the process, which is ended then; None: as long as it takes.
        self.seconds_to_exit: float | None = None

    def install(self) -> None:
        """Catches the signals and watches the launcher from here on; called in the main thread.

        Until the first step the kernel ends the process with its launcher, where it can be told to.
        """
        marker = stop_marker(self._environ)
        if marker is not None and marker.exists():
            self._leave(EXIT_STOPPED, "was asked to stop before the launcher restarted it")
        self._end_with_parent(signal.SIGKILL)
        reads, writes = os.pipe()
        os.set_blocking(writes, False)
        for number in STOPS:
            signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(writes, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(reads,), name="signals", daemon=True).start()

    def begin(self) -> bool:
        """From here on there is something to save. Returns whether the process was asked to stop already."""
        with self._lock:
            self._saves = True
        self._end_with_parent(0)
        return bool(self.asked)

    def finish(self, code: int) -> None:
        """Everything is saved: from here on the process leaves with `code`, whatever asks it to."""
        with self._lock:
            self._done, self._done_at = code, time.monotonic()
        if code == EXIT_STOPPED:
            self._leave_marker()

    def _listen(self, reads: int) -> None:
        while True:
            ready, _, _ = select.select([reads], [], [], _SECONDS_BETWEEN_LOOKS)
            for number in os.read(reads, 64) if ready else b"":
                if number in STOPS:
                    self._came(number)
            self._end_late_exit()
            if self._parent and os.getppid() != self._parent:
                self._parent = 0
                # Ends the process where it neither leaves nor saves in time, in whatever state its threads are.
                signal.alarm(_SECONDS_WITHOUT_LAUNCHER)
                self._request(signal.SIGHUP, "its launcher has died")

    def _end_late_exit(self) -> None:
        """Ends a process that is done but hangs in its exit, with the code that it would leave with."""
        with self._lock:
            done, late = self._done, time.monotonic() - self._done_at
        if done >= 0 and self.seconds_to_exit is not None and late > self.seconds_to_exit:
            os._exit(done)

    def _came(self, number: int) -> None:
        name = signal.Signals(number).name
        if self._asked_at is None:
            self._request(number, f"stopped by {name}")
        elif time.monotonic() - self._asked_at > _SECONDS_OF_ONE_REQUEST:
            with self._lock:
                done = self._done
            if done < 0:
                self._leave(
                    128 + number, f"left at once by a second signal, {name}: steps since the last checkpoint are lost"
                )
            self._leave(done, "")

    def _request(self, number: int, why: str) -> None:
        with self._lock:
            self._asked_at = self._asked_at or time.monotonic()
            self.asked = self.asked or number
            saves, done = self._saves, self._done
        if done >= 0:
            self._leave(done, "")
        if not saves:
            self._leave(EXIT_STOPPED, f"{why} before the first step: nothing to save")

    def _leave(self, code: int, why: str) -> None:
        # What blocks, such as a pipe that nobody reads, must neither keep the process nor change its exit code.
        signal.alarm(_SECONDS_OF_ALARM)
        farewell = threading.Thread(target=self._take_leave, args=(code, why), name="farewell", daemon=True)
        farewell.start()
        farewell.join(_SECONDS_TO_LEAVE)
        os._exit(code)

    def _take_leave(self, code: int, why: str) -> None:
        if why and not self._rank:
            with contextlib.suppress(OSError):
                os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"{why}\n".encode())
        self._leave_marker()
        with contextlib.suppress(Exception):
            self.before_leaving(code)

    def _leave_marker(self) -> None:
        marker = stop_marker(self._environ)
        if marker is not None:
            with contextlib.suppress(OSError):
                marker.touch()

    def _end_with_parent(self, number: int) -> None:
        """Tells the kernel to send a signal where the parent dies; 0: none."""
        if self._by_main_thread and sys.platform == "linux":
            with contextlib.suppress(OSError, AttributeError):
                ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)
