"""How loggers with charts name a run's numbers: groups train/, eval/, mixture/ and perf/, and a chart for each kind of
domain entry.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.types_pb2 import DT_STRING
from tensorboard.plugins.custom_scalar.layout_pb2 import Category, Chart, Layout, MultilineChartContent

_TRAIN = ("loss", "domain_loss", "lr", "grad_norm", "consumed_samples", "consumed_tokens")
_PERF = ("elapsed_ms", "tokens_per_second", "tflops_per_gpu", "mfu", "memory_gib", "time_ms")
# Kinds of entries by domain whose lines TensorBoard shows in one chart.
_CHARTS = (
    ("mixture", "domain_weights"),
    ("mixture", "domain_excess"),
    ("mixture", "domain_tokens"),
    ("train", "domain_loss"),
    ("eval", "loss"),
    ("eval", "bpb"),
)
# TensorBoard's names of the plug-in for custom charts and of its only entry.
_PLUGIN, _LAYOUT_TAG = "custom_scalars", "custom_scalars__config__"


def chart_name(key: str) -> str:
    """The grouped name of a key of a metrics line: `eval_bpb_worst` is "eval/bpb_worst".

    What is not known here is a controller's entry and belongs to the mixture.
    """
    if key == "eval":
        return "eval/loss"
    if key.startswith("eval_"):
        return f"eval/{key.removeprefix('eval_')}"
    group = "train" if key in _TRAIN else "perf" if key in _PERF else "mixture"
    return f"{group}/{key}"


def scalars(entry: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The (name, number) pairs of a metrics line; the iteration is not one of them.

    The name is that of `chart_name`, then /domain, and for an interval /low and /high.
    """
    for key, value in entry.items():
        if key != "iteration":
            yield from _numbers(chart_name(key), value)


def _numbers(name: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, Mapping):
        for part, each in value.items():
            yield from _numbers(f"{name}/{part}", each)
    elif isinstance(value, list):
        yield from _numbers(name, dict(zip(("low", "high"), value, strict=True)))
    elif value is not None:
        yield name, value


def chart_layout() -> Summary:
    """TensorBoard's custom scalars: the lines of all domains in one chart for each kind of entry."""
    categories: dict[str, list[Chart]] = {}
    for group, kind in _CHARTS:
        lines = MultilineChartContent(tag=[f"^{group}/{kind}/"])
        categories.setdefault(group, []).append(Chart(title=f"{kind} by domain", multiline=lines))
    layout = Layout(category=[Category(title=title, chart=charts) for title, charts in categories.items()])
    content = TensorProto(dtype=DT_STRING, string_val=[layout.SerializeToString()])
    metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name=_PLUGIN))
    return Summary(value=[Summary.Value(tag=_LAYOUT_TAG, tensor=content, metadata=metadata)])
