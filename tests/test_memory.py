"""Freed memory: kept where a process asks for that, and given back when it asks for that."""

import pytest
from processes import run_python

CODE = """
    import pathlib, re, torch
    from sdfast.memory import keep_freed_memory, return_freed_memory

    def resident():
        return int(re.search(r"VmRSS:\\s*(\\d+) kB", pathlib.Path("/proc/self/status").read_text())[1]) >> 10

    if not keep_freed_memory():
        print("no glibc")
        raise SystemExit
    before = resident()
    x = [torch.ones(1 << 24) for _ in range(4)]  # 64 MiB each
    del x
    kept = resident()
    return_freed_memory()
    print(kept - before, resident() - before)
"""


def test_freed_memory_is_kept_and_given_back():
    answer = run_python(CODE)
    if "glibc" in answer:
        pytest.skip("this C library keeps no freed memory")
    kept, left = map(int, answer.split())
    assert kept > 200 and left < 50, "MiB"
