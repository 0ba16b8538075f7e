"""A device that is not the CPU, on a machine that has none: fake tensors, which have shapes, types and devices but no
numbers, on a device type that is registered from Python. An operation that mixes devices raises, as on a GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import Executor, Future
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

NAME = "nogpu"


class _Numbers(TorchDispatchMode):
    """Gives the host a number where it asks for one: a fake tensor has none. 0 is also False."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1.0 if args[0].is_floating_point() else 0
        return func(*args, **(kwargs or {}))


def _to_list(tensor: torch.Tensor) -> Any:
    number = 1.0 if tensor.is_floating_point() else 0
    if tensor.ndim == 0:
        return number
    return [_to_list(tensor[i]) for i in range(len(tensor))]


def _apply(module: nn.Module, function: Any, recurse: bool = True) -> nn.Module:
    """`nn.Module._apply` without its swap of tensors, which fake ones do not take."""
    for part in module.modules():
        for parameter in part._parameters.values():
            if parameter is not None:
                parameter.data = function(parameter.data)
    return module


class _NoThreads(Executor):
    """Runs what is submitted at once: the modes of torch belong to the thread that entered them."""

    def __init__(self, *_: Any, **__: Any):
        pass

    def submit(self, function: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(function(*args, **kwargs))
        return future


@contextlib.contextmanager
def fake_device() -> Iterator[torch.device]:
    """Within it every new tensor is fake; gives the device. For a process of its own: what it registers stays."""
    from deepspeed.accelerator import set_accelerator
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    from megatron_doremi.checkpoint import filling
    from megatron_doremi.parallel import layers, parameters

    class Accelerator(CPU_Accelerator):
        """DeepSpeed's, on our device."""

        def device_name(self, device_index: int | None = None) -> str:
            return NAME if device_index is None else f"{NAME}:{device_index}"

        def current_device_name(self) -> str:
            return f"{NAME}:0"

        def pin_memory(self, tensor: torch.Tensor, align_bytes: int = 1) -> torch.Tensor:
            return tensor

    _setup_privateuseone_for_python_backend(NAME)
    set_accelerator(Accelerator())
    torch.Tensor.tolist = _to_list  # type: ignore[method-assign]
    make_tensor = torch.tensor

    def tensor_on_device(data: Any, *, dtype: Any = None, device: Any = None, **rest: Any) -> torch.Tensor:
        result = make_tensor(data, dtype=dtype, **rest)
        # Otherwise its number follows it to the device, where no operation runs.
        result.constant = None  # type: ignore[attr-defined]
        return result.to(device)

    torch.tensor = tensor_on_device  # type: ignore[assignment]
    nn.Module._apply = _apply  # type: ignore[method-assign]
    # Parameters are made on the device: fake ones cannot be moved.
    device, make_parameter = torch.device(NAME, 0), layers.make_parameter

    def made_on_device(*arguments: Any) -> nn.Parameter:
        with device:
            return make_parameter(*arguments)

    layers.make_parameter = made_on_device
    filling.ThreadPoolExecutor = parameters.ThreadPoolExecutor = _NoThreads  # type: ignore[misc]
    with FakeTensorMode(), _Numbers():
        yield device
