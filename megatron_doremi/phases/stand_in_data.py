"""What stands in, in a dry run, for data that do not exist yet: a plan needs the vocabulary and little else of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray

from megatron_doremi.config import Config
from megatron_doremi.data.manifest import Domain, Manifest, TokenizerInfo
from megatron_doremi.data.token_stream import TokenStream
from megatron_doremi.phases.run_data import RunData
from megatron_doremi.plan import run_tokens

# A mixture needs two.
_NAMES = ("stand-in 1", "stand-in 2")


@dataclass(frozen=True)
class _Tokens:
    """All that a plan reads of a stream."""

    num_tokens: int


def stand_in_data(config: Config, data_size: int) -> tuple[RunData, NDArray[np.float64]]:
    """Two domains, each as long as the run reads on `data_size` replicas, without held-out text; [2] equal weights."""
    tokens = run_tokens(config, data_size) + 1
    path = Path(config.data.domains)
    manifest = Manifest(
        tuple(Domain(name, path.parent / name, None, tokens, 1, tokens) for name in _NAMES),
        TokenizerInfo("stand-in", path.parent / "stand-in", "0" * 64, config.data.vocab_size, 0),
        path,
    )
    train = cast(tuple[TokenStream, ...], tuple(_Tokens(tokens) for _ in _NAMES))
    nothing = (None,) * len(_NAMES)
    data = RunData(manifest, train, nothing, nothing, config.data.vocab_size, "", "")
    return data, np.full(len(_NAMES), 1.0 / len(_NAMES))
