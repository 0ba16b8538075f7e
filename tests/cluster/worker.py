"""Stands in for pretrain_doremi.py where only the life of a process matters: no torch.

usage: worker.py {starting,untold,training,done} [SECONDS_OF_A_SAVE]; the main thread hangs where no handler can run,
and in `untold` the peers cannot be told.
"""

import ctypes
import os
import sys
import threading
import time

from megatron_doremi.cluster import signals

signals._SECONDS_WITHOUT_LAUNCHER = 2
signals._SECONDS_TO_EXIT = 1.0
stage, seconds = sys.argv[1], float(sys.argv[2]) if len(sys.argv) > 2 else None
watched = signals.Signals(os.environ)
watched.install()


def save() -> None:
    while not watched.requested_by:
        time.sleep(0.01)
    print("saving", flush=True)
    time.sleep(seconds)
    print("saved", flush=True)
    watched.finish(3)
    os._exit(3)


if stage == "untold":
    watched.before_exit = lambda code: time.sleep(60.0)
if stage in ("training", "done"):
    watched.begin()
if stage == "done":
    watched.finish(0)
    if "SECONDS_TO_EXIT" in os.environ:
        watched.seconds_to_exit = float(os.environ["SECONDS_TO_EXIT"])
if seconds is not None:
    threading.Thread(target=save, daemon=True).start()
print("ready", os.getpid(), flush=True)
# As in a collective whose peer is gone: a mutex that is locked twice.
libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(128)
libc.pthread_mutex_lock(mutex)
libc.pthread_mutex_lock(mutex)
