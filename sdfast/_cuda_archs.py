"""Which GPUs the CUDA library is built for: what a build is asked for, and whom its result serves.

Machine code for sm_XY runs on GPUs of the same major version with at least this minor one; that for sm_XYa,
which may use instructions of this GPU alone, on compute capability X.Y only; PTX of compute_XY is compiled by
the driver for whatever is as new or newer. Standard library alone: setup.py reads this before torch is there.
"""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Sequence
from typing import NamedTuple

MINIMUM = "8.0"
_ENTRY = re.compile(r"(\d+)\.(\d)(a?)(\+PTX)?")


class Arch(NamedTuple):
    """One architecture that machine code is asked for.

    Attributes:
        major, minor: the compute capability.
        exact: the "a" of 9.0a.
        ptx: whether PTX was asked for as well.
    """

    major: int
    minor: int
    exact: bool = False
    ptx: bool = False

    @property
    def code(self) -> str:
        """What nvcc calls it without its prefix: 90a."""
        return f"{self.major}{self.minor}{'a' if self.exact else ''}"

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}{'a' if self.exact else ''}"


def parse(text: str) -> list[Arch]:
    """The architectures of "8.0;9.0a;12.0", in this order; commas and spaces separate, too.

    Raises:
        ValueError: an entry is none, or below `MINIMUM`; says which, and what is expected.
    """
    archs: dict[str, Arch] = {}
    for entry in re.split(r"[;,\s]+", text.strip(";, \t\n")):
        match = _ENTRY.fullmatch(entry)
        if match is None:
            raise ValueError(f"{entry!r} is no architecture: expected such as 8.6, 9.0a or 9.0+PTX")
        arch = Arch(int(match[1]), int(match[2]), bool(match[3]), bool(match[4]))
        if (arch.major, arch.minor) < _capability(MINIMUM):
            raise ValueError(f"{entry!r} is too old: the kernels need {MINIMUM} or later")
        if arch.exact and arch.major < 9:
            raise ValueError(f"{entry!r} does not exist: expected {arch.major}.{arch.minor}")
        known = archs.get(str(arch), arch)
        archs[str(arch)] = arch._replace(ptx=arch.ptx or known.ptx)
    return list(archs.values())


def local_version(archs: Sequence[Arch], cuda: str) -> str:
    """A wheel's local version, PEP 440: "cu130.sm80.sm90a" of CUDA "13.0"."""
    return ".".join([f"cu{cuda.replace('.', '')}", *(f"sm{arch.code}" for arch in archs)])


def for_capability(capability: tuple[int, int]) -> str:
    """What to build for a GPU; of 9.0 the kernels may use what it alone has."""
    return "9.0a" if capability == (9, 0) else "{}.{}".format(*capability)


def build_command(arch: str) -> str:
    """What to type in a checkout of sdfast, where there is nvcc."""
    return f"SDFAST_CUDA_ARCHS={arch} pip install --no-build-isolation --no-deps --force-reinstall ."


class Contents(NamedTuple):
    """What a CUDA library holds, from the file beside it.

    Attributes:
        code: machine code, ("80", "90a").
        ptx: ("120",).
        cuda: the toolkit's version, "13.0".
    """

    code: tuple[str, ...]
    ptx: tuple[str, ...]
    cuda: str

    def __str__(self) -> str:
        ptx = ", ".join(f"compute_{each}" for each in self.ptx) or "nothing"
        return f"code for {', '.join(f'sm_{each}' for each in self.code)}, PTX of {ptx}, by CUDA {self.cuda}"


def read_contents(library: pathlib.Path) -> Contents | None:
    """What `library` holds, which CMake wrote into a JSON file beside it; None where that fails."""
    try:
        written = json.loads(library.with_suffix(".json").read_text(encoding="utf-8"))
        return Contents(tuple(written["code"]), tuple(written["ptx"]), str(written["cuda"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def why_not(contents: Contents, capability: tuple[int, int], driver: str | None = None) -> str | None:
    """Why a library cannot run on a GPU, or None.

    Args:
        capability: the GPU's, (9, 0).
        driver: the newest CUDA that its driver knows, "13.0", where that was found out.
    """
    known = _capability(driver) if driver else None
    toolkit = _capability(contents.cuda)
    older_driver = f"CUDA {contents.cuda}, and the driver knows CUDA {driver} at most: update the driver"
    if known and known[0] < toolkit[0]:
        return f"it was built by {older_driver}"
    if any(_runs_on(code, capability) for code in contents.code):
        return None
    # Launchers take what the GPU has; PTX from before Hopper lacks its clusters.
    usable = [ptx for ptx in contents.ptx if _number(ptx) <= capability]
    if any(capability < (9, 0) or _number(ptx) >= (9, 0) for ptx in usable):
        if known is None or known >= toolkit:
            return None
        return f"for this GPU it holds PTX of {older_driver}"
    if capability < _capability(MINIMUM):
        return f"the kernels need compute capability {MINIMUM} or later"
    return f"it holds {contents}"


def _runs_on(code: str, capability: tuple[int, int]) -> bool:
    number = _number(code)
    if code.endswith("a"):
        return capability == number
    return capability[0] == number[0] and capability[1] >= number[1]


def _number(code: str) -> tuple[int, int]:
    digits = code.rstrip("a")
    return int(digits[:-1]), int(digits[-1])


def _capability(text: str) -> tuple[int, int]:
    major, minor = text.split(".")[:2]
    return int(major), int(minor)
