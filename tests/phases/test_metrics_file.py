"""metrics.jsonl: full precision, truncation on resume, damaged bytes, and failed writes.

Run alone: python -m pytest tests/phases/test_metrics_file.py
"""

from __future__ import annotations

import json
import os
import random

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

from megatron_doremi.phases import metrics_file
from megatron_doremi.phases.charts import chart_name
from megatron_doremi.phases.metrics_file import EventsFile, MetricsFile
from megatron_doremi.storage.files import AppendFile

# Cases of the fuzzing below; MEGATRON_DOREMI_FUZZ multiplies them (tests/soak).
CASES = 1000 * int(os.environ.get("MEGATRON_DOREMI_FUZZ", "1"))


def line(iteration: int, key: str = "loss") -> bytes:
    return json.dumps({"iteration": iteration, key: 0.1 + iteration}).encode() + b"\n"


def write_lines(path, iterations) -> None:
    path.write_bytes(b"".join(map(line, iterations)))


def resume(path, last, recorded_bytes=None) -> None:
    """Resumes after iteration `last` and writes the next one."""
    file = MetricsFile(path, last, recorded_bytes)
    file.write({"iteration": last + 1, "x": 1 / 3})
    file.close()


def test_a_resumed_file_has_no_iteration_twice(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_lines(path, range(1, 6))
    path.write_bytes(path.read_bytes() + b'{"iteration": 6, "x"')
    resume(path, 3)
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    assert [entry["iteration"] for entry in lines] == [1, 2, 3, 4]
    assert lines[0]["loss"] == 1.1
    assert lines[3]["x"] == 1 / 3


@pytest.mark.parametrize("recorded", [False, True])
def test_the_evaluation_of_the_resumed_iteration_stays_and_is_not_repeated(recorded, tmp_path):
    path = tmp_path / "metrics.jsonl"
    kept_lines = line(1) + line(2) + line(2, "eval")
    path.write_bytes(kept_lines + line(3) + line(3, "eval") + line(4))
    resume(path, 2, len(kept_lines) if recorded else None)
    assert path.read_bytes() == kept_lines + b'{"iteration": 3, "x": 0.3333333333333333}\n'


@pytest.mark.parametrize("recorded", [False, True])
def test_a_damaged_byte_stays_and_a_link_stays_a_link(recorded, tmp_path):
    """Fault 27: the line vanished, or a byte that is not UTF-8 raised a traceback; the link was replaced by a file."""
    target, path = tmp_path / "elsewhere.jsonl", tmp_path / "metrics.jsonl"
    damaged = line(2).replace(b"loss", b"l\xffss")
    broken = line(3).replace(b"{", b"[", 1)
    kept_lines = line(1) + damaged + broken
    target.write_bytes(kept_lines + line(4) + line(5)[:9])
    path.symlink_to(target)
    resume(path, 3, len(kept_lines) if recorded else None)
    assert path.is_symlink()
    assert target.read_bytes() == kept_lines + b'{"iteration": 4, "x": 0.3333333333333333}\n'


@pytest.mark.parametrize(
    ("recorded", "why"),
    [
        (10**6, "the file is shorter"),
        (7, "within a line"),
        (0, "lines before it"),
        (len(line(1)) * 4, "lines after it"),
    ],
)
def test_a_recorded_size_that_the_lines_do_not_confirm_is_not_used(recorded, why, tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_lines(path, range(1, 8))
    resume(path, 3, recorded)
    assert [json.loads(text)["iteration"] for text in path.read_text().splitlines()] == [1, 2, 3, 4], why


def test_a_recorded_size_is_taken_without_reading_the_file(tmp_path, monkeypatch):
    """Fault 36: the cost of a resume does not grow with the file (here 10 GB, sparse)."""
    path = tmp_path / "metrics.jsonl"
    size = 10 * 2**30
    with path.open("wb") as file:
        file.seek(size)
        file.write(b"\n" + line(70) + line(71) + line(72))
    read = []
    original = AppendFile.read
    monkeypatch.setattr(AppendFile, "read", lambda self, a, b: read.append(b - a) or original(self, a, b))
    kept_size = size + 1 + len(line(70))
    resume(path, 70, kept_size)
    assert path.stat().st_size == kept_size + len(b'{"iteration": 71, "x": 0.3333333333333333}\n')
    assert sum(read) < 2**23


def test_without_a_recorded_size_only_the_end_is_read(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"".join(line(number) for number in range(200_000)))
    size, read = path.stat().st_size, []
    original = AppendFile.read
    monkeypatch.setattr(AppendFile, "read", lambda self, a, b: read.append(b - a) or original(self, a, b))
    resume(path, 199_990)
    assert size > 5 * 2**20
    assert sum(read) < 2 * 2**20
    assert path.read_bytes().count(b"\n") == 199_992


def claims_more_than(last: int, text: bytes) -> bool:
    try:
        return json.loads(text)["iteration"] > last
    except (ValueError, KeyError, TypeError):
        return False


@pytest.mark.parametrize("seed", range(4))
def test_fuzzed_files(seed, tmp_path, monkeypatch):
    """One byte of a file changed, its end missing or replaced by zeros: undamaged lines up to the resumed iteration
    are kept, undamaged later ones removed, whatever size the checkpoint records."""
    generator = random.Random(seed)
    monkeypatch.setattr(metrics_file, "_BLOCK", 256)
    path = tmp_path / "metrics.jsonl"
    for case in range(CASES // 4):
        total = generator.randint(1, 30)
        last = generator.randint(0, total)
        lines = [(number, line(number, key)) for number in range(1, total + 1) for key in ("loss", "eval")]
        kept_size = sum(len(text) for number, text in lines if number <= last)
        data, kind = bytearray(b"".join(text for _, text in lines)), generator.random()
        place = generator.randrange(len(data))
        if kind < 0.6:
            data[place] = generator.randrange(256)
        elif kind < 0.8:
            del data[place:]
        elif kind < 0.9:
            data[place:] = bytes(len(data) - place)
        path.write_bytes(data)
        resume(path, last, generator.choice([None, kept_size, kept_size, generator.randint(0, 2 * len(data))]))
        content = path.read_bytes()
        context = f"seed {seed}, case {case}"
        assert content.endswith(b'"x": 0.3333333333333333}\n'), context
        assert content[: content.rindex(b'{"iteration"')] == data[: content.rindex(b'{"iteration"')], context
        start, lies = 0, False
        for number, text in lines:
            undamaged = bytes(data[start : start + len(text)]) == text
            begins = start == 0 or data[start - 1 : start] == b"\n"
            # A damaged line with another iteration may remove lines after it, but never keeps later iterations.
            lies = lies or (number <= last and claims_more_than(last, bytes(data[start : start + len(text)])))
            start += len(text)
            if undamaged and begins and not (lies and number <= last):
                assert (text in content) == (number <= last), f"{context}: iteration {number} of {last}"


def test_a_line_that_cannot_be_written_leaves_no_torn_line(tmp_path, monkeypatch):
    """The disk fills up within a line and has room later; also if the partial line cannot be removed."""
    for removable in (True, False):
        path = tmp_path / f"{removable}.jsonl"
        file = MetricsFile(path, 0)
        file.write({"iteration": 1})
        real = os.write

        def full(descriptor, data, real=real):
            if len(data) < 10:
                raise OSError(28, "No space left on device")
            return real(descriptor, data[:7])

        with monkeypatch.context() as patch:
            patch.setattr(os, "write", full)
            if not removable:
                patch.setattr(AppendFile, "truncate", lambda *_: (_ for _ in ()).throw(OSError(5, "I/O error")))
            with pytest.raises(OSError, match=r"No space|I/O error"):
                file.write({"iteration": 2})
        file.write({"iteration": 3})
        file.close()
        torn = b"" if removable else b'{"iteration": \n'
        assert path.read_bytes() == b'{"iteration": 1}\n' + torn + b'{"iteration": 3}\n'


def test_tensorboard_reads_the_events(tmp_path):
    for first, last in ((0, 4), (2, 3)):
        file = EventsFile(tmp_path, first)
        for iteration in range(first + 1, last + 1):
            file.write({"iteration": iteration, "loss": 1.0 / iteration, "domain_loss": {"a b": 2.0 * iteration}})
        file.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert set(events.Tags()["scalars"]) == {"train/loss", "train/domain_loss/a b"}
    losses = [(event.step, event.value) for event in events.Scalars("train/domain_loss/a b")]
    assert losses == [(1, 2.0), (2, 4.0), (3, 6.0)]
    layout, *_ = events.Tensors("custom_scalars__config__")
    categories = {each.title: each for each in Layout.FromString(layout.tensor_proto.string_val[0]).category}
    assert set(categories) == {"train", "eval", "mixture"}
    assert list(categories["train"].chart[0].multiline.tag) == ["^train/domain_loss/"]


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("loss", "train/loss"),
        ("eval", "eval/loss"),
        ("eval_bpb", "eval/bpb"),
        ("eval_uniform_mean", "eval/uniform_mean"),
        ("tokens_per_second", "perf/tokens_per_second"),
        ("domain_weights", "mixture/domain_weights"),
        ("an_entry_of_a_new_controller", "mixture/an_entry_of_a_new_controller"),
    ],
)
def test_the_names_of_charts(key, name):
    assert chart_name(key) == name
