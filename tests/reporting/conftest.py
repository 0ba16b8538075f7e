"""Synthetic runs, small enough that every figure of a report can be checked by hand."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

WriteRun = Callable[..., Path]


@pytest.fixture
def write_run(tmp_path: Path) -> WriteRun:
    """Returns a function that writes a run folder and returns its path."""

    def write(
        name: str,
        rows: Sequence[dict[str, Any]],
        phase: str = "main",
        weights: dict[str, float] | None = None,
        tail: str = "",
        config: dict[str, Any] | None = None,
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config or {"run": {"phase": phase, "seed": 1}}))
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "metrics.jsonl").write_text(lines + tail)
        if weights is not None:
            document = {"weights": weights, "provenance": {"smoothing": 0.001, "steps": 2}}
            (folder / "domain_weights.json").write_text(json.dumps(document))
        return folder

    return write


@pytest.fixture
def write_manifest(tmp_path: Path) -> Callable[[dict[str, int]], Path]:
    """Returns a function that writes a manifest from {name: training tokens}."""

    def write(tokens: dict[str, int]) -> Path:
        entries = [
            {"name": name, "train": name, "valid": name, "tokens": count, "documents": 1, "bytes": count}
            for name, count in tokens.items()
        ]
        path = tmp_path / "domains.json"
        path.write_text(json.dumps({"format": "megatron-doremi-domains/1", "domains": entries}))
        return path

    return write


def proxy_row(iteration: int, weights: dict[str, float], loss: float = 3.0) -> dict[str, Any]:
    """A proxy's training line; the second domain is absent from every even batch."""
    names = list(weights)
    present = names if iteration % 2 else names[:1] + names[2:]
    return {
        "iteration": iteration,
        "consumed_tokens": 100 * iteration,
        "loss": loss,
        "lr": 0.001,
        "grad_norm": 1.0,
        "domain_loss": dict.fromkeys(present, loss),
        "domain_tokens": dict.fromkeys(present, 10),
        "domain_excess": dict.fromkeys(names, 0.5 / iteration),
        "domain_weights": weights,
        "dro_loss": loss,
    }


def evaluation_row(iteration: int, losses: dict[str, float], token_mean: float) -> dict[str, Any]:
    """An evaluation line."""
    return {
        "iteration": iteration,
        "eval": losses,
        "eval_uniform_mean": sum(losses.values()) / len(losses),
        "eval_worst": max(losses.values()),
        "eval_token_mean": token_mean,
    }


@pytest.fixture
def rows() -> tuple[Callable[..., dict[str, Any]], Callable[..., dict[str, Any]]]:
    """Returns (proxy_row, evaluation_row)."""
    return proxy_row, evaluation_row


@pytest.fixture
def three_runs(write_run: WriteRun) -> dict[str, Path]:
    """A proxy, a main run and a baseline on the domains code, noise and boilerplate."""
    names = ("code", "noise", "boilerplate")
    steps = [(0.5, 0.3, 0.2), (0.7, 0.1, 0.2), (0.9, 0.02, 0.08)]
    trajectory = [proxy_row(n, dict(zip(names, w, strict=True))) for n, w in enumerate(steps, 1)]
    main = [(3.0, 5.6, 0.8), (2.5, 5.75, 0.25)]
    baseline = [(3.1, 5.5, 0.4), (2.75, 5.5, 0.25)]

    def evaluations(history: list[tuple[float, ...]], means: tuple[float, float]) -> list[dict[str, Any]]:
        pairs = enumerate(zip(history, means, strict=True), 1)
        return [evaluation_row(n, dict(zip(names, each, strict=True)), mean) for n, (each, mean) in pairs]

    return {
        "proxy": write_run("proxy", trajectory, "proxy"),
        "main": write_run("main", evaluations(main, (3.0, 2.6))),
        "baseline": write_run("baseline", evaluations(baseline, (3.1, 2.8))),
    }
