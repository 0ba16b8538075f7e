"""A run's --save folder: layout-independent checkpoints, and config.json."""
