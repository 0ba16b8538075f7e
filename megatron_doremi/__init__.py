"""Megatron-DoReMi: GPT pretraining whose data mixture is learned, exact at any parallel layout.

The names in `__all__` are Group DRO for a training loop of your own; examples/own_loop.py shows them in 80 lines.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_doremi.mixture.group_dro import DomainWeights, token_scores
    from megatron_doremi.mixture.statistics import DomainStats, domain_coefficients, domain_stats, weighted_loss

__version__ = "0.1.0"
__all__ = ["DomainStats", "DomainWeights", "domain_coefficients", "domain_stats", "token_scores", "weighted_loss"]

_HOMES = {
    "megatron_doremi.mixture.group_dro": ("DomainWeights", "token_scores"),
    "megatron_doremi.mixture.statistics": ("DomainStats", "domain_coefficients", "domain_stats", "weighted_loss"),
}


def __getattr__(name: str) -> Any:
    """Imports a name of `__all__` when it is first used, so that programs that need no torch start without it."""
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Lists the names of `__all__` for completion before they are imported."""
    return sorted({*globals(), *__all__})
