"""A catalog of wrong input: each mistake gives its message and exit code 2, without traceback or output files.

Run alone: python -m pytest tests/phases/test_catalog.py
"""

from __future__ import annotations

import json
import math
import shutil
import struct

import pytest
from phases.small import MODEL, read_by, train, write_data
from phases.wrong_input import Case, edit, patch, run_case, truncate
from ranks import run_program, unwrapped

from megatron_doremi.storage.formats import sealed

pytestmark = pytest.mark.slow

RUN = "--save @/main --load @/main"
PROXY = "--reference-load @/reference"
SCORED = "--reference-losses @/scores"
THIRDS = {"domain 0": 0.2, "domain 1": 0.3, "domain 2": 0.5}


def manifest(change):
    return lambda folder: edit(folder / "data" / "domains.json", change)


def weights(content):
    """Writes a weights file: text unchanged, anything else as JSON."""
    text = content if isinstance(content, str) else json.dumps(content)
    return lambda folder: (folder / "weights.json").write_text(text)


def index(at, data):
    """Overwrites bytes of an index: magic 9, version 8, type 1, sequences 8, documents 8; then lengths, offsets."""
    return lambda folder: patch(folder / "data" / "domain1_train.idx", at, data)


def state(change, run="main"):
    """Edits a state and recomputes its checksum, so that the program reports the values and not the checksum."""
    return lambda folder: edit(checkpoint(folder, run) / "state.json", resealed(change))


def resealed(change):
    def edited(entry):
        change(entry)
        entry.pop("sha256", None)
        entry.update(sealed(entry))

    return edited


def checkpoint(folder, run="main"):
    return folder / run / "checkpoints" / "iter_0000002"


def index_json(change):
    """Edits the index of the optimizer's state; state.json records its new size."""

    def damage(folder):
        path = checkpoint(folder) / "optimizer" / "index.json"
        edit(path, resealed(change))
        size = {"optimizer/index.json": path.stat().st_size}
        state(lambda entry: entry["files"].update(size))(folder)

    return damage


def gpt(**change):
    return lambda entry: entry["gpt"].update(change)


def at_step(entry, step):
    """A consistent state of a step other than its folder's."""
    entry.update(iteration=step)
    entry["blend"].update(step=step)


def D0(value):
    return {"domain 0": value}


def overlap(pieces):
    """Two pieces cover one half and none the other; the lengths still add up."""
    file, rank, start, length = pieces[0]
    pieces[:] = [[file, rank, start, length // 2], [file, rank, start, length - length // 2]]


def integer_moments(folder):
    """The same bytes with another dtype, in a header of the same length."""
    path = checkpoint(folder) / "optimizer" / "rank-00000.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"F32"', b'"I32"'))


def only_one(folder):
    """The single weights file of the main run."""
    return next((checkpoint(folder) / "weights").iterdir())


def flip(path):
    """Flips one bit of the last number in a file."""
    patch(path, path.stat().st_size - 3, bytes([path.read_bytes()[-3] ^ 1]))


def same_size(path):
    """Damages the header of a file without changing the file's size."""
    patch(path, 0, b"\xff" * 64)


FLAGS = {
    "a number that is none": Case(("--lr: fast", "a finite number"), flags="--lr fast"),
    "infinity": Case(("--lr: inf", "a finite number"), flags="--lr inf"),
    "NaN epochs": Case(("--max-epochs-per-domain", "nan"), flags="--max-epochs-per-domain nan"),
    "an unknown flag": Case(("--no-such", "see --help"), flags="--no-such 3"),
    "a misspelled flag": Case(("did you mean --micro-batch-size?",), flags="--micro-batchsize 3"),
    "a choice that is none": Case(
        ("--normalization: BatchNorm", "RMSNorm, LayerNorm"), flags="--normalization BatchNorm"
    ),
    "an unknown phase": Case(("--phase: training", "one of reference"), flags="--phase training"),
    "no heads for the width": Case(("multiple of --num-attention-heads 5",), flags="--num-attention-heads 5"),
    "no batch": Case(("--micro-batch-size: 0", "at least 1"), flags="--micro-batch-size 0"),
    "a batch that does not divide": Case(("--global-batch-size: 9", "a multiple of"), flags="--global-batch-size 9"),
    "more stages than layers": Case(
        ("at least --pipeline-model-parallel-size 4",),
        flags="--pipeline-model-parallel-size 4",
        environ={"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "localhost"},
    ),
    "a layout that does not fit the ranks": Case(("world size: 1", "2 x 1"), flags="--tensor-model-parallel-size 2"),
    "ZeRO 2 in a pipeline": Case(
        ("DeepSpeed's pipeline supports ZeRO 0 and 1 only",),
        flags="--zero-stage 2 --pipeline-model-parallel-size 2",
        environ={"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"},
    ),
    "bfloat16 without ZeRO": Case(("--bf16: with --zero-stage 0",), flags="--bf16"),
    "offloading without ZeRO": Case(("--cpu-offload: with --zero-stage 0",), flags="--cpu-offload"),
    "no steps": Case(("--train-iters", "a number of steps"), flags="--train-iters 0"),
    "a rate that grows": Case(("--min-lr: 1", "between 0 and --lr"), flags="--min-lr 1"),
    "no minutes": Case(("--distributed-timeout-minutes: 0", "above 0"), flags="--distributed-timeout-minutes 0"),
    "time that ran backwards": Case(("--exit-duration-in-mins: -1",), flags="--exit-duration-in-mins -1"),
    "a proxy without a reference": Case(("trained against a reference",), phase="proxy"),
    "an evaluation of nothing": Case(("an evaluation loads a trained run",), phase="evaluate"),
    "a name and sizes at once": Case(("in place of --num-layers",), flags="--model-size 280m"),
    "no data": Case(("--domains", "not given"), without=("--domains",)),
    "nowhere to save": Case(("--save", "training writes its results to a folder"), without=("--save",)),
    "to resume nothing elsewhere": Case(("this folder does not exist", "--save"), flags="--load @/nowhere"),
    "to resume elsewhere": Case(("the same folder to --load and --save",), flags="--load @/main"),
    "over another run": Case(("holds a run", "to resume it"), flags="--save @/main"),
    "a shard too many": Case(("--shard: 3", "from 0 to --num-shards - 1"), flags="--shard 3 --num-shards 3"),
    "too many epochs": Case(("at most --max-epochs-per-domain",), flags="--max-epochs-per-domain 0.01"),
}
MANIFESTS = {
    "missing": Case(("nowhere.json", "no such file"), flags="--domains @/nowhere.json"),
    "a folder": Case(("a folder",), flags="--domains @/data"),
    "no JSON": Case(("one JSON object",), damage=lambda f: (f / "data" / "domains.json").write_text("{")),
    "bytes": Case(("a readable manifest",), damage=lambda f: (f / "data" / "domains.json").write_bytes(b"\xff\xfe{")),
    "nested deeply": Case(
        ("one JSON object",), damage=lambda f: (f / "data" / "domains.json").write_text('{"a":' + "[" * 100_000)
    ),
    "a list": Case(("one JSON object",), damage=lambda f: (f / "data" / "domains.json").write_text("[1]")),
    "a key twice": Case(
        ("duplicate key",), damage=lambda f: (f / "data" / "domains.json").write_text('{"format": 1, "format": 2}')
    ),
    "another format": Case(("megatron-doremi-domains/1",), damage=manifest(lambda e: e.update(format="other/1"))),
    "no domains": Case(("domains: []", "at least 1 item"), damage=manifest(lambda e: e.update(domains=[]))),
    "domains that are none": Case(
        ("domains.0: 3", "domains.1: 'x'"), damage=manifest(lambda e: e.update(domains=[3, "x"]))
    ),
    "a name twice": Case(
        ("two domains 'domain 0'",), damage=manifest(lambda e: e["domains"][1].update(name="domain 0"))
    ),
    "no name": Case(("domains.1.name is missing",), damage=manifest(lambda e: e["domains"][1].pop("name"))),
    "tokens in words": Case(
        ("domains.2.tokens: 'many'",), damage=manifest(lambda e: e["domains"][2].update(tokens="many"))
    ),
    "tokens below zero": Case(("domains.2.tokens: -5",), damage=manifest(lambda e: e["domains"][2].update(tokens=-5))),
    "other tokens than there are": Case(
        ("300 tokens", "the 299 of the manifest"), damage=manifest(lambda e: e["domains"][0].update(tokens=299))
    ),
    "no tokenizer": Case(("names no tokenizer",), damage=manifest(lambda e: e.update(tokenizer=None))),
    "half a tokenizer": Case(("tokenizer.sha256 is missing",), damage=manifest(lambda e: e["tokenizer"].pop("sha256"))),
    "an end outside the vocabulary": Case(
        ("below vocab_size",), damage=manifest(lambda e: e["tokenizer"].update(eod=99))
    ),
    "words for Megatron-LM's list": Case(
        ("weight prefix",), damage=lambda f: (f / "data" / "domains.json").write_text("0.3 domain0_train 0.7")
    ),
    "windows longer than the text": Case(("a window takes --seq-length + 1 = 5001",), flags="--seq-length 5000"),
}
FILES = {
    "no .bin": Case(("domain2_train.bin", "no such file"), damage=lambda f: (f / "data/domain2_train.bin").unlink()),
    "no .idx": Case(("domain0_valid.idx", "no such file"), damage=lambda f: (f / "data/domain0_valid.idx").unlink()),
    "a short .bin": Case(("domain1_train.bin", "bytes"), damage=lambda f: truncate(f / "data/domain1_train.bin", 4)),
    "a short .idx": Case(("domain1_train.idx", "bytes"), damage=lambda f: truncate(f / "data/domain1_train.idx", 4)),
    "an empty .idx": Case(("not an index",), damage=lambda f: (f / "data/domain1_train.idx").write_bytes(b"")),
    "another file": Case(("starts with MMIDIDX",), damage=index(0, b"PK\x03\x04")),
    "another version": Case(("version 2",), damage=index(9, struct.pack("<Q", 2))),
    "another type": Case(("type code 6",), damage=index(17, b"\x06")),
    "more sequences than fit": Case(("sequences",), damage=index(18, struct.pack("<Q", 2**60))),
    "a negative length": Case(("non-negative lengths",), damage=index(34, struct.pack("<i", -3))),
    "an offset outside": Case(("gaps or overlaps",), damage=index(34 + 7 * 4 + 8, struct.pack("<q", 2**40))),
    "documents out of order": Case(("documents out of order",), damage=index(34 + 7 * 12, struct.pack("<q", 5))),
}
WEIGHTS = {
    "missing": Case(("weights.json", "no such file"), flags="--domain-weights @/weights.json"),
    "empty variable": Case(("--domain-weights: empty",), flags="--domain-weights="),
    "temperature alone": Case(("temperature:T, for example temperature:3",), flags="--domain-weights temperature"),
    "no word for weights": Case(("nothing",), flags="--domain-weights nothing"),
    **{
        name: Case(words, flags="--domain-weights @/weights.json", damage=weights(content))
        for name, content, words in (
            ("no JSON", "{", ("one JSON object",)),
            ("a list", [0.2, 0.3, 0.5], ("one JSON object",)),
            ("a domain less", {"domain 0": 1.0}, ("missing: 'domain 1', 'domain 2'",)),
            ("a domain more", {**THIRDS, "Books": 1.0}, ("unknown: 'Books'",)),
            ("zero for all", dict.fromkeys(THIRDS, 0), ("0 for every domain",)),
            ("below zero", {**THIRDS, "domain 0": -1}, ("weights.domain 0: -1",)),
            ("a word", {**THIRDS, "domain 0": "much"}, ("weights.domain 0: 'much'",)),
            ("NaN", '{"domain 0": NaN, "domain 1": 1, "domain 2": 1}', ("weights.domain 0: nan",)),
            ("infinity", '{"domain 0": 1e999, "domain 1": 1, "domain 2": 1}', ("weights.domain 0: inf",)),
            ("true", {**THIRDS, "domain 0": True}, ("weights.domain 0: True",)),
            ("a vanishing share", {**THIRDS, "domain 0": 1e-30}, ("shares of at least",)),
            ("the same name twice", '{"domain 0": 1, "domain 0": 2}', ("duplicate key",)),
            ("another format", {"format": "x", "weights": THIRDS}, ("megatron-doremi-weights/1",)),
            (
                "another tokenizer's",
                {"format": "megatron-doremi-weights/1", "weights": THIRDS, "tokenizer_sha256": "f" * 64},
                ("learned with tokenizer ffffffffffff", "--allow-tokenizer-mismatch"),
            ),
            (
                "of a proxy that is not finished",
                {
                    "format": "megatron-doremi-weights/1",
                    "weights": THIRDS,
                    "tokenizer_sha256": "0" * 64,
                    "provenance": {"steps": 5, "train_iters": 9},
                },
                ("the mean of 5 of the proxy's 9 steps", "--allow-unfinished"),
            ),
            (
                "of steps in words",
                {
                    "format": "megatron-doremi-weights/1",
                    "weights": THIRDS,
                    "tokenizer_sha256": "0" * 64,
                    "provenance": {"steps": "many"},
                },
                ("provenance.steps: 'many'",),
            ),
            ("the authors' without domains", {"train_domain_weights": 3}, ("weights: 3", "valid dictionary")),
        )
    },
}
CHECKPOINTS = {
    "another phase": Case(("phase was main, and is reference",), phase="reference", flags=RUN),
    "another shape": Case(("gpt was {'num_layers': 2}, and is {'num_layers': 3}",), flags=f"{RUN} --num-layers 3"),
    "another seed": Case(("seed was 11, and is 12 in this start",), flags=f"{RUN} --seed 12"),
    "another batch": Case(("global_batch_size was 8", "--global-batch-size"), flags=f"{RUN} --global-batch-size 4"),
    "another length": Case(("seq_length was 16, and is 8",), flags=f"{RUN} --seq-length 8"),
    "another mixture": Case(
        ("sampling_weights was {'domain 0'", "--change-domain-weights"), flags=f"{RUN} --domain-weights uniform"
    ),
    "another tokenizer": Case(
        ("data_fingerprint",), flags=RUN, damage=manifest(lambda e: e["tokenizer"].update(sha256="1" * 64))
    ),
    "domains in another order": Case(
        ("domains: in another order",), flags=RUN, damage=manifest(lambda e: e["domains"].reverse())
    ),
    "one that was cut off, and no other": Case(
        ("no complete one", "model-pipe000", "delete"), flags=RUN, damage=lambda f: truncate(only_one(f), 1)
    ),
    "a torn state, and no other": Case(
        ("no complete one", "state.json"), flags=RUN, damage=lambda f: truncate(checkpoint(f) / "state.json", 9)
    ),
    "of another version": Case(
        ("state.json", "megatron-doremi-checkpoint/1", "megatron-doremi-checkpoint/2"),
        flags=RUN,
        damage=state(lambda e: e.update(format="megatron-doremi-checkpoint/1")),
    ),
    "of a newer version": Case(
        ("written by a newer version", "megatron-doremi-checkpoint/2"),
        flags=RUN,
        damage=state(lambda e: e.update(format="megatron-doremi-checkpoint/3")),
    ),
    **{
        f"another {flag}": Case(
            (f"{name} was {before}, and is {now}", f"--override-resume {name}"),
            flags=f"{RUN} --{flag} {now}",
        )
        for flag, name, before, now in (
            ("lr", "lr", 0.005, 0.004),
            ("lr-decay-style", "lr_decay_style", "exponential", "cosine"),
            ("adam-beta1", "adam_beta1", 0.9, 0.8),
            ("clip-grad", "clip_grad", 1.0, 2.0),
        )
    },
    "another precision": Case(("precision was float32, and is bfloat16",), flags=f"{RUN} --bf16 --zero-stage 1"),
    "other text of the same size": Case(
        ("data_content", "--override-resume data_content"),
        flags=RUN,
        damage=lambda f: patch(f / "data/domain1_train.bin", 40, struct.pack("<H", 7)),
    ),
    "an override of a name that is none": Case(
        ("--override-resume: learning_rate", "one of precision"), flags=f"{RUN} --override-resume learning-rate"
    ),
    "an override of the shape": Case(
        ("--override-resume: gpt", "that a trained model can change"), flags=f"{RUN} --override-resume gpt"
    ),
    "fewer steps than were taken": Case(
        ("--train-iters: 1", "the 2 steps that were taken"), flags=f"{RUN} --train-iters 1"
    ),
    **{
        f"a state with {name}": Case(words, flags=RUN, damage=state(change))
        for name, words, change in (
            ("a negative iteration", ("state.json: iteration: -3",), lambda e: e.update(iteration=-3)),
            ("the iteration of another", ("of its folder, iter_0000002",), lambda e: at_step(e, 4)),
            ("another step of the blend", ("blend.step 77 must equal",), lambda e: e["blend"].update(step=77)),
            ("a cursor below zero", ("blend.cursors.domain 0: -5",), lambda e: e["blend"]["cursors"].update(D0(-5))),
            ("a credit without end", ("blend.credits.domain 0",), lambda e: e["blend"]["credits"].update(D0(1e300))),
            ("a credit that is NaN", ("domain 0: nan",), lambda e: e["blend"]["credits"].update(D0(math.nan))),
            ("an identity in words", ("identity.train_iters: 'x'",), lambda e: e["identity"].update(train_iters="x")),
            ("a list for a shape", ("identity.gpt: [1]",), lambda e: e["identity"].update(gpt=[1])),
            ("a NUL in a name", ("no complete one",), lambda e: e["files"].update({"a\0b": 1})),
            ("a surrogate in a name", ("no complete one",), lambda e: e["files"].update({"\ud800": 1})),
            ("an iteration in words", ("iteration: '2'",), lambda e: e.update(iteration="2")),
        )
    },
    "a state that was changed within its ranges": Case(
        ("state.json: damaged or edited",),
        flags=RUN,
        damage=lambda f: edit(checkpoint(f) / "state.json", lambda e: e["blend"]["cursors"].update(D0(3))),
    ),
    "weights that were changed": Case(("changed after it was written",), flags=RUN, damage=lambda f: flip(only_one(f))),
    "moments that were changed": Case(
        ("optimizer/rank-00000.safetensors: changed after it was written",),
        flags=RUN,
        damage=lambda f: flip(checkpoint(f) / "optimizer" / "rank-00000.safetensors"),
    ),
    "pieces that overlap": Case(
        ("index.json", "overlap or leave a gap"),
        flags=RUN,
        damage=index_json(lambda e: overlap(e["parameters"]["embedding.weight"]["pieces"])),
    ),
    "a piece elsewhere": Case(
        ("index.json", "can lie in '/etc/passwd'"),
        flags=RUN,
        damage=index_json(lambda e: e["parameters"]["embedding.weight"]["pieces"][0].__setitem__(0, "/etc/passwd")),
    ),
    "no moments": Case(("index.json: keys",), flags=RUN, damage=index_json(lambda e: e.pop("keys"))),
    "one moment": Case(("must hold exp_avg",), flags=RUN, damage=index_json(lambda e: e.update(keys=["exp_avg"]))),
    "moments of integers": Case(("is I32",), flags=RUN, damage=integer_moments),
    "without a state": Case(("no complete one",), flags=RUN, damage=lambda f: (checkpoint(f) / "state.json").unlink()),
    "no state of a domain": Case(
        ("state.json", "same domains"), flags=RUN, damage=state(lambda e: e["blend"]["cursors"].pop("domain 1"))
    ),
    "a state in words": Case(("state.json",), flags=RUN, damage=state(lambda e: e["blend"].update(credits="none"))),
    "weights with a spoilt header": Case(
        ("weights in", "safetensors"), flags=RUN, damage=lambda f: same_size(only_one(f))
    ),
    "an index that is none": Case(
        ("optimizer state in", "one JSON object"),
        flags=RUN,
        damage=lambda f: same_size(checkpoint(f) / "optimizer" / "index.json"),
    ),
}
REFERENCES = {
    "no run": Case(
        ("nowhere: no such folder", "train the run first"), phase="proxy", flags="--reference-load @/nowhere"
    ),
    "no checkpoint": Case(
        ("no complete checkpoint",),
        phase="proxy",
        flags=PROXY,
        damage=lambda f: shutil.rmtree(f / "reference" / "checkpoints"),
    ),
    "a torn config": Case(
        ("config.json",), phase="proxy", flags=PROXY, damage=lambda f: truncate(f / "reference" / "config.json", 20)
    ),
    "another tokenizer": Case(
        ("losses of other tokens cannot be compared",),
        phase="proxy",
        flags=PROXY,
        damage=lambda f: edit(f / "reference" / "config.json", lambda e: e.update(tokenizer_sha256="1" * 64)),
    ),
    "other domains": Case(
        ("in its order",),
        phase="proxy",
        flags=PROXY,
        damage=lambda f: edit(f / "reference" / "config.json", lambda e: e["domains"].reverse()),
    ),
    "no shape": Case(
        ("config.json", "gpt is missing"),
        phase="proxy",
        flags=PROXY,
        damage=lambda f: edit(f / "reference" / "config.json", lambda e: e.pop("gpt")),
    ),
    **{
        f"a config with {name}": Case(
            words,
            phase="proxy",
            flags=PROXY,
            damage=lambda f, change=change: edit(f / "reference" / "config.json", change),
        )
        for name, words, change in (
            ("an unknown norm", ("gpt.normalization: 'Foo'", "RMSNorm"), gpt(normalization="Foo")),
            ("unknown positions", ("gpt.position_embedding_type: 'alibi'",), gpt(position_embedding_type="alibi")),
            ("no epsilon", ("gpt.norm_epsilon: None",), gpt(norm_epsilon=None)),
            ("what this version cannot build", ("gpt.sliding_window: True",), gpt(sliding_window=True)),
            ("another shape than trained", ("rotary_base 500.0", "rotary_base 10000.0"), gpt(rotary_base=500.0)),
            ("layers without end", ("gpt.num_layers: 1000000000",), gpt(num_layers=10**9)),
            ("a vocabulary in words", ("gpt.vocab_size: 'many'",), gpt(vocab_size="many")),
            ("a smaller vocabulary than the data's", ("a vocabulary of 60", "the data's 61"), gpt(vocab_size=60)),
            ("no domains", ("domains",), lambda e: e.update(domains=[])),
            ("a newer format", ("written by a newer version",), lambda e: e.update(format="megatron-doremi-run/2")),
        )
    },
    "one that is not finished": Case(
        ("2 of its 9 steps taken", "--allow-unfinished"),
        phase="proxy",
        flags=PROXY,
        damage=state(lambda e: e["identity"].update(train_iters=9), "reference"),
    ),
    "weights that were changed": Case(
        ("changed after it was written", "copy the checkpoint again"),
        phase="proxy",
        flags=PROXY,
        damage=lambda f: flip(next((checkpoint(f, "reference") / "weights").iterdir())),
    ),
    "a checkpoint cut off in copying": Case(
        ("no complete checkpoint",),
        phase="score",
        flags=PROXY,
        damage=lambda f: truncate(next((checkpoint(f, "reference") / "weights").iterdir()), 1),
    ),
    "no scores": Case(("scores.json",), phase="proxy", flags="--reference-losses @/nowhere"),
    "scores of other data": Case(
        ("data_fingerprint",),
        phase="proxy",
        flags=SCORED,
        damage=lambda f: edit(f / "scores" / "scores.json", lambda e: e.update(data_fingerprint="x")),
    ),
    "scores of another length": Case(
        ("seq_length 16", "seq_length 8"), phase="proxy", flags=f"{SCORED} --seq-length 8"
    ),
    "too few scores": Case(("windows of domain", "are missing"), phase="proxy", flags=f"{SCORED} --train-iters 500"),
}
ENVIRONMENTS = {
    "half a launcher": Case(("RANK, WORLD_SIZE",), environ={"RANK": "0"}),
    "a rank in words": Case(("RANK, WORLD_SIZE", "integers, both set"), environ={"RANK": "first", "WORLD_SIZE": "2"}),
    "a rank too many": Case(("RANK: 2", "from 0 to WORLD_SIZE - 1 = 1"), environ={"RANK": "2", "WORLD_SIZE": "2"}),
    "nowhere to meet": Case(("MASTER_ADDR: not set",), environ={"RANK": "0", "WORLD_SIZE": "2"}),
    "a port in words": Case(
        ("MASTER_PORT: high",),
        environ={"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "high"},
    ),
    "a port too high": Case(
        ("MASTER_PORT: 70000",),
        environ={"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "70000"},
    ),
    "SLURM's number of tasks in words": Case(("SLURM_STEP_NUM_TASKS",), environ={"SLURM_STEP_NUM_TASKS": "all"}),
    "half a SLURM step": Case(("SLURM_PROCID",), environ={"SLURM_STEP_NUM_TASKS": "2"}),
    "an end in words": Case(("SLURM_JOB_END_TIME: soon",), environ={"SLURM_JOB_END_TIME": "soon"}),
    "a file where the run should be": Case(
        ("--save",), flags="--save @/taken", damage=lambda f: (f / "taken").write_text("")
    ),
    "a folder below a file": Case(
        ("--save",), flags="--save @/taken/run", damage=lambda f: (f / "taken").write_text("")
    ),
}
CATALOG = {
    f"{group}: {name}": case
    for group, cases in (
        ("flags", FLAGS),
        ("manifest", MANIFESTS),
        ("indexed files", FILES),
        ("weights", WEIGHTS),
        ("checkpoint", CHECKPOINTS),
        ("reference", REFERENCES),
        ("environment", ENVIRONMENTS),
    )
    for name, case in cases.items()
}


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    """Valid data, a main run, a reference and its scores."""
    folder = tmp_path_factory.mktemp("setup")
    (folder / "data").mkdir()
    data = write_data(folder / "data", tokens=300)
    train(1, "reference", data, folder / "reference", 2)
    train(1, "main", data, folder / "main", 2)
    argv = ["--phase", "score", "--domains", str(data), "--reference-load", str(folder / "reference")]
    run_program(1, [*argv, "--save", str(folder / "scores"), "--train-iters", "2", *read_by("score", MODEL)])
    return folder


@pytest.mark.parametrize("name", CATALOG)
def test_a_mistake(name, setup, tmp_path):
    case = CATALOG[name]
    code, output, changed = run_case(case, setup, tmp_path / "copy")
    assert code == "2", output
    assert "Traceback" not in output
    for words in (*case.words, "rule:", "remedy:"):
        assert words in unwrapped(output), output
    assert not changed


def test_the_catalog_is_large():
    assert len(CATALOG) >= 100
