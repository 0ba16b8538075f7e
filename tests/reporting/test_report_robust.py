"""What a report says of runs that cannot be compared, and of files that are damaged: an answer or one message.

Run alone: python -m pytest tests/reporting/test_report_robust.py
"""

from __future__ import annotations

import json

import pytest

from megatron_doremi.errors import ConfigError
from megatron_doremi.reporting.comparison import compare, list_runs
from megatron_doremi.reporting.console import console_text
from megatron_doremi.reporting.differences import differences, similar_names_note
from megatron_doremi.reporting.groups import Group
from megatron_doremi.reporting.runs import read_run, read_runs
from megatron_doremi.reporting.sections import unique_labels
from megatron_doremi.reporting.verdict import verdict

NAMES = ("code", "noise", "boilerplate")


def config(**changes):
    """config.json as the program writes it, as far as a comparison reads it."""
    entry = {
        "phase": "main",
        "gpt": {"num_layers": 2, "hidden_size": 64, "vocab_size": 1000},
        "tokenizer_sha256": "a" * 64,
        "data_fingerprint": "b" * 64,
        "held_out_content": "c" * 64,
        "identity": {"seq_length": 7},
        "settings": {"data": {"seq_length": 64}, "optimizer": {"bf16": False}},
    }
    return {**entry, **changes}


def evaluated(iteration, windows=(5, 5, 5), losses=(2.0, 5.0, 1.0)):
    line = {"iteration": iteration, "eval": dict(zip(NAMES, losses, strict=True)), "eval_token_mean": 2.0}
    return {**line, "eval_windows": dict(zip(NAMES, windows, strict=True))}


def evaluation_line(run, iteration, of_own_folder, **changes):
    line = {
        "format": "megatron-doremi-evaluation/1",
        "run": str(run),
        "of_this_folder": of_own_folder,
        "checkpoint": f"iter_{iteration:07d}",
        **evaluated(iteration),
        "seq_length": 64,
        "held_out_content": "c" * 64,
        "bf16": False,
    }
    return json.dumps({**line, **changes}) + "\n"


def test_every_difference_between_compared_runs_is_reported(write_run):
    wide = {"num_layers": 2, "hidden_size": 128, "vocab_size": 1000}
    longer = {"data": {"seq_length": 128}, "optimizer": {"bf16": False}}
    baseline = read_run(write_run("b", [evaluated(2)], config=config()))
    changed = config(gpt=wide, settings=longer, data_fingerprint="d" * 64)
    main = read_run(write_run("m", [evaluated(2, (5, 9, 5))], config=changed))
    study = compare([Group("main", (main,)), Group("baseline", (baseline,))])
    for sentence in (
        "The runs differ in hidden_size: main 128, baseline 64.",
        "The runs differ in sequence length: main 128, baseline 64. Their held-out losses cannot be compared.",
        "The runs differ in data fingerprint: main dddddddddddd..., baseline bbbbbbbbbbbb....",
        "The runs differ in held-out windows: main noise 9, baseline noise 5. Their held-out losses",
    ):
        assert any(note.startswith(sentence) for note in study.notes)
    assert verdict(study) == (
        "main and baseline cannot be compared, since they differ in sequence length and held-out windows."
    )


def shown(*folders):
    """What the console says of runs side by side, in one line."""
    runs = [run for folder in folders for run in read_runs(folder)]
    return " ".join(console_text(list_runs([Group(run.path.name, (run,)) for run in runs])).split())


def test_a_report_on_several_runs_lists_the_differences_too(write_run):
    paths = [write_run(name, [evaluated(2, losses=(x, x, x))], config=config()) for name, x in (("a", 1.0), ("b", 2.0))]
    longer = {"data": {"seq_length": 128}, "optimizer": {"bf16": True}}
    text = shown(*paths, write_run("c", [evaluated(2)], config=config(settings=longer)))
    assert "The runs differ in sequence length: a 64, b 64, c 128. Their held-out losses cannot be compared." in text
    assert "The runs differ in bfloat16: a False, b False, c True." in text
    started = {"data": {"seq_length": 64}, "run": {"init_from": "llama"}}, {"run": {"init_from": ""}}
    paths = [write_run(f"i{n}", [evaluated(2)], config=config(settings=each)) for n, each in enumerate(started)]
    assert "The runs differ in initial weights: i0 llama, i1 none." in shown(*paths)


def test_what_an_older_run_did_not_record_is_no_difference(write_run):
    runs = {"new": read_run(write_run("n", [evaluated(2)], config=config()))}
    runs["old"] = read_run(write_run("o", [{"iteration": 2, "eval": {"code": 1.0}}]))
    assert differences(runs) == ()
    # A field of the model's shape that did not exist yet has its default.
    for normalization, values in (("RMSNorm", {}), ("LayerNorm", {"new": "RMSNorm", "later": "LayerNorm"})):
        shape = {**config()["gpt"], "normalization": normalization}
        later = read_run(write_run(normalization, [evaluated(2)], config=config(gpt=shape)))
        differing = {
            difference.name: difference.values for difference in differences({"new": runs["new"], "later": later})
        }
        assert differing == ({"normalization": values} if values else {})


@pytest.mark.parametrize(("style", "names"), [("constant", set()), ("linear", {"min_lr"})])
def test_what_nothing_reads_is_no_difference(style, names, write_run):
    runs = {}
    for end in (1e-5, 1e-4):
        settings = {**config()["settings"], "optimizer": {"lr_decay_style": style, "min_lr": end}}
        runs[f"to {end}"] = read_run(write_run(f"to {end}", [evaluated(2)], config=config(settings=settings)))
    assert {each.name for each in differences(runs)} == names


def test_similar_names_are_reported():
    assert similar_names_note(["Code", "code", "web", "w eb", "law"]) == (
        "Domain names that differ only by case or spaces: 'Code', 'code', 'web', 'w eb'."
    )
    assert similar_names_note(["code", "law"]) is None
    # Files of two runs must not be one file where case does not count.
    assert unique_labels(["Run", "run"]) == ["Run", "run-2"]


def test_evaluations_of_several_runs(write_run):
    """A run's own after training counts before what training wrote; others stand beside it; torn lines are left out."""
    path = write_run("r", [evaluated(2), {"iteration": 2, "loss": 3.0}], config=config())
    lines = evaluation_line(path, 2, True, eval=dict.fromkeys(NAMES, 1.5)) + '{"torn\n'
    lines += evaluation_line("/other/x", 4, False) + evaluation_line("/other/x", 8, False)
    (path / "evaluations.jsonl").write_text(lines)
    self_evaluated, other = read_runs(path)
    assert [each.nats.uniform_mean for each in self_evaluated.evaluations] == [1.5]
    assert (str(other.path), [each.iteration for each in other.evaluations]) == ("/other/x", [4, 8])
    assert read_run(path).path == path
    assert "x @8" in shown(path)
    # The text of the evaluation that counts: the last line of the newest step.
    assert self_evaluated.config["held_out_content"] == "c" * 64
    with (path / "evaluations.jsonl").open("a") as file:
        file.write(evaluation_line("/other/x", 8, False, held_out_content="d" * 64, seq_length=32))
        file.write(evaluation_line(path, 1, True, held_out_content="e" * 64))
    self_evaluated, other = read_runs(path)
    assert self_evaluated.config["held_out_content"] == "c" * 64
    assert (other.config["held_out_content"], other.config["seq_length"]) == ("d" * 64, 32)


def test_a_folder_of_evaluations_alone(tmp_path):
    (tmp_path / "evaluations.jsonl").write_text(evaluation_line("/a/x", 4, False))
    assert read_run(tmp_path).evaluations[0].windows == dict.fromkeys(NAMES, 5)
    with (tmp_path / "evaluations.jsonl").open("a") as file:
        file.write(evaluation_line("/b/y", 6, False, seq_length=32))
    with pytest.raises(ConfigError, match="must be of one run"):
        read_run(tmp_path)
    assert "The runs differ in sequence length: x 64, y 32." in shown(tmp_path)


def test_a_model_from_elsewhere_has_no_step(tmp_path):
    """Beside a run with steps, and beside its like."""
    path = tmp_path / "evaluations.jsonl"
    path.write_text(evaluation_line("/hf/llama", 0, False) + evaluation_line("/a/x", 4, False))
    assert "domain llama x @4" in " ".join(shown(tmp_path).split())
    path.write_text(evaluation_line("/hf/llama", 0, False) + evaluation_line("/hf/olmo", 0, False))
    assert "Held-out loss in nats per token; lower is better" in " ".join(shown(tmp_path).split())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "megatron-doremi-evaluation/2"}, "newer version"),
        ({"iteration": -1}, "greater than or equal to 0"),
        ({"eval": {"code": float("nan")}}, "finite number"),
        ({"eval_windows": {"code": "5"}}, "valid integer"),
    ],
)
def test_a_wrong_evaluation_is_named_with_its_line(tmp_path, changes, message):
    wrong = json.loads(evaluation_line("/a/x", 4, False)) | changes
    (tmp_path / "evaluations.jsonl").write_text(evaluation_line("/a/x", 4, False) + json.dumps(wrong) + "\n")
    with pytest.raises(ConfigError, match=message) as caught:
        read_run(tmp_path)
    assert "line 2" in str(caught.value)


# Each line replaces the second of a proxy's metrics.jsonl.
LINES = {
    "iteration 1e23": '{"iteration": 1e23, "loss": 1.0}',
    "iteration of 24 digits": '{"iteration": 100000000000000000000000, "loss": 1.0}',
    "infinite iteration": '{"iteration": Infinity, "loss": 1.0}',
    "iteration true": '{"iteration": true, "loss": 1.0}',
    "negative iteration": '{"iteration": -3, "loss": 1.0}',
    "400 digits": '{"iteration": 2, "loss": 1' + "0" * 400 + "}",
    "400 digits in a domain": '{"iteration": 2, "loss": 1.0, "domain_loss": {"a": 1' + "0" * 400 + "}}",
    "5000 digits": '{"iteration": 2, "loss": 1' + "0" * 5000 + "}",
    "text": '{"iteration": 2, "loss": "1.0"}',
    "list": '{"iteration": 2, "loss": 1.0, "domain_weights": [1]}',
    "deep": '{"iteration": 2, "loss": ' + "[" * 100000 + "]" * 100000 + "}",
    "windows": '{"iteration": 2, "eval": {"a": 1.0}, "eval_windows": {"a": Infinity}}',
}


@pytest.mark.parametrize("line", LINES)
def test_a_line_that_holds_no_numbers_is_one_message(line, write_run):
    tail = LINES[line] + '\n{"iteration": 3, "loss": 1.0}\n'
    with pytest.raises(ConfigError, match=r"metrics\.jsonl, line 2") as caught:
        read_run(write_run("r", [{"iteration": 1, "loss": 1.0}], tail=tail))
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("text", ["[" * 100000, '{"a": ' * 900 + "1" + "}" * 900, "[]", '{"a": 1' + "0" * 5000 + "}"])
def test_a_config_that_is_not_an_object_is_one_message(text, write_run):
    path = write_run("r", [{"iteration": 1, "loss": 1.0}])
    (path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json") as caught:
        read_run(path)
    assert len(caught.value.faults) == 1


@pytest.mark.parametrize(
    "weights", [{"a": 0.0, "b": 0.0}, {"a": float("nan"), "b": 1.0}, {"a": "1"}, {"a": -1.0, "b": 2.0}]
)
def test_invalid_weights_are_one_message(weights, write_run, rows):
    path = write_run("p", [rows[0](1, {"a": 0.5, "b": 0.5})], "proxy", weights=weights)
    with pytest.raises(ConfigError, match=r"domain_weights\.json"):
        read_run(path)
