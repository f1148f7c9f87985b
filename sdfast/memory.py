"""How much memory there is and was used, on the CPU or a GPU."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import sys
from collections.abc import Callable, Iterator
from typing import cast

import torch

# Of glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4


def total_memory_bytes(device: torch.device) -> int | None:
    """All memory of the device, or None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type != "cpu" or not hasattr(os, "sysconf"):  # Windows has no sysconf
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def keep_freed_memory() -> bool:
    """Let glibc keep what is freed, for a process that runs models and little else; False where it cannot.

    By default every tensor above 32 MB is mapped anew, and the kernel zeroes its pages at first touch, which
    takes a VAE longer than its normalisations. The process then never shrinks below its peak.
    """
    mallopt = _mallopt()
    if mallopt is None:
        return False
    return bool(mallopt(_MMAP_MAX, 0) and mallopt(_TRIM_THRESHOLD, -1))  # -1: never


def return_freed_memory() -> None:
    """Give what is free now back to the system, after `keep_freed_memory` as well; glibc's malloc_trim."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


@contextlib.contextmanager
def freed_memory_returned() -> Iterator[None]:
    """Let glibc give blocks from 256 KiB on back to the system as soon as they are freed.

    By default it comes to keep those up to 32 MiB, and where some of them last and others do not, holds far
    more than is in use. What it has kept before is used first. New pages take time, so this is for who has to
    stay within a budget. All threads of the process are concerned; afterwards the limit is 32 MiB. Changes
    nothing after `keep_freed_memory`, nor where there is no glibc.
    """
    mallopt = _mallopt()
    if mallopt is None:
        yield
        return
    mallopt(_MMAP_THRESHOLD, 256 << 10)
    try:
        yield
    finally:
        mallopt(_MMAP_THRESHOLD, 32 << 20)


def _mallopt() -> Callable[[int, int], int] | None:
    """glibc's, where there is one."""
    try:
        return cast(Callable[[int, int], int], ctypes.CDLL(None).mallopt)
    except (OSError, AttributeError, TypeError):
        return None


def reset_peak_memory(device: torch.device) -> None:
    """Begin a new peak, where the device can: the peak of a process cannot be reset."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_bytes(device: torch.device) -> int | None:
    """The most that was in use: by this process, or on the GPU since `reset_peak_memory`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
