"""Runs whose positions and attention reset at the ends of documents: at any layout, and after a stop.

Run alone: python -m pytest tests/phases/test_document_resets.py
"""

from __future__ import annotations

import json

import pytest
from phases.small import MODEL, assert_stopped_and_resumed_equal, train, training_lines
from ranks import run_program

from megatron_doremi.arguments import parse_config
from megatron_doremi.errors import ConfigError
from megatron_doremi.parallel.topology import Topology
from megatron_doremi.phases.inputs import open_inputs, plan_text

pytestmark = pytest.mark.slow
DEEP = [*MODEL, "--num-layers", "3", "--adam-eps", "1e-3", "--log-interval", "1"]
RESETS = ["--reset-position-ids", "--reset-attention-mask"]
PP3 = (3, ["--pipeline-model-parallel-size", "3"])


def test_every_stage_of_a_pipeline_sees_the_documents(data, tmp_path):
    """A proxy with an online reference, both with resets, an evaluation and recorded losses: one process and three
    stages, the middle one without inputs or targets of its own."""
    found = []
    for world, layout in ((1, []), PP3):
        folder, flags = tmp_path / str(world), [*layout, *RESETS]
        train(world, "reference", data, folder / "reference", 6, *flags, model=DEEP)
        loads = ["--reference-load", str(folder / "reference")]
        lines = train(world, "proxy", data, folder / "proxy", 6, *flags, *loads, model=DEEP)
        sizes = ["--domains", str(data), "--seq-length", "16", "--micro-batch-size", "2"]
        run_program(world, ["--phase", "score", *sizes, *layout, *loads, "--save", str(folder / "losses")])
        recorded = train(
            world,
            "proxy",
            data,
            folder / "recorded",
            6,
            *flags,
            "--reference-losses",
            str(folder / "losses"),
            model=DEEP,
        )
        found.append((training_lines(lines), training_lines(recorded), [line for line in lines if "eval" in line]))
    gpt = json.loads((tmp_path / "3" / "proxy" / "config.json").read_text())["gpt"]
    assert (gpt["reset_position_ids"], gpt["reset_attention_mask"], gpt["eod"]) == (True, True, 0)
    for single, staged in zip(*(online + recorded for online, recorded, _ in found), strict=True):
        assert staged["loss"] == pytest.approx(single["loss"], rel=1e-5)
        assert staged["domain_excess"] == pytest.approx(single["domain_excess"], abs=2e-5)
        assert staged["domain_weights"] == pytest.approx(single["domain_weights"], abs=1e-6)
    # Recorded in 16 bits.
    for online, recorded in zip(found[1][0], found[1][1], strict=True):
        assert recorded["domain_excess"] == pytest.approx(online["domain_excess"], abs=2e-3)
        losses = ["--reference-losses", str(folder / "losses")]
        for own, count in ((RESETS, 0), (RESETS[:1], 1), ([], 1)):
            warnings = planned(data, *losses, *own, phase="proxy", model=DEEP).data.manifest.warnings
            assert sum("resets positions or attention at other places" in line for line in warnings) == count
    (single,), (staged,) = found[0][2], found[1][2]
    assert staged["eval"] == pytest.approx(single["eval"], rel=1e-5)
    plain = train(1, "main", data, tmp_path / "plain", 6, model=DEEP)
    assert training_lines(plain)[0]["loss"] != pytest.approx(found[0][0][0]["loss"], rel=1e-5)


def test_stopped_half_way_it_takes_the_same_steps(data, tmp_path):
    world, layout = PP3
    assert_stopped_and_resumed_equal(world, data, tmp_path, [*layout, *RESETS], DEEP)
    with pytest.raises(AssertionError, match="'reset_attention_mask': True"):
        train(1, "main", data, tmp_path / "broken", 6, "--load", str(tmp_path / "broken"), model=DEEP)


def planned(data, *flags, phase="main", model=MODEL):
    argv = ["--phase", phase, "--domains", str(data), "--save", "none", "--train-iters", "6", *model, "--dry-run"]
    return open_inputs(parse_config([*argv, *flags], 1), Topology())


def test_data_that_name_no_end_are_refused_and_data_without_ends_warned_of(data, tmp_path):
    # The documents of the small data set end anywhere; id 0 occurs within them.
    inputs = planned(data, *RESETS)
    assert any("does not end with the end-of-document token 0" in line for line in inputs.data.manifest.warnings)
    assert '"reset_attention_mask": true' in plan_text(inputs)
    assert not any("end-of-document" in line for line in planned(data).data.manifest.warnings)
    (tmp_path / "list").write_text(f"1.0 {data.parent}/domain0_train 1.0 {data.parent}/domain1_train")
    with pytest.raises(ConfigError) as error:
        planned(tmp_path / "list", "--vocab-size", "61", *RESETS)
    assert [fault.subject for fault in error.value.faults] == RESETS
