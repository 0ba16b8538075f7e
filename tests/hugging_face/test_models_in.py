"""Runs of pretrain_doremi.py that load a Hugging Face folder: to start from, as a reference, to score, to evaluate.

Run alone: python -m pytest tests/hugging_face/test_models_in.py
"""

from __future__ import annotations

import json
import sys

import pytest
from hugging_face.test_convert_tool import write_text_data
from phases.small import MODEL, evaluation_figures, full_weights, metrics, train, training_lines
from ranks import run_program, unwrapped

from megatron_doremi.arguments import parse_config
from megatron_doremi.errors import ConfigError
from megatron_doremi.parallel.topology import Topology
from megatron_doremi.phases.inputs import open_inputs, plan_text, start_text
from tools import convert_checkpoint

pytestmark = pytest.mark.slow
DATA_FLAGS = ["--seq-length", "16", "--micro-batch-size", "2", "--global-batch-size", "8", "--seed", "11"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(manifest, a finished run, the same model as a Hugging Face folder, and as a model folder)"""
    folder = tmp_path_factory.mktemp("models")
    data = write_text_data(folder)
    train(1, "reference", data, folder / "run", 6)
    argv = sys.argv
    for to, source, out in (("hf", "run", "hf"), ("native", "hf", "native")):
        sys.argv = ["convert_checkpoint.py", "--to", to, str(folder / source), str(folder / out)]
        assert convert_checkpoint.main() == 0
    sys.argv = argv
    return data, folder / "run", folder / "hf", folder / "native"


def config_of(*words, world=1):
    return parse_config([str(word) for word in words], world)


def faults_of(*words, world=1):
    """The message of a start that is refused, by its settings or by its files."""
    with pytest.raises(ConfigError) as error:
        open_inputs(config_of(*words, world=world), Topology(tensor_size=world))
    return str(error.value)


def start(world, data, save, source, *extra, steps=3):
    argv = ["--phase", "main", "--domains", data, "--save", save, "--train-iters", steps, "--init-from", source]
    run_program(world, [str(word) for word in [*argv, *DATA_FLAGS, "--lr", "1e-3", *extra]])
    return metrics(save)


def test_a_run_starts_from_the_weights_wherever_they_are(models, tmp_path):
    """A step of no length leaves the held-out loss of the model; every form of it trains to the same bits."""
    data, run, *others = models
    still = start(1, data, tmp_path / "still", run, "--lr", "1e-30", "--min-lr", "1e-30", steps=1)
    before = evaluation_figures(metrics(run)[-1])
    assert evaluation_figures(still[-1]) == pytest.approx(before, abs=1e-12)
    first = start(1, data, tmp_path / "run", run)
    for source in others:
        lines = start(1, data, tmp_path / source.name, source)
        assert training_lines(lines) == training_lines(first)


@pytest.fixture(scope="module")
def alone(models, tmp_path_factory):
    """Training lines of a start on one process, by whether it is in bfloat16."""
    folder = tmp_path_factory.mktemp("alone")
    flags = {False: [], True: ["--bf16", "--zero-stage", "1"]}
    return {bf16: training_lines(start(1, models[0], folder / str(bf16), models[2], *flags[bf16])) for bf16 in flags}


@pytest.mark.parametrize(
    "flags",
    [
        "--tensor-model-parallel-size 2 --sequence-parallel",
        "--pipeline-model-parallel-size 2",
        "--zero-stage 1 --bf16",
        "--zero-stage 3",
    ],
)
def test_any_layout_starts_from_a_folder(models, alone, tmp_path, flags):
    """The master weights start from the model as well: with bfloat16, the update of step 2 would show it."""
    data, _, folder, _ = models
    bf16 = "--bf16" in flags
    spread = start(2, data, tmp_path / "spread", folder, *flags.split())
    for one, other in zip(alone[bf16], training_lines(spread), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=2e-3 if bf16 else 1e-5)
    if bf16:
        # The weights that were written are the rounded master weights, which moved by about the learning rate.
        checkpoint = "checkpoints/iter_0000003"
        for name, value in full_weights(tmp_path / "spread" / checkpoint).items():
            origin = full_weights(models[1] / "checkpoints/iter_0000006")[name]
            assert (value.float() - origin).abs().max() < 0.02, name


def test_a_requeued_start_resumes_bit_for_bit(models, tmp_path):
    data, _, folder, _ = models
    whole = start(1, data, tmp_path / "whole", folder, steps=4)
    again = ["--load", str(tmp_path / "parts")]
    start(1, data, tmp_path / "parts", folder, *again, "--exit-interval", "2", steps=4)
    parts = start(1, data, tmp_path / "parts", folder, *again, steps=4)
    assert training_lines(parts) == training_lines(whole)


def test_a_proxy_learns_the_same_weights_against_the_folder(models, tmp_path):
    data, *sources = models
    weights = []
    for number, source in enumerate(sources):
        save = tmp_path / str(number)
        train(1, "proxy", data, save, 4, "--reference-load", str(source))
        weights.append(json.loads((save / "domain_weights.json").read_text())["weights"])
    assert weights[0] == weights[1] == weights[2]
    assert max(weights[0].values()) > 0.5001


def test_scoring_and_evaluating_a_folder(models, tmp_path):
    from safetensors.torch import load_file

    data, run, folder, _ = models
    for source, name in ((run, "run"), (folder, "hf")):
        words = ["--domains", str(data), "--seq-length", "16", "--micro-batch-size", "2"]
        scoring = ["--phase", "score", "--reference-load", str(source), "--save", str(tmp_path / f"{name}-losses")]
        run_program(1, [*scoring, *words])
        run_program(2, ["--phase", "evaluate", "--load", str(source), "--save", str(tmp_path / name), *words])
    lines = [json.loads((tmp_path / name / "evaluations.jsonl").read_text()) for name in ("run", "hf")]
    assert evaluation_figures(lines[0]) == evaluation_figures(lines[1])
    assert (lines[1]["run"], lines[1]["checkpoint"]) == (str(folder), folder.name)
    files = sorted((tmp_path / "run-losses").rglob("*.safetensors"))
    assert files
    for path in files:
        ours, theirs = load_file(path), load_file(str(path).replace("run-losses", "hf-losses"))
        assert all((ours[key] == theirs[key]).all() for key in ours)


def test_what_does_not_fit_is_refused(models, tmp_path):
    data, run, folder, _ = models
    base = ["--phase", "main", "--domains", data, "--save", tmp_path / "out", "--train-iters", 1, *DATA_FLAGS]
    wider = ["--num-layers", "2", "--hidden-size", "64", "--num-attention-heads", "4"]
    assert "hidden_size 64" in faults_of(*base, "--init-from", folder, *wider)
    assert "no such folder" in faults_of(*base, "--init-from", tmp_path / "none")
    assert "leave out @STEP" in faults_of(*base, "--init-from", f"{folder}@3")
    assert "one source of weights" in faults_of(*base, "--init-from", folder, "--load", f"{run}@6")
    three = faults_of(*base, "--init-from", folder, "--tensor-model-parallel-size", "3", world=3)
    assert "num_query_groups 2" in three
    assert "choose another layout" in three
    # A class that our GPT cannot express: one fault, and where the model can be used.
    other = tmp_path / "olmo2"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "olmo2"}')
    message = faults_of(*base, "--init-from", other)
    assert message.startswith("1 fault")
    assert "where Transformers may run it: --phase score, --phase evaluate, --reference-load" in unwrapped(message)
    # The same vocabulary under other ids.
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in folder.iterdir():
        (moved / path.name).write_bytes(path.read_bytes())
    definition = json.loads((moved / "tokenizer.json").read_text())
    vocab = definition["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (moved / "tokenizer.json").write_text(json.dumps(definition))
    message = faults_of("--phase", "evaluate", "--load", moved, "--domains", data, "--seq-length", "16")
    assert "another tokenizer: id" in message
    assert "in place of 'a'" in message


def test_a_dry_run_plans_a_start_from_a_model(models, tmp_path):
    data, _, folder, _ = models
    words = ["--phase", "main", "--domains", data, "--save", tmp_path / "out", "--train-iters", 2, *DATA_FLAGS]
    inputs = open_inputs(config_of(*words, "--init-from", folder, "--dry-run"), Topology())
    assert (inputs.plan.gpt.num_layers, inputs.plan.gpt.vocab_size, inputs.plan.gpt.max_positions) == (2, 300, 16)
    assert f"weights at step 0: those of {folder}" in plan_text(inputs)
    assert f"weights at step 0: those of {folder}" in start_text(inputs, "CPU")
    later = [*words, "--init-from", tmp_path / "later", "--dry-run"]
    assert "give its model flags" in faults_of(*later)
    assert open_inputs(config_of(*later, *MODEL[:10]), Topology()).initial is not None
