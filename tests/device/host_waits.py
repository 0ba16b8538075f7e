"""Where a step on a device that is not the CPU makes the host wait for it: numbers that the host reads, copies to it,
copies from pageable memory that block, and synchronizations.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_NUMBERS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default)
# Their results' sizes depend on numbers.
_SIZES = (torch.ops.aten.nonzero.default, torch.ops.aten.masked_select.default, torch.ops.aten._unique2.default)


def _place() -> str:
    """file:line in function of the innermost frame of the program or of DeepSpeed."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if "megatron_doremi" in path.parts or "deepspeed" in path.parts:
            return f"{path.parent.name}/{path.name}:{frame.lineno} {frame.name}: {frame.line}"
    return "?"


class _Waits(TorchDispatchMode):
    def __init__(self, places: list[str]):
        super().__init__()
        self.places = places

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        source = args[0] if args and isinstance(args[0], torch.Tensor) else None
        if func is torch.ops.aten.copy_.default:
            blocking = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
            self._copied(args[1], args[0], blocking)
        elif func is torch.ops.aten._to_copy.default:
            self._copied(args[0], result, not kwargs.get("non_blocking", False))
        elif func in (*_NUMBERS, *_SIZES) and source is not None and source.device.type != "cpu":
            self.places.append(_place())
        return result

    def _copied(self, source: torch.Tensor, target: torch.Tensor, blocking: bool) -> None:
        if source.device == target.device:
            return
        # A copy to the host is waited for, or its memory may not be read.
        if target.device.type == "cpu" or blocking:
            self.places.append(_place())


@contextlib.contextmanager
def host_waits() -> Iterator[list[str]]:
    """Gives a list, to which every wait in a `with` block adds the place in the sources that causes it."""
    from deepspeed.accelerator import get_accelerator
    from torch._subclasses.fake_tensor import FakeTensor

    places: list[str] = []
    to_list, accelerator = FakeTensor.tolist, get_accelerator()
    synchronize = accelerator.synchronize

    def tolist(tensor: torch.Tensor) -> Any:
        before = len(places)
        result = to_list(tensor)
        # The numbers of a tensor are one copy.
        del places[before:]
        if tensor.device.type != "cpu":
            places.append(_place())
        return result

    def waiting(device: Any = None) -> None:
        places.append(_place())

    FakeTensor.tolist = tolist  # type: ignore[method-assign]
    accelerator.synchronize = waiting
    try:
        with _Waits(places):
            yield places
    finally:
        FakeTensor.tolist, accelerator.synchronize = to_list, synchronize  # type: ignore[method-assign]
