"""Group DRO (DoReMi, Xie et al. 2023, Algorithm 1) in a training loop of your own: plain PyTorch, one process.

    python examples/own_loop.py

The names imported from megatron_doremi are all that a loop needs. With several replicas, all-reduce (SUM)
`stats.stack()` before the update, and pass the number of replicas as `accumulation`, since DDP averages gradients.
"""

import inspect
import random
import string
import sys
import textwrap
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn

from megatron_doremi import DomainWeights, domain_coefficients, domain_stats, token_scores, weighted_loss


class ByteModel(nn.Module):
    """A small recurrent language model: byte ids [batch, seq] to logits [batch, seq, 256]."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.output = nn.Embedding(256, 32), nn.Linear(64, 256)
        self.recurrence = nn.GRU(32, 64, batch_first=True)

    def forward(self, ids: Tensor) -> Tensor:
        return self.output(self.recurrence(self.embedding(ids))[0])


def texts() -> dict[str, str]:
    """Returns a text by domain: one to learn from, one that is learned at once, and one that cannot be learned."""
    noise = random.Random(0).choices(string.printable, k=100_000)
    return {"source": inspect.getsource(textwrap), "boilerplate": "Thank you. " * 9_000, "noise": "".join(noise)}


def batch(streams: list[Tensor], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Returns ids [batch, seq + 1] with as many windows of each domain, and their domains [batch]."""
    starts = [torch.randint(len(stream) - 32, (8,), generator=generator) for stream in streams]
    windows = [stream[i : i + 33] for stream, row in zip(streams, starts, strict=True) for i in row]
    return torch.stack(windows), torch.arange(len(streams)).repeat_interleave(8)


def token_losses(model: nn.Module, ids: Tensor) -> Tensor:
    """Returns the cross-entropy of each next byte in nats, [batch, seq]."""
    return nn.functional.cross_entropy(model(ids[:, :-1]).transpose(1, 2), ids[:, 1:], reduction="none")


def train(streams: list[Tensor], steps: int, reference: nn.Module | None = None) -> tuple[nn.Module, DomainWeights]:
    """Trains a reference model on equal weights or, given one, a proxy model by Group DRO."""
    torch.manual_seed(0)
    model, generator = ByteModel(), torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    state = DomainWeights.start(len(streams))
    for _ in range(steps):
        ids, domains = batch(streams, generator)
        losses = token_losses(model, ids)
        loss = losses.mean()
        if reference is not None:
            with torch.no_grad():
                scores = token_scores(losses.double(), token_losses(reference, ids), "excess")
            stats = domain_stats(losses, domains, len(streams), scores)
            state = state.update(stats.score, stats.targets, step_size=1.0, smoothing=1e-3)
            loss = weighted_loss(losses, domains, domain_coefficients(state.weights, stats.targets, accumulation=1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model, state


if __name__ == "__main__":
    streams = [torch.tensor(list(text.encode())) for text in texts().values()]
    _, state = train(streams, steps=400, reference=train(streams, steps=400)[0])
    for name, weight in zip(texts(), state.mean().tolist(), strict=True):
        print(f"{name:<12} {weight:.3f}")
