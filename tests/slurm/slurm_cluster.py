"""A real SLURM on this machine: two emulated nodes, installed where apt-get and root allow it."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort=17100
AuthType=auth/munge
SlurmUser=root
SlurmdUser=root
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdSpoolDir={folder}/slurmd.%n
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdLogFile={folder}/slurmd.%n.log
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=1
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[17101-17102] CPUs=2 RealMemory=2000 State=UNKNOWN
PartitionName=all Nodes=n[1-2] Default=YES OverSubscribe=FORCE:4 MaxTime=60 State=UP
"""


def wait_for(condition, seconds: float, description: str) -> None:
    """Waits until condition() holds; fails with `description` after `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds:.0f} s: {description}"
        time.sleep(0.2)


def quiet(*command: str) -> bool:
    """Whether a command succeeds."""
    return subprocess.run(command, capture_output=True).returncode == 0


def install() -> None:
    """Installs SLURM and munge if they are missing; skips the test if they cannot be installed."""
    if os.geteuid() != 0:
        pytest.skip("a SLURM on this machine takes root")
    if all(map(shutil.which, ("slurmctld", "slurmd", "munged"))):
        return
    if not shutil.which("apt-get"):
        pytest.skip("SLURM is not installed, and there is no apt-get")
    environ = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    command = ["apt-get", "install", "-y", "slurm-wlm", "munge"]
    if subprocess.run(command, env=environ, capture_output=True, timeout=300).returncode:
        subprocess.run(["apt-get", "update"], env=environ, capture_output=True, timeout=300)
        done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=300)
        if done.returncode:
            pytest.skip(f"SLURM could not be installed: {done.stderr.strip().splitlines()[-1:]}")


def start_munge() -> subprocess.Popen | None:
    """Starts munged; None if one is already running."""

    def answers() -> bool:
        return quiet("bash", "-c", "munge -n | unmunge")

    if answers():
        return None
    Path("/run/munge").mkdir(exist_ok=True)
    shutil.chown("/run/munge", "munge", "munge")
    daemon = subprocess.Popen(
        ["runuser", "-u", "munge", "--", "munged", "--foreground", "--force"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_for(answers, 20, "munged")
    return daemon


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[dict[str, str]]:
    """Starts the cluster and yields the environment for its commands."""
    install()
    if Path("/etc/slurm/slurm.conf").exists():
        pytest.skip("this machine has a SLURM of its own")
    munge = start_munge()
    config = folder / "slurm.conf"
    config.write_text(CONFIG.format(host=socket.gethostname().split(".")[0], folder=folder))
    (folder / "state").mkdir()
    environ = {**os.environ, "SLURM_CONF": str(config)}
    daemons = [["slurmctld", "-D"], ["slurmd", "-D", "-N", "n1"], ["slurmd", "-D", "-N", "n2"]]
    running = [
        subprocess.Popen(words, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for words in daemons
    ]
    try:

        def idle() -> bool:
            words = ["sinfo", "--noheader", "--format=%T %D"]
            return subprocess.run(words, env=environ, capture_output=True, text=True).stdout.split() == ["idle", "2"]

        wait_for(idle, 40, "both nodes idle")
        yield environ
    finally:
        subprocess.run(["scancel", "--user=root"], env=environ, capture_output=True)
        time.sleep(1.0)
        for process in reversed(running):
            process.terminate()
        for process in running:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
        if munge is not None:
            munge.terminate()
            munge.wait(10)
