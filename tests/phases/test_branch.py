"""--load DIR@STEP branches a run, also under another mixture, and no window is repeated or skipped.

Run alone: python -m pytest tests/phases/test_branch.py
"""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from phases.small import MODEL, metrics, read_by, train, training_lines
from ranks import run_program

from megatron_doremi.arguments import parse_config
from megatron_doremi.data.blend import BlendState
from megatron_doremi.errors import ConfigError
from megatron_doremi.parallel.topology import Topology
from megatron_doremi.phases.inputs import open_inputs, plan_text
from megatron_doremi.phases.load_target import checkpoint_to_resume
from megatron_doremi.version import versions

pytestmark = pytest.mark.slow
FLAGS = ["--log-interval", "1", "--domain-weights", "natural"]


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """A main run of 8 steps with checkpoints of steps 2, 4, 6 and 8."""
    folder = tmp_path_factory.mktemp("run") / "main"
    train(1, "main", data, folder, 8, *FLAGS, "--save-interval", "2")
    config = json.loads((folder / "config.json").read_text())
    assert config["versions"] == versions()
    return folder


def planned(data, *extra, phase="main"):
    base = ["--phase", phase, "--domains", str(data), "--train-iters", "8", *MODEL, "--dry-run"]
    return open_inputs(parse_config([*read_by(phase, base), *extra], 1), Topology())


def test_an_unchanged_branch_takes_the_same_steps_and_resumes_as_itself(run, data, tmp_path):
    branch = tmp_path / "branch"
    flags = [*FLAGS, "--load", f"{run}@4"]
    train(1, "main", data, branch, 8, *flags, "--exit-interval", "6")
    assert (branch / "checkpoints" / "iter_0000006").is_dir()
    # The same command again resumes the branch, not the run.
    lines = train(1, "main", data, branch, 8, *flags)
    assert training_lines(lines) == training_lines(metrics(run))[4:]
    state = json.loads((branch / "checkpoints" / "iter_0000008" / "state.json").read_text())
    assert state["overrides"] == [{"iteration": 4, "name": "branch", "before": str(run), "now": str(branch)}]
    # The branch is not resumed in the name of another run with a checkpoint of that step.
    shutil.copytree(run, tmp_path / "twin")
    with pytest.raises(ConfigError, match="holds another run"):
        planned(data, "--save", str(branch), *FLAGS, "--load", f"{tmp_path / 'twin'}@4")
    # What it branched from is unchanged.
    assert len(training_lines(metrics(run))) == 8
    assert (
        "finished: all 8 steps were taken; the same command takes no step"
        in plan_text(planned(data, "--save", str(branch), *flags)).splitlines()
    )


@pytest.mark.parametrize(
    "flags", [["--domain-weights", "domain 0=1,domain 1=1,domain 2=0"], ["--exclude-domains", "domain 2"]]
)
def test_a_branch_keeps_the_domains_of_its_run(run, data, tmp_path, flags):
    argv = ["--save", str(tmp_path), "--load", f"{run}@4", "--change-domain-weights", *FLAGS, *flags]
    with pytest.raises(ConfigError) as error:
        planned(data, *argv)
    (fault,) = error.value.faults
    assert fault.value == "domains: without 'domain 2'"
    assert "1e-6" in fault.remedy


def test_a_branch_under_other_weights_repeats_and_skips_no_window(run, data, tmp_path):
    """Annealing: from step 4 on uniform weights; a window is read again only when its domain's epoch is over."""
    branch = tmp_path / "branch"
    weights = ["--domain-weights", "domain 0=1,domain 1=1,domain 2=1", "--log-interval", "1"]
    with pytest.raises(AssertionError, match="--change-domain-weights"):
        train(1, "main", data, branch, 30, *weights, "--load", f"{run}@4")
    assert not (branch / "checkpoints").exists() or not list((branch / "checkpoints").iterdir())
    flags = [*weights, "--load", f"{run}@4", "--change-domain-weights"]
    train(1, "main", data, branch, 30, *flags, "--exit-interval", "15")
    lines = training_lines(train(1, "main", data, branch, 30, *flags))
    assert [line["iteration"] for line in lines] == [*range(5, 31)]
    # By hand: the blend's own steps under natural, then uniform weights.
    inputs = planned(data, "--save", str(tmp_path / "none"), *FLAGS)
    blend, state, read = inputs.plan.blend, BlendState.start(3), [set(), set(), set()]
    for step in range(1, 31):
        sampling = inputs.plan.sampling_weights if step <= 4 else np.full(3, 1 / 3)
        batch, state = blend.next_batch(state, sampling)
        for domain, window in zip(batch.domains.tolist(), batch.windows.tolist(), strict=True):
            read[domain].add(window)
        if step > 4:
            tokens = lines[step - 5]["domain_tokens"]
            counts = np.bincount(batch.domains, minlength=3) * 16
            assert [tokens.get(f"domain {i}", 0) for i in range(3)] == counts.tolist()
    saved = json.loads((branch / "checkpoints" / "iter_0000030" / "state.json").read_text())
    assert saved["blend"]["cursors"] == {f"domain {i}": int(count) for i, count in enumerate(state.cursors)}
    assert [len(each) for each in read] == np.minimum(state.cursors, inputs.plan.window_counts).tolist()
    assert [change["name"] for change in saved["overrides"]] == ["branch", "sampling_weights", "train_iters"]


def test_steps_and_folders_that_do_not_fit_are_refused(run, data, tmp_path):
    def refused(*flags):
        with pytest.raises(ConfigError) as error:
            planned(data, *FLAGS, *flags)
        return str(error.value)

    text = refused("--save", str(tmp_path / "new"), "--load", f"{run}@5")
    assert "no checkpoint of step 5" in text
    assert "2, 4, 6, 8" in text
    with pytest.raises(AssertionError, match="no checkpoint of step 5"):
        train(1, "main", data, tmp_path / "new", 8, *FLAGS, "--load", f"{run}@5")
    assert not (tmp_path / "new").exists()
    assert "there is none" in refused("--save", str(tmp_path / "new"), "--load", f"{tmp_path}/nowhere@5")
    text = refused("--save", str(run), "--load", f"{run}@4")
    assert "iter_0000008" in text
    assert f"--load {run} to resume" in text
    assert "finished: all 8 steps were taken; the same command takes no step" in plan_text(
        planned(data, *FLAGS, "--save", str(run), "--load", f"{run}@8")
    )
    assert "--load " + str(run) + "@STEP to branch" in refused("--save", str(tmp_path / "new"), "--load", str(run))
    shutil.copytree(run, tmp_path / "other")
    assert "holds another run" in refused("--save", str(tmp_path / "other"), "--load", f"{run}@4")
    assert "train the run first" in refused("--save", str(tmp_path / "new"), "--load", f"{tmp_path}/nowhere@5")
    # A folder whose own name ends like a step.
    shutil.copytree(run, tmp_path / "run@4")
    config = parse_config(["--phase", "evaluate", "--domains", str(data), "--load", str(tmp_path / "run@4")], 1)
    assert (config.run.load_folder, config.run.load_step) == (str(tmp_path / "run@4"), None)


def test_an_evaluation_loads_the_step(run, data, tmp_path):
    argv = ["--phase", "evaluate", "--domains", str(data), "--save", str(tmp_path), *read_by("evaluate", MODEL)]
    for load in (f"{run}@4", str(run)):
        run_program(1, [*argv, "--load", load])
    lines = [json.loads(line) for line in (tmp_path / "evaluations.jsonl").read_text().splitlines()]
    assert [(line["checkpoint"], line["iteration"]) for line in lines] == [("iter_0000004", 4), ("iter_0000008", 8)]
    assert [line["run"] for line in lines] == [str(run)] * 2
    assert lines[0]["eval"] != lines[1]["eval"]
    with pytest.raises(ConfigError, match="no checkpoint of step 3"):
        planned(data, "--load", f"{run}@3", phase="evaluate")


def test_a_reference_of_an_earlier_step(run, data):
    """The step says that the run need not be finished."""
    for phase in ("score", "proxy"):
        inputs = planned(data, "--save", "s", "--reference-load", f"{run}@4", phase=phase)
        assert inputs.loaded.files == run / "checkpoints" / "iter_0000004" / "weights"
        with pytest.raises(ConfigError, match=r"--reference-load .*@5: no checkpoint of step 5\n.* 2, 4, 6, 8\n"):
            planned(data, "--save", "s", "--reference-load", f"{run}@5", phase=phase)
    argv = ["--phase", "score", "--domains", str(data), "--save", "s", "--reference-load", "nowhere@4"]
    config = parse_config(argv, 1)
    with pytest.raises(ConfigError, match="--reference-load nowhere: no such folder"):
        open_inputs(config, Topology())


def test_a_dry_run_checks_the_folders_of_the_run(run, data, tmp_path):
    def refused(*flags):
        with pytest.raises(ConfigError) as error:
            planned(data, *FLAGS, *flags)
        return str(error.value)

    resumes = ["--save", str(run), "--load", str(run)]
    assert "finished: all 8 steps were taken; the same command takes no step" in plan_text(
        planned(data, *FLAGS, *resumes)
    )
    branches = ["--save", str(tmp_path / "new"), "--load", f"{run}@6"]
    assert f"resume: from iteration 6 of 8, branched from {run}" in plan_text(planned(data, *FLAGS, *branches))
    assert "seed was 11" in refused(*resumes, "--seed", "12")
    assert "holds a run" in refused("--save", str(run))
    (tmp_path / "file").write_text("")
    assert "is not a folder" in refused("--save", str(tmp_path / "file" / "run"))
    assert checkpoint_to_resume(planned(data, "--save", str(tmp_path / "new")).plan.config.run, print) is None
    assert not (tmp_path / "new").exists()
