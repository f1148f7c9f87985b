"""attention's CUDA kernels against fp64: head dimensions, lengths, splits, strides, orders of threads."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import emulated_cuda
import pytest
import torch
from emulated_cuda import thread_order
from test_attention import Case, check, in_layout, make_case
from torch import Tensor

from sdfast import ops

DTYPES = (torch.float16, torch.bfloat16)
HEAD_DIMS = (8, 40, 64, 72, 80, 128, 160, 512)


@pytest.fixture(autouse=True)
def device(cuda_kernels: str) -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.device(cuda_kernels):
        yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_fp64(dtype: torch.dtype, head_dim: int) -> None:
    for seed, (queries, keys) in enumerate(((70, 77), (1, 130), (33, 1))):
        with thread_order(seed):
            check(make_case(queries, keys, head_dim, dtype, heads=1), "cuda")
