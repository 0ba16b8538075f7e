"""Hugging Face models that our GPT cannot express, run by Transformers: scored, evaluated, the reference of a proxy.

Run alone: python -m pytest tests/hugging_face/test_by_transformers.py
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import sys
import tomllib

import numpy as np
import pytest
import torch
from hugging_face.test_convert_tool import write_text_data
from hugging_face.test_models_in import DATA_FLAGS, config_of, faults_of
from phases.small import MODEL, metrics, read_by, training_lines
from ranks import ROOT, on_ranks, program, run_program, unwrapped
from safetensors.torch import load_file, save_file

from megatron_doremi.data.manifest import load_manifest
from megatron_doremi.data.reference_loss_file import LossFile
from megatron_doremi.errors import ConfigError
from megatron_doremi.hugging_face import transformers_config
from megatron_doremi.hugging_face.config_file import NotExpressible
from megatron_doremi.hugging_face.inference import load_model
from megatron_doremi.hugging_face.model_folder import open_model
from megatron_doremi.hugging_face.transformers_model import load_by_transformers
from megatron_doremi.parallel.topology import Topology
from megatron_doremi.phases.inputs import open_inputs, plan_text, suggestion
from megatron_doremi.reporting.comparison import list_runs
from megatron_doremi.reporting.console import console_text
from megatron_doremi.reporting.groups import Group
from megatron_doremi.reporting.runs import read_runs
from megatron_doremi.reporting.study_tables import held_out_table
from megatron_doremi.tokenization.tokenizer import HUGGING_FACE, load_tokenizer
from tools import generate

CPU = torch.device("cpu")
SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": None,
}
LLAMA_SIZES = {**SIZES, "num_key_value_heads": 2, "intermediate_size": 64, "max_position_embeddings": 64}
# Norms after each layer; parallel layers and a bias of the output; no positions; experts; bounded logits.
CLASSES = {
    "olmo2": LLAMA_SIZES,
    "gptj": {**SIZES, "n_positions": 64, "rotary_dim": 4},
    "bloom": SIZES,
    "mixtral": {**LLAMA_SIZES, "num_local_experts": 4},
    "gemma2": {**LLAMA_SIZES, "head_dim": 8, "final_logit_softcapping": 2.0},
}


def save(folder, model_type, **changes):
    """A tiny random model of a class, saved by Transformers."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    torch.manual_seed(1)
    sizes = {**CLASSES.get(model_type, LLAMA_SIZES), **changes}
    kind = AutoModel if sizes.get("is_encoder_decoder") else AutoModelForCausalLM
    kind.from_config(AutoConfig.for_model(model_type, **sizes)).save_pretrained(folder)
    return folder


def plain_losses(folder, tokens, targets):
    """[batch, seq] losses in nats, float64: the class's own forward pass, and a log-softmax of all its logits."""
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folder)(tokens).logits
    return -logits.double().log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)


@pytest.mark.parametrize("model_type", CLASSES)
def test_losses_are_those_of_the_class(model_type, tmp_path):
    """Also in parts of the positions, each of which gets what the class does to its logits; roughly in bfloat16."""
    folder = save(tmp_path / "model", model_type)
    tokens, targets = torch.randint(0, 300, (2, 3, 17), generator=torch.Generator().manual_seed(2))
    expected = plain_losses(folder, tokens, targets)
    module = load_by_transformers(folder, torch.float32, CPU, 0)
    for module.loss_chunk_tokens in (0, 7, 1):
        losses = module.run(tokens, targets)
        assert losses.dtype == torch.float32
        assert (losses - expected).abs().max() < 1e-5, module.loss_chunk_tokens
    rounded = load_by_transformers(folder, torch.bfloat16, CPU, 7).run(tokens, targets)
    assert 0 < (rounded - expected).abs().mean() < 0.2


def test_a_model_that_our_gpt_expresses_has_the_same_losses(tmp_path):
    folder = save(tmp_path / "model", "llama")
    opened = open_model(folder, "--load")
    tokens, targets = torch.randint(0, 300, (2, 3, 17), generator=torch.Generator().manual_seed(2))
    ours = load_model(opened.gpt, opened.weights, CPU, torch.float32)(tokens, targets)
    theirs = load_by_transformers(folder, torch.float32, CPU, 7).run(tokens, targets)
    assert (ours - theirs).abs().max() < 1e-5


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(manifest, a folder of OLMo 2 with its tokenizer)"""
    return model_and_data(tmp_path_factory.mktemp("models"), "olmo2", 300)


def model_and_data(folder, model_type, vocab_size):
    """(manifest, a folder of a model with the manifest's tokenizer); the text is always the same."""
    data = write_text_data(folder, vocab_size=vocab_size)
    save(folder / model_type, model_type, vocab_size=vocab_size)
    shutil.copy(folder / "tokenizer.json", folder / model_type)
    return data, folder / model_type


def in_turn(launch, runs):
    """Runs of pretrain_doremi.py one after the other in the same processes, which import Transformers once."""
    for number, argv in enumerate(runs):
        program(dataclasses.replace(launch, rendezvous=f"{launch.rendezvous}{number}"), argv)


@pytest.mark.slow
def test_every_phase_that_trains_nothing_takes_it(models, tmp_path):
    """Against windows that the test reads itself; recorded losses have steps of 2^-11 nats."""
    data, folder = models
    words = ["--domains", str(data), "--seq-length", "16", "--micro-batch-size", "2", "--loss-chunk-tokens", "10"]
    scores, evaluations = tmp_path / "scores", tmp_path / "evaluations"
    proxy = ["--phase", "proxy", "--domains", str(data), "--train-iters", "4", *MODEL]
    (tmp_path / "other").mkdir()
    other_data, other = model_and_data(tmp_path / "other", "bloom", 265)
    evaluation = ["--phase", "evaluate", "--save", str(evaluations)]
    runs = (
        ["--phase", "score", "--reference-load", str(folder), "--save", str(scores), *words],
        [*evaluation, "--load", str(folder), *words],
        [*evaluation, "--load", str(other), "--domains", str(other_data), "--seq-length", "32"],
        [*proxy, "--reference-load", str(folder), "--save", str(tmp_path / "online")],
        [*proxy, "--reference-losses", str(scores), "--save", str(tmp_path / "recorded")],
    )
    on_ranks(2, in_turn, runs)
    line, other_line = map(json.loads, (evaluations / "evaluations.jsonl").read_text().splitlines())
    for number, domain in enumerate(load_manifest(data).domains):
        for split in ("train", "valid"):
            opened = load_manifest(data).open_train if split == "train" else load_manifest(data).open_held_out
            stream = opened(domain, 300)
            count = (stream.num_tokens - 1) // 16
            ids = torch.from_numpy(stream.tokens(0, 16 * count + 1).astype(np.int64))
            expected = plain_losses(folder, ids[:-1].view(count, 16), ids[1:].view(count, 16))
            if split == "valid":
                assert line["eval"][domain.name] == pytest.approx(float(expected.mean()), abs=1e-5)
                continue
            with LossFile.open(scores, number, 0, 16) as file:
                recorded = np.stack([file.losses(window) for window in range(count)])
            assert np.abs(recorded - expected.numpy()).max() < 2**-12 + 1e-5
    # Two models with different tokenizers on the same documents, in one table, as tools/report.py prints it.
    assert other_line["tokenizer_sha256"] != line["tokenizer_sha256"]
    assert other_line["held_out_text"] == line["held_out_text"]
    assert line["held_out_text"]["Code"]["documents"] == 12
    runs = read_runs(evaluations)
    table = held_out_table(study := list_runs([Group(run.path.name, (run,)) for run in runs]))
    assert [column.name for column in table.columns] == [
        "domain",
        *["olmo2", "95 % over documents"],
        *["bloom", "95 % over documents"],
    ]
    rows = {row[0]: row for row in table.rows}
    for name, (low, high) in other_line["eval_bpb_interval"].items():
        assert rows[name][3] == pytest.approx(other_line["eval_bpb"][name])
        assert rows[name][4] == f"[{low:.3f}, {high:.3f}]"
    said = " ".join(console_text(study).split())
    assert "The held-out text is the same (24 documents, " in said
    assert "bloom 32" in said
    assert "cannot be compared" not in said
    # A proxy against recorded losses, as in tests/phases/test_score.py.
    lines = [training_lines(metrics(tmp_path / name)) for name in ("online", "recorded")]
    assert len(lines[0]) == 4
    for online, recorded in zip(*lines, strict=True):
        assert recorded["domain_excess"] == pytest.approx(online["domain_excess"], abs=1e-4)
        assert recorded["domain_weights"] == pytest.approx(online["domain_weights"], abs=2e-4)
    identities = [
        json.loads((tmp_path / name / "config.json").read_text())["identity"] for name in ("online", "recorded")
    ]
    assert identities[0]["reference"] == identities[1]["reference"]


def changed_config(folder, out, **changes):
    """A copy of a model with other entries in its config.json."""
    shutil.copytree(folder, out)
    entry = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**entry, **changes}))
    return out


def test_the_run_says_so_and_config_json_is_part_of_the_model(models, tmp_path):
    data, folder = models
    words = ["--domains", data, "--save", tmp_path / "out", *DATA_FLAGS, "--train-iters", 2, "--dry-run"]
    proxy = ["--phase", "proxy", "--reference-load", folder, *words, *MODEL[:10]]
    inputs = open_inputs(config_of(*proxy), Topology())
    text = unwrapped(plan_text(inputs))
    assert "reference: Olmo2ForCausalLM, run by Transformers " in text
    assert "it normalizes the outputs" in text
    assert any("another model than the proxy" in line for line in inputs.data.manifest.warnings)
    # Only layouts without tensor and pipeline parallelism are suggested.
    layouts = [*proxy, "--suggest-layout", "--device-memory-gib", "80", "--dry-run-world-size", "4"]
    suggested = suggestion(open_inputs(config_of(*layouts, world=4), Topology(data_size=4)))
    assert "--tensor-model-parallel-size 1" in suggested
    assert "1: each rank holds all of Olmo2ForCausalLM" in unwrapped(suggested)
    layouts += ["--global-batch-size", "2", "--micro-batch-size", "1"]
    with pytest.raises(ConfigError, match=r"no layout of 4 ranks\n") as error:
        suggestion(open_inputs(config_of(*layouts, world=4), Topology(data_size=4)))
    assert "data 4: --global-batch-size 2 is not a multiple of 4" in str(error.value)
    scoring = ["--phase", "score", "--domains", data, "--save", tmp_path / "out", "--seq-length", "16", "--dry-run"]
    scored = open_inputs(config_of(*scoring, "--reference-load", folder), Topology())
    assert "model: Olmo2ForCausalLM, run by Transformers " in unwrapped(plan_text(scored))
    hashed = [path.name for path in scored.loaded.hashed_files()]
    assert hashed == ["model.safetensors", "config.json"]


def test_what_transformers_cannot_run_either_is_refused(models, tmp_path, monkeypatch):
    data, folder = models
    base = ["--phase", "evaluate", "--domains", data, "--seq-length", "16"]

    def refused(source, *extra, world=1):
        return unwrapped(faults_of(*base, "--load", source, *extra, world=world))

    assert "positions up to 64" in refused(folder, "--seq-length", "128")
    assert "give sizes of 1" in refused(folder, "--tensor-model-parallel-size", "2", world=2)
    assert "leave them out" in refused(folder, *MODEL[:6], "--dry-run")
    assert "leave out @STEP" in refused(f"{folder}@3")
    proxy = ["--phase", "proxy", "--domains", data, "--save", tmp_path / "p", "--train-iters", 1]
    split = [*proxy, *MODEL, "--reference-load", folder, "--tensor-model-parallel-size", "2"]
    assert "--reference-losses DIR" in unwrapped(faults_of(*split, world=2))
    window = save(tmp_path / "window", "mistral", sliding_window=64)
    shutil.copy(folder / "tokenizer.json", window)
    assert "positions up to 64" in refused(window, "--seq-length", "128")
    small = changed_config(folder, tmp_path / "small", vocab_size=200)
    assert "a vocabulary of 200" in refused(small)
    assert "quantization_config" in refused(changed_config(folder, tmp_path / "q", quantization_config={"bits": 4}))
    own = {"model_type": "unheard", "auto_map": {"AutoModelForCausalLM": "code.Model"}}
    assert "with code of its own (auto_map)" in refused(changed_config(folder, tmp_path / "own", **own))
    other = {"auto_map": {"AutoModelForCausalLM": "code.OtherForCausalLM"}}
    assert "model_type: 'olmo2', with code of its own" in refused(changed_config(folder, tmp_path / "other", **other))
    assert "is_encoder_decoder" in refused(changed_config(folder, tmp_path / "both", is_encoder_decoder=True))
    # Our GPT alone is trained and converted.
    start = ["--phase", "main", "--domains", data, "--save", tmp_path / "m", "--train-iters", 1, *DATA_FLAGS]
    assert "it normalizes the outputs" in faults_of(*start, "--init-from", folder)
    with pytest.raises(NotExpressible, match="it normalizes the outputs"):
        open_model(folder, "--to native")
    pickled = changed_config(folder, tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    assert "pickled" in refused(pickled)
    # Without Transformers: the class, why our GPT cannot express it, and what to install.
    monkeypatch.setattr(transformers_config, "installed_version", lambda: "")
    message = refused(folder)
    assert "model_type: 'olmo2' (it normalizes the outputs" in message
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["hf"]
    assert "; Transformers is not installed" in message
    assert f"pip install '{extra[0]}'" in message
    monkeypatch.setattr(transformers_config, "installed_version", lambda: "4.57.1")
    assert "Transformers 4.57.1 is installed" in refused(folder)
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "cannot be imported: import of transformers halted" in refused(folder)


def test_it_writes_text(models, monkeypatch, capsys):
    """tools/generate.py: the tokens that the class generates, as far as its own cache allows."""
    from transformers import AutoModelForCausalLM

    _, folder = models
    tokenizer = load_tokenizer(HUGGING_FACE, folder / "tokenizer.json")
    ids = tokenizer.encode("shumon tari").tolist()
    model = AutoModelForCausalLM.from_pretrained(folder)
    expected = model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0].tolist()
    words = ["--load", str(folder), "--prompt", "shumon tari", "--temperature", "0", "--max-new-tokens", "8"]
    monkeypatch.setattr(sys, "argv", ["generate.py", *words])
    assert generate.main() == 0
    assert capsys.readouterr().out == generate.shown_lines(tokenizer.decode(expected)) + "\n"


def test_files_of_another_class_are_refused(models, tmp_path):
    """Transformers would draw missing weights at random, and a bidirectional class would see each target."""
    _, folder = models
    deeper = changed_config(folder, tmp_path / "deeper", num_hidden_layers=3)
    shallow = changed_config(folder, tmp_path / "shallow", num_hidden_layers=1)
    wider = changed_config(folder, tmp_path / "wider", intermediate_size=96)
    cases = (
        (deeper, "missing: model.layers.2"),
        (shallow, "not of this class: model.layers.1"),
        (wider, "model.layers.0.mlp"),
        (save(tmp_path / "bert", "bert"), "BertLMHeadModel is not causal"),
    )
    for source, expected in cases:
        with pytest.raises(ConfigError) as error:
            load_by_transformers(source, torch.float32, CPU, 0)
        assert expected in str(error.value)


@pytest.mark.parametrize("phase", ["score", "proxy", "evaluate"])
def test_a_fault_that_shows_as_the_model_is_loaded_leaves_no_empty_folders(phase, models, tmp_path):
    """The lock alone stays: another start may be waiting for it."""
    data, folder = models
    deeper, out = changed_config(folder, tmp_path / "deeper", num_hidden_layers=3), tmp_path / "out" / phase
    flags = ["--load", str(deeper)] if phase == "evaluate" else ["--reference-load", str(deeper)]
    flags += ["--train-iters", "2"] if phase != "evaluate" else []
    argv = ["--phase", phase, "--domains", str(data), "--save", str(out), *flags]
    with pytest.raises(AssertionError, match=r"missing: model\.layers\.2"):
        run_program(1, read_by(phase, [*argv, *MODEL]))
    left = sorted(path.name for path in out.iterdir()) if out.exists() else []
    assert left == ([] if phase == "evaluate" else [".lock"])


def test_values_that_transformers_takes_and_we_do_not(models, tmp_path):
    """It reads integers as the parameters themselves, and answers wrong types with errors of its own kind."""
    data, folder = models
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    for number, changed in enumerate((tensors[name].to(torch.int8), tensors[name].to(torch.float8_e4m3fn))):
        other = changed_config(folder, tmp_path / str(number))
        save_file({**tensors, name: changed}, other / "model.safetensors", {"format": "pt"})
        assert f"{name}: {('I8', 'F8_E4M3')[number]}" in evaluation_faults(data, other)
    wrong = changed_config(folder, tmp_path / "wrong", rms_norm_eps="1e-5")
    assert "rms_norm_eps" in evaluation_faults(data, wrong)
    save_file({**tensors, name: tensors[name] * math.nan}, wrong / "model.safetensors", {"format": "pt"})
    (wrong / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(ConfigError, match="are NaN"):
        load_by_transformers(wrong, torch.float32, CPU, 0)
    huge = save(tmp_path / "huge", "llama")
    entry = json.loads((huge / "config.json").read_text())
    (huge / "config.json").write_text(json.dumps({**entry, "vocab_size": 2**62}))
    with pytest.raises(ConfigError, match="vocab_size: 4611686018427387904"):
        open_model(huge, "--load")


def evaluation_faults(data, source):
    return unwrapped(faults_of("--phase", "evaluate", "--domains", data, "--seq-length", "16", "--load", source))
