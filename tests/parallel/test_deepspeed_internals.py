"""Only two files mention DeepSpeed's private names, and the installed DeepSpeed has them.

Run alone: python -m pytest tests/parallel/test_deepspeed_internals.py
"""

from __future__ import annotations

import ast
from importlib.util import find_spec
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "megatron_doremi"
INTERNALS = [PACKAGE / "parallel" / f"deepspeed_{part}.py" for part in ("internals", "gradients")]
(DEEPSPEED,) = find_spec("deepspeed").submodule_search_locations
# DeepSpeed's file -> the names in it that this package depends on.
NAMES = {
    "ops/__init__.py": ["__compatible_ops__"],
    "ops/op_builder/cpu/comm.py": ["deepspeed_shm_comm"],
    "runtime/zero/partition_parameters.py": ["ds_id", "ds_numel", "ds_tensor", "GatheredParameters"],
    "runtime/zero/stage3.py": ["fp32_partitioned_groups_flat", "get_param_id", "grad_position"],
    "runtime/zero/stage_1_and_2.py": [
        "single_partition_of_fp32_groups",
    ],
    "runtime/bf16_optimizer.py": [
        "BF16_Optimizer",
        "_hp_grad",
        "_update_hp_grad",
        "bf16_groups",
        "clear_hp_grads",
        "fp32_groups_gradients",
        "fp32_groups_has_gradients",
        "fp32_groups_flat_partition",
        "fp32_groups_gradients_flat",
        "get_global_norm_of_tensors",
        "get_grads_for_norm",
        "see_memory_usage",
    ],
    "runtime/pipe/topology.py": ["dp_proc_group"],
    "utils/tensor_fragment.py": ["_hp_mapping", "hp_fragment_address", "lp_fragment_address", "param_group_index"],
    "runtime/utils.py": ["mask_nan_or_inf_with_val_inplace", "model_parallel"],
    "runtime/pipe/engine.py": [
        "pipe_buffers",
        "total_loss",
        "set_dataiterator",
        "_compute_loss",
        "_exec_schedule",
        "_train_schedule",
        "_exec_forward_pass",
        "_exec_backward_pass",
        "_exec_reduce_grads",
        "_INSTRUCTION_MAP",
    ],
    "runtime/pipe/module.py": [
        "ds_pipe_replicated",
        "_partition_layers",
        "_set_bounds",
        "_synchronize_tied_weights",
        "_local_start",
        "_local_stop",
        "tied_modules",
        "get_tied_weights_and_groups",
        "forward_funcs",
    ],
    "runtime/engine.py": [
        "basic_optimizer",
        "allreduce_gradients",
        "_configure_zero_optimizer",
        "_take_model_step",
        "_global_grad_norm",
    ],
}


def mentioned(path: Path) -> set[str]:
    """The identifiers in a file, and its strings, which may name attributes in a getattr."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Name):
            names.add(node.id)
        elif isinstance(node, ast.Attribute):
            names.add(node.attr)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names.add(node.value)
    return names


@pytest.mark.parametrize("file", NAMES)
def test_the_installed_deepspeed_has_them(file):
    missing = set(NAMES[file]) - mentioned(Path(DEEPSPEED, file))
    assert not missing, f"{sorted(missing)} missing from {file} of the installed DeepSpeed: adapt {INTERNALS[0].name}"


def test_no_other_file_mentions_them():
    names = {name for listed in NAMES.values() for name in listed}
    for path in PACKAGE.rglob("*.py"):
        if path not in INTERNALS:
            private = names & mentioned(path)
            assert not private, f"{path} mentions {sorted(private)}; only {[each.name for each in INTERNALS]} may"


def test_the_list_is_complete_and_current():
    names = {name for listed in NAMES.values() for name in listed}
    used = set().union(*map(mentioned, INTERNALS))
    assert names <= used, f"{[each.name for each in INTERNALS]} no longer use {sorted(names - used)}"
    private = {name for name in used if name.isidentifier() and name.startswith(("_", "ds_"))}
    assert not private - names - {"__init__", "__class__"}, f"missing from NAMES: {sorted(private - names)}"
