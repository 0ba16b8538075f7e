"""Flags: defaults, derived values, and a catalog of wrong ones with the message that a user gets.

Run alone: python -m pytest tests/test_arguments.py
"""

from __future__ import annotations

import json
import shlex

import pytest

from megatron_doremi.arguments import build_parser, parse_config
from megatron_doremi.config import (
    PAPER_SHAPES,
    data_parallel_size,
    gpt_config,
)
from megatron_doremi.errors import ConfigError
from megatron_doremi.plan import batch_sizes

GOOD = (
    "--phase main --domains d.json --save out --train-iters 10 --num-layers 4 --hidden-size 64 --num-attention-heads 4"
)


def parse(extra: str = "", world_size: int = 1, base: str = GOOD):
    return parse_config(shlex.split(f"{base} {extra}"), world_size)


def test_defaults_and_derived_sizes():
    config = parse("--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --micro-batch-size 3", 8)
    assert data_parallel_size(config.parallel, 8) == 2
    assert batch_sizes(config, 2) == (6, 1)
    gpt = gpt_config(config.model, 1024, 50_000)
    assert (gpt.ffn_hidden_size, gpt.kv_channels, gpt.num_query_groups) == (256, 16, 4)
    assert gpt.tied_embeddings
    assert json.loads(json.dumps(config.to_dict()))["data"]["train_iters"] == 10


def test_micro_batches():
    assert batch_sizes(parse("--global-batch-size 48 --micro-batch-size 4", 3), 3) == (48, 4)


@pytest.mark.parametrize("name", PAPER_SHAPES)
def test_paper_shapes(name):
    base = "--phase main --domains d.json --save out --train-iters 10"
    gpt = gpt_config(parse(f"--model-size {name}", base=base).model, 1024, 256_000)
    shape = (gpt.num_layers, gpt.num_attention_heads, gpt.kv_channels, gpt.hidden_size, gpt.ffn_hidden_size)
    assert shape == PAPER_SHAPES[name]


def test_what_the_deepspeed_launcher_adds_is_taken():
    assert parse("--local_rank=1").data.phase == "main"


def test_padding_fits_every_tensor_size():
    gpt = gpt_config(parse().model, 8, 1000)
    assert gpt.padded_vocab_size(1) == 1024
    assert gpt.padded_vocab_size(8) == 1024
    assert gpt.padded_vocab_size(3) == 1152


def test_help_names_every_flag():
    text = build_parser().format_help()
    for flag in ("--phase", "--model-size", "--doremi-step-size", "--zero-stage", "--keep-checkpoints"):
        assert flag in text


WRONG = {
    "--num-layers four": "a whole number",
    "--lr fast": "a finite number",
    "--lr nan": "a finite number",
    "--lr fast ": "1 fault in the input",
    "--phase training": "one of reference, score, proxy, main, evaluate",
    "--normalization BatchNorm": "one of RMSNorm, LayerNorm",
    "--zero-stage 4": "one of",
    "--num-layer 3": "did you mean --num-layers?",
    "--no-such-flag": "see --help",
    "stray": "each value follows its flag",
    "--num-layers": "expected one argument",
    "--model-size 280m": "in place of --num-layers, --hidden-size, --num-attention-heads",
    "--hidden-size 66": "multiple of --num-attention-heads 4",
    "--hidden-size -64": "not negative",
    "--num-query-groups 3": "multiple of --num-query-groups 3",
    "--kv-channels 7": "an even width",
    "--tensor-model-parallel-size 3": "multiple of --tensor-model-parallel-size 3",
    "--tensor-model-parallel-size 0": "at least 1",
    "--tensor-model-parallel-size 2": "a multiple of tensor x pipeline parallel = 2 x 1 = 2",
    "--pipeline-model-parallel-size 8": "at least --pipeline-model-parallel-size 8",
    "--ffn-hidden-size 63 --tensor-model-parallel-size 2": "--ffn-hidden-size: 63",
    "--micro-batch-size 0": "at least 1",
    "--global-batch-size 7 --micro-batch-size 2": "--micro-batch-size x data parallel = 2 x 1",
    "--global-batch-size -8": "not negative",
    "--seq-length 0": "at least 1",
    "--train-iters 0": "a number of steps",
    "--log-interval 0": "at least 1",
    "--save-interval -1": "not negative",
    "--min-lr 1": "between 0 and --lr",
    "--min-lr 0": "above 0 where the decay is exponential",
    "--lr 0": "above 0",
    "--lr-warmup-fraction 1.5": "between 0 and 1",
    "--adam-beta2 1": "at least 0, below 1",
    "--adam-eps 0": "above 0",
    "--clip-grad -1": "not negative",
    "--doremi-smoothing 1": "at least 0, below 1",
    "--doremi-step-size -1": "not negative",
    "--doremi-update sometimes": "one of alternating",
    "--make-vocab-size-divisible-by 0": "at least 1",
    "--phase proxy": "trained against a reference",
    "--phase evaluate": "an evaluation loads a trained run",
    "--zero-stage 2 --pipeline-model-parallel-size 2": "ZeRO 0 and 1 only",
    "--zero-stage 3 --pipeline-model-parallel-size 2": "ZeRO 0 and 1 only",
    "--bf16": "give --zero-stage 1",
    # Without --global-batch-size, which follows from the layout.
    "--dry-run --suggest-layout --sequence-parallel --device-memory-gib 80": "leave --sequence-parallel out",
    "--cpu-offload": "give --zero-stage 2 or 3",
    "--cpu-offload --zero-stage 1": "give --zero-stage 2 or 3",
    "--doremi-smoothing 0.1": "--doremi-smoothing: no effect in this phase",
    "--reference-load r": "this one is for score, proxy",
    "--shard 0": "this one is for score",
    "--phase evaluate --load r": "the model is that of --load",
    "--phase score --reference-load r": "--num-layers, --hidden-size, --num-attention-heads: no effect",
    "--phase evaluate --load r --seed 3": "--train-iters, --seed: no effect",
    "--phase proxy --reference-load r --reference-losses l": "--reference-load: has no effect",
    "--phase proxy --reference-load r --doremi-objective hardest": "hardest reads no reference",
    "--domain-weights unimax": "--max-epochs-per-domain: not given",
    "--phase score --reference-load r --max-epochs-per-domain 2": "only for --domain-weights unimax",
    "--num-layers 1000000000": "at most 10,000",
    "--seq-length 99999999999": "at most 16,777,216",
    "--distributed-timeout-minutes 1e12": "at most 43,200",
    "--exit-duration-in-mins 1e12": "at most 43,200",
    "--lr-warmup-iters 11": "at most --train-iters 10",
    "--muon-momentum 0.9": "--optimizer muon reads it",
    "--lr-wsd-decay-iters 3": "--lr-decay-style WSD reads it",
    "--lr-decay-style cosine --lr-wsd-decay-fraction 0.2": "--lr-decay-style WSD reads it",
    "--lr-decay-style WSD --lr-warmup-iters 4 --lr-wsd-decay-iters 7": "at most 6: --train-iters 10 less 4 steps",
    "--lr-decay-style constant --min-lr 1e-4": "--min-lr: has no effect",
    "--lr-warmup-iters 0": "for no warmup give --lr-warmup-fraction 0",
    "--position-embedding-type learned_absolute --rotary-base 500000": "--rotary-base: has no effect",
    "--sequence-parallel": "with --tensor-model-parallel-size 1",
    "--phase proxy --reference-load r --doremi-weighting resample --doremi-update alternating": "--doremi-update: has",
    "--phase proxy --reference-load r --doremi-weighting resample --doremi-normalization batch": "a plain loss",
    "--phase proxy --reference-load r --doremi-weighting resample --domain-weights natural": "from uniform ones",
    "--seed 9223372036854775808": "at most 9,223,372,036,854,775,807",
    "--load elsewhere": "give the same folder to --load and --save",
    "--sequence-parallel --tensor-model-parallel-size 2 --seq-length 5": "a multiple of --tensor-model-parallel-size 2",
}


@pytest.mark.parametrize("extra", WRONG)
def test_wrong_flags(extra):
    with pytest.raises(ConfigError) as caught:
        parse(extra)
    assert WRONG[extra] in str(caught.value)
    for fault in caught.value.faults:
        assert fault.subject
        assert fault.rule
        assert fault.remedy


# One flag's value makes the other one meaningless, or not given is not wrong.
RIGHT = (
    "--lr 1e-5 --lr-decay-style constant",
    "--lr-warmup-iters 0 --lr-warmup-fraction 0",
    "--rotary-base 500000",
    "--dry-run --suggest-layout --sequence-parallel --device-memory-gib 80 --dry-run-world-size 2",
    "--phase proxy --reference-load r --doremi-weighting resample --doremi-step-size 0.1",
)


@pytest.mark.parametrize("extra", RIGHT)
def test_what_is_no_fault(extra):
    assert parse(extra).data.seq_length == 1024


@pytest.mark.parametrize("extra", ["--tensor-model-parallel-size two --sequence-parallel", "--zero-stage 4 --bf16"])
def test_a_value_that_cannot_be_read_has_no_fault_of_its_default(extra):
    with pytest.raises(ConfigError) as caught:
        parse(extra)
    assert [fault.subject for fault in caught.value.faults] == [extra.split()[0]]


def test_all_faults_in_one_message():
    with pytest.raises(ConfigError) as caught:
        parse("--lr fast --num-layer 3 --seq-length 0 --zero-stage 2 --pipeline-model-parallel-size 2", 3)
    assert len(caught.value.faults) == 5
    assert str(caught.value).startswith("5 faults in the input:")


@pytest.mark.parametrize("left_out", ["--phase main", "--domains d.json", "--save out", "--num-layers 4"])
def test_what_is_required(left_out):
    with pytest.raises(ConfigError, match="not given"):
        parse(base=GOOD.replace(left_out, ""))


@pytest.mark.parametrize(
    ("extra", "ranks", "remedy"),
    [
        ("--tensor-model-parallel-size 2", 3, "start 2 or 4 processes, or give two sizes whose product is 1 or 3"),
        ("--global-batch-size 6 --micro-batch-size 3", 4, "give --global-batch-size 12, or start as many"),
        ("--global-batch-size 6 --micro-batch-size 3", 4, "data parallel size of 1 or 2"),
        ("--global-batch-size 12 --micro-batch-size 4", 4, "give --global-batch-size 16, or --micro-batch-size 3"),
        ("--global-batch-size 4", 8, "a step has fewer windows than the 8 replicas"),
        ("--sequence-parallel --tensor-model-parallel-size 2 --seq-length 5", 2, "give --seq-length 4 or 6"),
    ],
)
def test_a_layout_that_does_not_divide_names_sizes_that_do(extra, ranks, remedy):
    with pytest.raises(ConfigError) as caught:
        parse(extra, ranks)
    assert remedy in str(caught.value)
