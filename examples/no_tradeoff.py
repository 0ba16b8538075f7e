"""Why a mixture can improve every domain at once (Xie et al. 2023, section 3.3 and Lemma 1): an example with unigrams.

    python examples/no_tradeoff.py

Three domains have three tokens each. A model estimates the distribution of a domain from n_i tokens of it, with a
Dirichlet prior (1/3, 1/3, 1/3): estimate = (prior + counts) / (n_i + 1). A domain of one token only is learned at once,
and a uniform one is what the prior says before any token is read: both waste tokens that the third domain could use.
The first table follows from a formula. The second simulates Group DRO, as it comes out, over seeds.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_doremi import DomainWeights

NAMES = ("one token", "in between", "uniform")
DOMAINS = np.array([[1.0, 0.0, 0.0], [0.7, 0.2, 0.1], [1 / 3, 1 / 3, 1 / 3]])
PRIOR = np.full(3, 1 / 3)
TOKENS = 500
PAPER = np.array([0.39, 0.61, 0.0])


def expected_error(domains: NDArray, tokens: NDArray) -> NDArray:
    """[k] expected squared error of the estimates, summed over the vocabulary: variance and squared bias.

    With s = 1 the mass of the prior and n tokens it is (n H + s^2 Delta) / (n + s)^2, where H = 1 - sum_v p_v^2 is the
    summed variance of one token, and Delta = sum_v (prior_v - p_v)^2.

    Args:
        domains: [k, vocab] distributions p.
        tokens: [k] tokens of each domain that are read.
    """
    mass = PRIOR.sum()
    variance = 1.0 - (domains**2).sum(axis=1)
    bias = ((PRIOR - domains) ** 2).sum(axis=1)
    return (tokens * variance + mass**2 * bias) / (tokens + mass) ** 2


def estimates(counts: NDArray) -> NDArray:
    """[k, vocab] estimated distributions from [k, vocab] counts."""
    return (PRIOR + counts) / (1.0 + counts.sum(axis=1, keepdims=True))


def simulate(seed: int, steps: int = TOKENS, step_size: float = 1.0, smoothing: float = 1e-3) -> NDArray:
    """[k] mean weights of Group DRO, under one reading of the paper's sketch.

    The reference has read `steps` tokens, spread evenly. At each step the proxy sees a token of every domain; token i
    counts alpha_i, as its gradient would, so that the proxy has read `steps` tokens in all as well.
    """
    generator = np.random.default_rng(seed)
    k, vocabulary = DOMAINS.shape
    reference = estimates(np.array([generator.multinomial(steps // k, row) for row in DOMAINS], dtype=np.float64))
    state, counts = DomainWeights.start(k), np.zeros((k, vocabulary))
    for _ in range(steps):
        tokens = np.array([generator.choice(vocabulary, p=row) for row in DOMAINS])
        rows = np.arange(k), tokens
        excess = np.log(reference[rows]) - np.log(estimates(counts)[rows])
        clipped = torch.from_numpy(np.maximum(excess, 0.0))
        state = state.update(clipped, torch.ones(k, dtype=torch.float64), step_size, smoothing)
        counts[rows] += state.weights.numpy()
    return state.mean().numpy()


def main(seeds: int = 20) -> None:
    """Prints both tables."""
    uniform = expected_error(DOMAINS, np.full(3, TOKENS / 3))
    print(f"expected squared error of each domain's estimate from {TOKENS} tokens in all")
    print(f"{'weights':<24}{NAMES[0]:>12}{NAMES[1]:>12}{NAMES[2]:>12}")
    for name, weights in (("uniform", np.full(3, 1 / 3)), ("the paper's .39 .61 0", PAPER)):
        print(f"{name:<24}" + "".join(f"{error:>12.3e}" for error in expected_error(DOMAINS, TOKENS * weights)))
    learned = np.array([simulate(seed) for seed in range(seeds)])
    errors = np.array([expected_error(DOMAINS, TOKENS * row) for row in learned])
    better = (errors <= uniform).all(axis=1).sum()
    print(f"\nGroup DRO, simulated: mean over {seeds} seeds, +- one standard deviation")
    for label, rows in (("weights", learned), ("error", errors)):
        cells = (
            f"{mean:.3g} +- {deviation:.1g}" for mean, deviation in zip(rows.mean(0), rows.std(0, ddof=1), strict=True)
        )
        print(f"{label:<10}" + "".join(f"{cell:>24}" for cell in cells))
    print(f"no domain is worse than with uniform weights in {better} of {seeds} seeds")


if __name__ == "__main__":
    main()
