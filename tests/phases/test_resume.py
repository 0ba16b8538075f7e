"""A run that stops and resumes writes the same metrics and weights as an undisturbed run, bit for bit.

Run alone: python -m pytest tests/phases/test_resume.py
"""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from phases.small import train, training_lines

pytestmark = pytest.mark.slow


LAYOUTS = {
    "single": (1, []),
    "PP2": (2, ["--pipeline-model-parallel-size", "2"]),
    "TP2": (2, ["--tensor-model-parallel-size", "2"]),
    "DP2 ZeRO1": (2, ["--zero-stage", "1"]),
    "PP2 x DP2 ZeRO1": (4, ["--pipeline-model-parallel-size", "2", "--zero-stage", "1"]),
    "PP2 bf16": (2, ["--pipeline-model-parallel-size", "2", "--bf16", "--zero-stage", "1"]),
    "DP2 ZeRO2 offloaded": (2, ["--zero-stage", "2", "--cpu-offload"]),
    "DP2 ZeRO2 bf16": (2, ["--zero-stage", "2", "--bf16"]),
    "DP2 ZeRO3": (2, ["--zero-stage", "3"]),
    "DP2 ZeRO3 bf16 offloaded": (2, ["--zero-stage", "3", "--bf16", "--cpu-offload"]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_proxy_stopped_half_way(layout, reference, data, tmp_path):
    world, flags = LAYOUTS[layout]
    flags = [*flags, *reference, "--log-interval", "1", "--eval-interval", "3"]
    undisturbed = train(world, "proxy", data, tmp_path / "undisturbed", 12, *flags)
    broken = tmp_path / "broken"
    again = [*flags, "--load", str(broken)]
    first = train(world, "proxy", data, broken, 12, *again, "--exit-interval", "6")
    assert training_lines(first) == training_lines(undisturbed)[:6]
    # Lines that a run wrote after its last checkpoint are not duplicated.
    with (broken / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"iteration": 7, "loss": 0.0}) + "\n" + '{"iteration": 8, "lo')
    second = train(world, "proxy", data, broken, 12, *again)
    assert training_lines(second) == training_lines(undisturbed)
    assert [line for line in second if "eval" in line] == [line for line in undisturbed if "eval" in line]
    weights = [json.loads((tmp_path / run / "domain_weights.json").read_text()) for run in ("undisturbed", "broken")]
    assert weights[0]["weights"] == weights[1]["weights"]


def test_main_run_with_log_interval_and_kept_checkpoints(data, tmp_path):
    flags = [
        "--domain-weights",
        "natural",
        "--log-interval",
        "4",
        "--save-interval",
        "3",
        "--keep-checkpoints",
        "2",
    ]
    undisturbed = train(1, "main", data, tmp_path / "undisturbed", 12, *flags)
    broken = tmp_path / "broken"
    again = [*flags, "--load", str(broken)]
    train(1, "main", data, broken, 12, *again, "--exit-interval", "6")
    assert training_lines(train(1, "main", data, broken, 12, *again)) == training_lines(undisturbed)
    assert [line["iteration"] for line in training_lines(undisturbed)] == [4, 8, 12]
    assert sorted(p.name for p in (broken / "checkpoints").iterdir()) == [
        "iter_0000009",
        "iter_0000012",
        "latest",
    ]
    # A third start finds the run finished and changes nothing.
    before = (broken / "metrics.jsonl").read_text()
    train(1, "main", data, broken, 12, *again)
    assert (broken / "metrics.jsonl").read_text() == before


def test_a_torn_checkpoint_is_passed_over(data, tmp_path):
    """A pointer to a missing checkpoint and unfinished folders are ignored."""
    save = tmp_path / "run"
    flags = ["--load", str(save), "--save-interval", "4"]
    train(1, "main", data, save, 8, *flags)
    (save / "checkpoints" / "latest").write_text("iter_0000099\n")
    (save / "checkpoints" / ".writing-iter_0000012").mkdir()
    (save / "checkpoints" / "iter_0000012").mkdir()
    lines = training_lines(train(1, "main", data, save, 12, *flags, "--log-interval", "1"))
    assert [line["iteration"] for line in lines][-4:] == [9, 10, 11, 12]


@pytest.mark.parametrize("flags", [["--doremi-weighting", "resample"], ["--doremi-update", "simultaneous"]])
def test_other_updates_resume_exactly(flags, reference, data, tmp_path):
    """With resample the blend follows the weights at every step and resumes at its position."""
    flags = [*flags, *reference, "--pipeline-model-parallel-size", "2"]
    undisturbed = training_lines(train(2, "proxy", data, tmp_path / "undisturbed", 20, *flags))
    broken = tmp_path / "broken"
    train(2, "proxy", data, broken, 20, *flags, "--load", str(broken), "--exit-interval", "10")
    assert training_lines(train(2, "proxy", data, broken, 20, *flags, "--load", str(broken))) == undisturbed
    if "resample" in flags:
        # Batch t holds floor or ceil of 8 * alpha_{t-1} windows of each domain.
        for before, line in pairwise(undisturbed):
            for name, weight in before["domain_weights"].items():
                assert abs(line["domain_tokens"][name] / 16 - 8 * weight) < 1.0
        assert len({json.dumps(line["domain_tokens"]) for line in undisturbed}) > 3


def test_a_mixture_that_is_changed_on_purpose(data, tmp_path):
    """Batches follow the new weights from the next step; cursors continue, so that no window is read twice."""
    save = tmp_path / "run"
    flags = ["--load", str(save), "--log-interval", "1", "--global-batch-size", "12"]
    train(1, "main", data, save, 8, *flags, "--domain-weights", "natural", "--exit-interval", "4")
    changed = ["--domain-weights", "uniform", "--change-domain-weights"]
    lines = training_lines(train(1, "main", data, save, 8, *flags, *changed))
    windows = [{name: tokens // 16 for name, tokens in line["domain_tokens"].items()} for line in lines]
    # 1500, 3000 and 4500 tokens: a sixth, a third and a half of twelve windows.
    assert windows[:4] == [{"domain 0": 2, "domain 1": 4, "domain 2": 6}] * 4
    assert windows[4:] == [{"domain 0": 4, "domain 1": 4, "domain 2": 4}] * 4
    state = json.loads((save / "checkpoints" / "iter_0000008" / "state.json").read_text())
    assert state["blend"]["cursors"] == {"domain 0": 24, "domain 1": 32, "domain 2": 40}
    assert state["identity"]["sampling_weights"] == {f"domain {i}": pytest.approx(1 / 3) for i in range(3)}
