"""A watch over what would break the capture of a CUDA graph, which works without one."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


class OnTheDevice(TorchDispatchMode):
    """Fails where a tensor's values are read on the host, or a tensor is made of the host's numbers."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in (aten._local_scalar_dense.default, aten.lift_fresh.default), func
        return func(*args, **(kwargs or {}))
