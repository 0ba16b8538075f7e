"""Stop requests by signals and by the launcher's death. Installed before anything heavy is imported.

The first signal requests a stop. Before the first step there is nothing to save, and the process exits immediately with
code 3; later the request is recorded, and the ranks save together after the current step. A second signal ends the
process immediately with code 128 + its number. The launcher's death also requests a stop, with a deadline, so that no
worker is orphaned.

Python runs a signal handler in the main thread between two bytecode instructions, which never happens while that thread
is blocked in a collective or waits for its peers. The handlers therefore do nothing; a thread reads the signal numbers
from the descriptor given to `signal.set_wakeup_fd`, to which the interpreter writes whatever the main thread is doing.
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

from megatron_doremi.cluster.launch import DEEPSPEED, LOCAL, NO_LAUNCHER, TORCHRUN, launcher_of, rank_of, stop_marker
from megatron_doremi.console import below_bars, wrapped_lines

EXIT_STOPPED = 3
STOP_SIGNALS = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGHUP", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGXCPU")
    if hasattr(signal, name)
)
# Ctrl-C in a terminal often reaches both the launcher, which forwards it, and the workers: that is one request.
_SECONDS_OF_ONE_REQUEST = 1.0
# From the launcher's death until its workers are killed; includes the save.
_SECONDS_WITHOUT_LAUNCHER = 25
_POLL_SECONDS = 1.0
# For the message, the stop marker and the announcement to the peers (`Watchdog.announce_exit`: at most 12 s).
_SECONDS_TO_EXIT = 15.0
# If the interpreter itself hangs while exiting, the kernel ends the process by SIGALRM.
_ALARM_SECONDS = 20
_PR_SET_PDEATHSIG = 1


class Signals:
    """Stop requests to this process, and whether it has something to save.

    Attributes:
        requested_by: the signal that requested a stop; 0: none.
        before_exit: called with the exit code before the process exits because of a signal.
        pass_on: called with a signal's number in place of all else, by a launcher.
        seconds_to_exit: time from `finish` until a process that hangs in its exit is ended; None: no limit.
    """

    def __init__(self, environ: Mapping[str, str]):
        self._environ, self._rank = environ, rank_of(environ)
        self._lock = threading.Lock()
        self._requested_at: float | None = None
        # The exit code and the time of `finish`; -1 before.
        self._exit_code, self._finished_at = -1, 0.0
        self._can_save = False
        launcher = launcher_of(environ)
        # 0 without a launcher: a shell may exit before its jobs (nohup, setsid).
        self._parent = 0 if launcher == NO_LAUNCHER else os.getppid()
        # PR_SET_PDEATHSIG fires when the parent's thread exits: safe only if the main thread starts the workers.
        self._started_by_main_thread = launcher in (TORCHRUN, DEEPSPEED, LOCAL)
        self.requested_by = 0
        self.before_exit: Callable[[int], None] = lambda code: None
        self.pass_on: Callable[[int], None] | None = None
        self.seconds_to_exit: float | None = None

    def install(self) -> None:
        """Catches the signals and watches the launcher from now on; called in the main thread.

        Until `begin` the kernel kills the process when its launcher dies, if the platform supports that.
        """
        marker = stop_marker(self._environ)
        if marker is not None and marker.exists():
            self._exit(EXIT_STOPPED, "a stop was requested before the launcher restarted this process")
        self._set_parent_death_signal(signal.SIGKILL)
        read_end, write_end = os.pipe()
        os.set_blocking(write_end, False)
        for number in STOP_SIGNALS:
            signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(read_end,), name="signals", daemon=True).start()

    def begin(self) -> bool:
        """Declares that there is something to save from now on. Returns whether a stop was already requested."""
        with self._lock:
            self._can_save = True
        self._set_parent_death_signal(0)
        return bool(self.requested_by)

    def finish(self, code: int) -> None:
        """Declares that everything is saved: whatever happens from now on, the process exits with `code`."""
        with self._lock:
            self._exit_code, self._finished_at = code, time.monotonic()
        if code == EXIT_STOPPED:
            self._create_marker()

    def _listen(self, read_end: int) -> None:
        while True:
            ready, _, _ = select.select([read_end], [], [], _POLL_SECONDS)
            for number in os.read(read_end, 64) if ready else b"":
                if number in STOP_SIGNALS:
                    self._handle(number)
            self._end_hung_exit()
            if self._parent and os.getppid() != self._parent:
                self._parent = 0
                # Ends the process if it neither saves nor exits in time, whatever its threads are doing.
                signal.alarm(_SECONDS_WITHOUT_LAUNCHER)
                self._request_stop(signal.SIGHUP, "the launcher died")

    def _end_hung_exit(self) -> None:
        """Ends a process that has finished but hangs in its exit, with the exit code given to `finish`."""
        with self._lock:
            code, seconds = self._exit_code, time.monotonic() - self._finished_at
        if code >= 0 and self.seconds_to_exit is not None and seconds > self.seconds_to_exit:
            os._exit(code)

    def _handle(self, number: int) -> None:
        if self.pass_on is not None:
            self.requested_by = self.requested_by or number
            self.pass_on(number)
            return
        name = signal.Signals(number).name
        if self._requested_at is None:
            self._request_stop(number, f"stopped by {name}")
        elif time.monotonic() - self._requested_at > _SECONDS_OF_ONE_REQUEST:
            with self._lock:
                code = self._exit_code
            if code < 0:
                self._exit(
                    128 + number, f"terminated by a second signal, {name}: steps since the last checkpoint are lost"
                )
            self._exit(code, "")

    def _request_stop(self, number: int, reason: str) -> None:
        with self._lock:
            self._requested_at = self._requested_at or time.monotonic()
            self.requested_by = self.requested_by or number
            can_save, code = self._can_save, self._exit_code
        if code >= 0:
            self._exit(code, "")
        if not can_save:
            self._exit(EXIT_STOPPED, f"{reason} before there was anything to save")

    def _exit(self, code: int, message: str) -> None:
        # Nothing that blocks, such as a pipe that nobody reads, may keep the process alive or change its exit code.
        signal.alarm(_ALARM_SECONDS)
        last_steps = threading.Thread(target=self._prepare_exit, args=(code, message), name="exit", daemon=True)
        last_steps.start()
        last_steps.join(_SECONDS_TO_EXIT)
        os._exit(code)

    def _prepare_exit(self, code: int, message: str) -> None:
        if message and not self._rank:
            with contextlib.suppress(OSError):
                text = f"{below_bars()}{wrapped_lines(message)}\n"
                os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, text.encode())
        self._create_marker()
        with contextlib.suppress(Exception):
            self.before_exit(code)

    def _create_marker(self) -> None:
        marker = stop_marker(self._environ)
        if marker is not None:
            with contextlib.suppress(OSError):
                marker.touch()

    def _set_parent_death_signal(self, number: int) -> None:
        """Makes the kernel send this process a signal when its parent dies; 0: none."""
        if self._started_by_main_thread and sys.platform == "linux":
            with contextlib.suppress(OSError, AttributeError):
                ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)
