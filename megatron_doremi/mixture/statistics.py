"""From token losses to per-domain sums, and from domain weights to the proxy's objective.

What travels between ranks are sums and counts, never means: `DomainStats`. The proxy
descends J = sum_i alpha_i * (sum of l over domain i) / (targets of domain i), alpha a constant, nothing
clipped, absent domains contributing nothing (Xie et al. 2023, Algorithm 1, line 9).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class DomainStats:
    """Sums over windows by domain, each [k] float64.

    Attributes:
        score: of what a controller scores tokens by (`MixtureController.token_scores`); 0 where it does not.
        loss: of token losses, in nats.
        targets: number of targets.
    """

    score: Tensor
    loss: Tensor
    targets: Tensor

    @staticmethod
    def zeros(num_domains: int, device: torch.device | str = "cpu") -> DomainStats:
        """The sums over nothing."""
        return DomainStats.unstack(torch.zeros(3, num_domains, dtype=torch.float64, device=device))

    @staticmethod
    def unstack(rows: Tensor) -> DomainStats:
        """What `stack` made [3, k] of."""
        score, loss, targets = rows.unbind()
        return DomainStats(score, loss, targets)

    def stack(self) -> Tensor:
        """[3, k], to travel between ranks as one."""
        return torch.stack((self.score, self.loss, self.targets))

    def __add__(self, other: DomainStats) -> DomainStats:
        return DomainStats(self.score + other.score, self.loss + other.loss, self.targets + other.targets)


def domain_stats(token_loss: Tensor, domains: Tensor, num_domains: int, scores: Tensor | None = None) -> DomainStats:
    """Sums of one micro-batch by domain.

    Args:
        token_loss: [batch, seq] losses l in nats.
        domains: [batch] number of each window's domain; -1 counts for nothing.
        num_domains: k.
        scores: [batch, seq] what each token adds to its domain's score; None: 0.
    """
    loss = token_loss.detach().double()
    score = torch.zeros_like(loss[:, 0]) if scores is None else scores.sum(dim=1)
    rows = torch.stack((score, loss.sum(dim=1), torch.full_like(loss[:, 0], loss.shape[1])))
    # No scattered adds, which on a GPU run in an order of their own, and no product with the membership matrix, in
    # which one window's NaN or Inf would make all domains' sums NaN.
    members = domains.unsqueeze(1) == torch.arange(num_domains, device=domains.device)
    return DomainStats.unstack(torch.where(members, rows.unsqueeze(2), 0.0).sum(dim=1))


def finite_windows(token_loss: Tensor, reference: Tensor | None) -> Tensor:
    """[2, batch]: whether all losses of a window are finite, and all of the reference's (true where there is none)."""
    own = torch.isfinite(token_loss.detach()).all(dim=1)
    return torch.stack((own, torch.ones_like(own) if reference is None else torch.isfinite(reference).all(dim=1)))


def domain_coefficients(weights: Tensor, targets: Tensor, accumulation: int) -> Tensor:
    """What a token's loss of each domain is multiplied by.

    The engine divides gradients by the micro-batches of a rank and by the replicas; `accumulation`, their
    product, takes both back.

    Args:
        weights: [k] alpha_t, float64.
        targets: [k] targets of each domain in the global batch.
        accumulation: micro-batches of a rank times data-parallel ranks.

    Returns:
        [k] accumulation * alpha_i / targets_i; 0 for absent domains.
    """
    return torch.where(targets > 0, accumulation * weights / targets.clamp(min=1.0), 0.0)


def batch_coefficients(weights: Tensor, targets: Tensor, sampling: Tensor, accumulation: int) -> Tensor:
    """Coefficients of the authors' repository, for comparison with its results.

    There the loss is one weighted mean over all tokens of the batch, sum_i w_i * L_i / sum_j w_j * n_j with L_i
    the domain's summed loss, n_i its targets, and w_i proportional to alpha_i / q_i, q the sampling weights. It
    is the paper's objective only where every domain has the same number of targets in the batch.

    Args:
        sampling: [k] sampling weights q, float64; the rest as for `domain_coefficients`.
    """
    relative = torch.where(sampling > 0, weights / sampling.clamp(min=1e-300), 0.0)
    relative = relative / relative.sum()
    return torch.where(targets > 0, accumulation * relative / (relative * targets).sum(), 0.0)


def weighted_loss(token_loss: Tensor, domains: Tensor, coefficients: Tensor) -> Tensor:
    """The micro-batch's part of the objective: sum over tokens of coefficient * loss.

    Args:
        token_loss: [batch, seq] losses with their graph.
        domains: [batch] number of each window's domain.
        coefficients: [k] from `domain_coefficients`.
    """
    per_window = coefficients[domains].to(token_loss.dtype)
    return (token_loss.sum(dim=1) * per_window).sum()
