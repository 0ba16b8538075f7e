"""Domains that the user leaves out, and the lines and faults about them.

Run alone: python -m pytest tests/phases/test_selected_domains.py
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from phases.small import MODEL, read_by

from megatron_doremi.arguments import parse_config
from megatron_doremi.errors import ConfigError
from megatron_doremi.parallel.topology import Topology
from megatron_doremi.phases.inputs import open_inputs


def opened(data, *extra, phase="main"):
    base = ["--phase", phase, "--domains", str(data), "--save", "unused", "--train-iters", "5", "--dry-run"]
    return open_inputs(parse_config([*read_by(phase, [*base, *MODEL]), *extra], 1), Topology())


def test_a_reference_of_another_kind_or_shape_is_warned_of(data, reference, tmp_path):
    """A proxy as a reference, and another width; a reference of the proxy's shape gets no line."""
    assert opened(data, *reference, phase="proxy").data.manifest.warnings == ()
    (line,) = opened(data, *reference, "--ffn-hidden-size", "96", phase="proxy").data.manifest.warnings
    assert "has another shape than the proxy, ffn_hidden_size 64 (proxy: 96)" in line
    run = Path(reference[1])
    shutil.copytree(run, tmp_path / "proxy")
    config = json.loads((run / "config.json").read_text())
    (tmp_path / "proxy" / "config.json").write_text(json.dumps({**config, "phase": "proxy"}))
    for phase in ("proxy", "score"):
        (line,) = opened(data, "--reference-load", str(tmp_path / "proxy"), phase=phase).data.manifest.warnings
        assert "is a proxy, which DRO trained" in line


def test_excluded_domains_are_not_read_and_not_part_of_the_data(data):
    everything, some = opened(data), opened(data, "--exclude-domains", "domain 1")
    assert some.plan.names == ("domain 0", "domain 2")
    assert some.plan.sampling_weights.tolist() == [0.25, 0.75]
    assert some.data.content != everything.data.content
    assert some.data.manifest.fingerprint() != everything.data.manifest.fingerprint()
    for phase, flags in (("main", ()), ("evaluate", ("--load", "x"))):
        with pytest.raises(ConfigError, match="did you mean 'domain 1'"):
            opened(data, "--exclude-domains", "domain1", *flags, phase=phase)


def test_a_weight_of_zero_leaves_a_domain_out_and_says_so(data, tmp_path):
    excluded = opened(data, "--exclude-domains", "domain 1", "--domain-weights", "domain 2=1,domain 0=3")
    path = tmp_path / "weights.json"
    path.write_text(json.dumps({"domain 0": 3, "domain 1": 0, "domain 2": 1}))
    for setting in (str(path), "domain 0=3,domain 1=0,domain 2=1"):
        inputs = opened(data, "--domain-weights", setting)
        assert inputs.plan.names == excluded.plan.names == ("domain 0", "domain 2")
        assert inputs.plan.sampling_weights.tolist() == excluded.plan.sampling_weights.tolist() == [0.75, 0.25]
        assert (inputs.data.content, inputs.data.held_out_content) == (
            excluded.data.content,
            excluded.data.held_out_content,
        )
        (line,) = inputs.data.manifest.warnings
        assert line == "--domain-weights: left out, because their weight is 0: 'domain 1'"


def test_what_is_missing_from_a_dropped_domain_is_no_fault(data, tmp_path):
    entry = json.loads(data.read_text())
    for domain in entry["domains"]:
        domain |= {split: str(data.parent / domain[split]) for split in ("train", "valid")}
    entry["domains"][1]["train"] = "nowhere"
    moved = tmp_path / "domains.json"
    moved.write_text(json.dumps({**entry, "tokenizer": None}))
    with pytest.raises(ConfigError, match="nowhere"):
        opened(moved, "--vocab-size", "61")
    assert len(opened(moved, "--vocab-size", "61", "--exclude-domains", "domain 1").plan.names) == 2
    weights = "domain 0=1,domain 1=0,domain 2=1"
    assert len(opened(moved, "--vocab-size", "61", "--domain-weights", weights).plan.names) == 2


def test_weights_of_other_programs_reach_the_plan_by_name(data, tmp_path):
    """Through the map of --domain-names, which the settings record; a table to come has a stand-in in a dry run."""
    table, names = tmp_path / "runs.csv", tmp_path / "names.json"
    table.write_text("index,zero,one,two\n1,1,0,0\n2,0.75,0.0,0.25\n")
    names.write_text(json.dumps({"zero": "domain 0", "one": "domain 1", "two": "domain 2"}))
    inputs = opened(data, "--domain-weights", f"{table}@2", "--domain-names", str(names))
    assert inputs.plan.names == ("domain 0", "domain 2")
    assert inputs.plan.sampling_weights.tolist() == [0.75, 0.25]
    assert inputs.plan.config.to_dict()["data"]["domain_names"] == str(names)
    to_come = opened(data, "--domain-weights", f"{tmp_path}/later.csv@2", "--domain-names", str(names)).to_come
    assert next(iter(to_come.values())).startswith(f"--domain-weights {tmp_path}/later.csv does not exist yet")
    for setting, path, words in (
        ("uniform", names, "weights by name in --domain-weights"),
        (f"{table}@2", tmp_path / "nowhere.json", "--domain-names"),
        (f"{table}@2", table, "a readable file that holds one JSON object"),
    ):
        with pytest.raises(ConfigError, match=words) as error:
            opened(data, "--domain-weights", setting, "--domain-names", str(path))
        assert len(error.value.faults) == 1


def test_windows_longer_than_a_model_has_seen_are_warned_of(data, reference, tmp_path):
    """A reference of windows of 16 tokens computes losses at later positions, which it never saw."""
    longer = ["--seq-length", "24"]
    (line,) = opened(data, *reference, *longer, phase="proxy").data.manifest.warnings
    assert "was made for windows of up to 16 tokens, and --seq-length is 24" in line
    assert line.endswith("give --seq-length 16")
    run = reference[1]
    assert line.startswith(f"--reference-load {run} ")
    flags = ["--phase", "evaluate", "--domains", str(data), "--load", run, "--dry-run"]
    (line,) = open_inputs(parse_config([*flags, *longer], 1), Topology()).data.manifest.warnings
    assert line.startswith(f"--load {run} was made for windows of up to 16 tokens")
    assert open_inputs(parse_config([*flags, "--seq-length", "8"], 1), Topology()).data.manifest.warnings == ()
