"""GPUs by name: their dense bfloat16 peaks."""

from __future__ import annotations

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


def peak_tflops(gpu_name: str) -> float | None:
    """Dense bfloat16 peak in TFLOP/s of a GPU by its CUDA device name; None if unknown."""
    parts = [part for part in PEAK_TFLOPS if part in gpu_name]
    return PEAK_TFLOPS[max(parts, key=len)] if parts else None
