"""GPUs by name: their dense peaks."""

from __future__ import annotations

import re

# Dense bfloat16 peak of a GPU in TFLOP/s, from the vendors' data sheets, by a part of its name. The longest matching
# part counts: "NVIDIA H100 PCIe" has its own, "NVIDIA H100 80GB HBM3" is the SXM model.
PEAK_TFLOPS = {
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "H200 NVL": 835.0,
    "H200": 989.0,
    "GH200": 989.0,
    "B200": 2250.0,
    "GB200": 2500.0,
    "A100": 312.0,
    "L40S": 362.0,
}
# The same in float32, without TF32, which this program does not turn on.
FLOAT32_TFLOPS = {
    "H100 PCIe": 51.0,
    "H100 NVL": 60.0,
    "H100": 67.0,
    "H200 NVL": 60.0,
    "H200": 67.0,
    "GH200": 67.0,
    "B200": 75.0,
    "GB200": 80.0,
    "A100": 19.5,
    "L40S": 91.6,
}


def peak_tflops(gpu_name: str) -> float | None:
    """Dense bfloat16 peak in TFLOP/s of a GPU by its CUDA device name; None if unknown, as of a part of a GPU (MIG)."""
    if re.search(r"\bMIG\b", gpu_name):
        return None
    # Whole words: an RTX A1000 is no A100.
    parts = [part for part in PEAK_TFLOPS if re.search(rf"\b{part}\b", gpu_name)]
    return PEAK_TFLOPS[max(parts, key=len)] if parts else None
