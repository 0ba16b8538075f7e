"""Megatron-DoReMi: GPT pretraining whose data mixture is learned, exact at any parallel layout."""

__version__ = "0.1.0"
