"""GPUs by name: their dense peaks."""

from __future__ import annotations

import re

# Dense bfloat16 peak of a GPU in TFLOP/s by a part of its name: half of what data sheets state with sparsity. The
# longest matching part counts: "NVIDIA H100 PCIe" has its own, "NVIDIA H100 80GB HBM3" is the SXM model.
#
# From NVIDIA's data sheets of A100 (nvidia-a100-datasheet-us-nvidia-1758950-r4), L40S (362.05 without sparsity), H100
# (with sparsity SXM 1,979 and PCIe 1,513) and Blackwell (with sparsity HGX B200 4,500 and GB200 NVL72 5,000 a GPU),
# read in copies of their tables. Of the others no copy was found: lists of others have 989 for H200 (SXM), as H100;
# GH200 has the multiprocessors and the clock of H100; 835 of H100 NVL is what others take from NVIDIA's page on the
# H100, and H200 NVL has the same.
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
# The same in float32, without TF32, which this program does not turn on; from the same data sheets (the brief on
# Blackwell's architecture, which came before its data sheet, had 80 for B200 and 90 for GB200). Of the NVL models no
# source was found: 60 is 132 multiprocessors x 128 lanes x 2 operations x 1.785 GHz; some lists give H100 NVL the 67
# of the SXM model.
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
