"""Processes of a run: launch, rendezvous, watchdog, signals, the lock of a folder."""
