"""A run's folder: checkpoints that any layout reads, and config.json."""
