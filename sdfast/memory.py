"""How much memory there is and was used, on the CPU or a GPU."""

from __future__ import annotations

import ctypes
import os
import sys

import torch


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
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # not glibc
        return False
    trim_threshold, mmap_max = -1, -4  # of malloc.h
    return bool(mallopt(mmap_max, 0) and mallopt(trim_threshold, -1))  # -1: never


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
