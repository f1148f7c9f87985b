"""That each_kernel.py finds the kernels, and names those without a call."""

import sys

import pytest

pytest.importorskip("triton")

import each_kernel  # noqa: E402


def test_kernels_are_those_that_nobody_calls():
    names = each_kernel.kernels().keys()
    seconds = ("_attention_rows_triton._combine_kernel", "conv2d_backward_triton._finish_kernel")
    assert {"linear_triton._matmul_kernel", *seconds} <= names
    assert not {"linear_triton.gelu", "attention_triton._walk", "_philox_triton.words"} & names


def test_a_kernel_without_a_call_is_named(monkeypatch):
    """Its operation runs, but never at a size that needs it."""
    narrow = ("layer_norm_forward", lambda: list(each_kernel.layer_norm())[:1])
    monkeypatch.setattr(each_kernel, "CALLS", {"layer_norm": narrow})
    monkeypatch.setattr(sys, "argv", ["each_kernel.py"])
    with pytest.raises(SystemExit) as ended:
        each_kernel.main()
    named = str(ended.value).removeprefix("no call here runs ").split(", ")
    assert "layer_norm_triton._means_kernel" in named and "linear_triton._matmul_kernel" in named
    assert "layer_norm_triton._forward_kernel" not in named
