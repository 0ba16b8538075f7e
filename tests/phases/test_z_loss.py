"""--z-loss changes the gradient only; what is reported and what moves domain weights is the cross-entropy.

Run alone: python -m pytest tests/phases/test_z_loss.py
"""

from __future__ import annotations

import pytest
from phases.small import MODEL, train, training_lines

pytestmark = pytest.mark.slow
# See test_layouts.py on the epsilon.
STABLE = [*MODEL, "--adam-eps", "1e-3", "--log-interval", "1"]
Z_LOSS = ["--z-loss", "0.1"]
LAYOUTS = {
    "single": (1, []),
    "PP2": (2, ["--pipeline-model-parallel-size", "2"]),
    "PP2, 1F1B": (2, ["--pipeline-model-parallel-size", "2", "--doremi-update", "simultaneous"]),
    "ZeRO 3": (2, ["--zero-stage", "3"]),
}


def test_a_proxy_of_any_layout(data, reference, tmp_path):
    plain = training_lines(train(1, "proxy", data, tmp_path / "plain", 4, *reference, model=STABLE))
    single = None
    for name, (world, flags) in LAYOUTS.items():
        lines = training_lines(
            train(world, "proxy", data, tmp_path / name, 4, *reference, *flags, *Z_LOSS, model=STABLE)
        )
        # The first step's losses come before any gradient.
        assert lines[0]["loss"] == pytest.approx(plain[0]["loss"], rel=1e-5)
        if name == "PP2, 1F1B":
            continue
        for key in ("domain_loss", "domain_excess", "dro_loss", "domain_weights"):
            assert lines[0][key] == pytest.approx(plain[0][key], rel=1e-5), (name, key)
        single = single or lines
        assert lines[0]["grad_norm"] == pytest.approx(single[0]["grad_norm"], rel=1e-4)
        assert abs(lines[0]["grad_norm"] - plain[0]["grad_norm"]) > 1e-3
        for line, expected in zip(lines, single, strict=True):
            assert line["loss"] == pytest.approx(expected["loss"], rel=1e-5)
            assert line["domain_weights"] == pytest.approx(expected["domain_weights"], abs=1e-6)
    assert single[-1]["loss"] != pytest.approx(plain[-1]["loss"], rel=1e-5)


def test_it_is_part_of_the_run_and_resumes_bit_for_bit(data, tmp_path):
    flags = [*Z_LOSS, "--load", str(tmp_path / "broken"), "--log-interval", "1"]
    undisturbed = train(1, "main", data, tmp_path / "whole", 6, *Z_LOSS, "--log-interval", "1")
    train(1, "main", data, tmp_path / "broken", 6, *flags, "--exit-interval", "3")
    assert training_lines(train(1, "main", data, tmp_path / "broken", 6, *flags)) == training_lines(undisturbed)
    with pytest.raises(AssertionError, match=r"z_loss was 0\.1, and is 0\.0 in this start"):
        train(1, "main", data, tmp_path / "broken", 6, *flags[2:])
