"""A process with the signal handling of pretrain_doremi.py, but without torch.

usage: worker.py {starting,unreachable,training,done} [SECONDS_OF_A_SAVE]

The main thread hangs in a system call, where no signal handler can run. In `unreachable` the announcement to the peers
hangs, too.
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
requests = signals.Signals(os.environ)
requests.install()


def save() -> None:
    while not requests.requested_by:
        time.sleep(0.01)
    print("saving", flush=True)
    time.sleep(seconds)
    print("saved", flush=True)
    requests.finish(3)
    os._exit(3)


if stage == "unreachable":
    requests.before_exit = lambda code: time.sleep(60.0)
if stage in ("training", "done"):
    requests.begin()
if stage == "done":
    requests.finish(0)
    if "SECONDS_TO_EXIT" in os.environ:
        requests.seconds_to_exit = float(os.environ["SECONDS_TO_EXIT"])
if seconds is not None:
    threading.Thread(target=save, daemon=True).start()
print("ready", os.getpid(), flush=True)
# Blocks like a collective whose peer is gone: a mutex that is locked twice.
libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(128)
libc.pthread_mutex_lock(mutex)
libc.pthread_mutex_lock(mutex)
