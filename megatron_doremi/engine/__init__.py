"""DeepSpeed engines, their schedule, their configuration, the optimizer."""
