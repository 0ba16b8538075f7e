"""Per-domain sums of token losses, and the coefficients that weight token losses by domain.

Ranks exchange sums and counts, never means: `DomainStats`. The proxy minimizes
J = sum_i alpha_i * (sum of l over domain i) / (targets of domain i), with alpha constant, losses not clipped, and no
term for domains absent from the batch (Xie et al. 2023, Algorithm 1, line 9).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class DomainStats:
    """Sums over windows by domain, each [k] float64.

    Attributes:
        score: sums of token scores (`MixtureController.token_scores`); 0 if the controller has none.
        loss: sums of token losses, in nats.
        targets: numbers of targets.
    """

    score: Tensor
    loss: Tensor
    targets: Tensor

    @staticmethod
    def zeros(num_domains: int, device: torch.device | str = "cpu") -> DomainStats:
        """The sums over no windows."""
        return DomainStats.unstack(torch.zeros(3, num_domains, dtype=torch.float64, device=device))

    @staticmethod
    def unstack(rows: Tensor) -> DomainStats:
        """The inverse of `stack`."""
        score, loss, targets = rows.unbind()
        return DomainStats(score, loss, targets)

    def stack(self) -> Tensor:
        """[3, k]: score, loss and targets as one tensor, for one reduction."""
        return torch.stack((self.score, self.loss, self.targets))

    def __add__(self, other: DomainStats) -> DomainStats:
        return DomainStats(self.score + other.score, self.loss + other.loss, self.targets + other.targets)


def domain_stats(token_loss: Tensor, domains: Tensor, num_domains: int, scores: Tensor | None = None) -> DomainStats:
    """Sums of one micro-batch by domain.

    Args:
        token_loss: [batch, seq] losses l in nats.
        domains: [batch] domain index of each window; windows with -1 (padding) are ignored.
        num_domains: k.
        scores: [batch, seq] scores of the tokens; None: all 0.
    """
    loss = token_loss.detach().double()
    score = torch.zeros_like(loss[:, 0]) if scores is None else scores.sum(dim=1)
    rows = torch.stack((score, loss.sum(dim=1), torch.full_like(loss[:, 0], loss.shape[1])))
    # Not index_add, which is nondeterministic on a GPU, and not a product with the membership matrix, in which NaN or
    # Inf in one window would make the sums of all domains NaN.
    members = domains.unsqueeze(1) == torch.arange(num_domains, device=domains.device)
    return DomainStats.unstack(torch.where(members, rows.unsqueeze(2), 0.0).sum(dim=1))


def finite_windows(token_loss: Tensor, reference: Tensor | None) -> Tensor:
    """[2, batch]: whether all losses of a window are finite, and all of the reference's (true without a reference)."""
    finite = torch.isfinite(token_loss.detach()).all(dim=1)
    return torch.stack((finite, torch.ones_like(finite) if reference is None else torch.isfinite(reference).all(dim=1)))


def domain_coefficients(weights: Tensor, targets: Tensor, accumulation: int) -> Tensor:
    """The factor of each domain's token losses in the objective.

    The engine divides gradients by the micro-batches of a rank and by the replicas; `accumulation`, their product,
    cancels both.

    Args:
        weights: [k] alpha_t, float64.
        targets: [k] number of targets of each domain in the global batch.
        accumulation: micro-batches of a rank times data-parallel ranks.

    Returns:
        [k] accumulation * alpha_i / targets_i; 0 for absent domains.
    """
    return torch.where(targets > 0, accumulation * weights / targets.clamp(min=1.0), 0.0)


def batch_coefficients(weights: Tensor, targets: Tensor, sampling: Tensor, accumulation: int) -> Tensor:
    """The coefficients of the authors' repository, for comparison with its results.

    Its loss is one weighted mean over all tokens of the batch, sum_i w_i * L_i / sum_j w_j * n_j, with L_i the
    domain's summed loss, n_i its number of targets, and w_i proportional to alpha_i / q_i, where q are the sampling
    weights. It equals the paper's objective only if every domain has the same number of targets in the batch.

    Args:
        sampling: [k] sampling weights q, float64; the others as for `domain_coefficients`.
    """
    relative = torch.where(sampling > 0, weights / sampling.clamp(min=1e-300), 0.0)
    relative = relative / relative.sum()
    return torch.where(targets > 0, accumulation * relative / (relative * targets).sum(), 0.0)


def weighted_loss(token_loss: Tensor, domains: Tensor, coefficients: Tensor) -> Tensor:
    """The micro-batch's part of the objective: the sum over tokens of coefficient * loss.

    Args:
        token_loss: [batch, seq] losses in nats, with their graph.
        domains: [batch] domain index of each window.
        coefficients: [k] from `domain_coefficients`.
    """
    per_window = coefficients[domains].to(token_loss.dtype)
    return (token_loss.sum(dim=1) * per_window).sum()
