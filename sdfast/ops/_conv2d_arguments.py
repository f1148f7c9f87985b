"""Checks of conv2d's arguments that are numbers, pairs of them, or statistics."""

from __future__ import annotations

from typing import cast


def sides_of(padding: int | tuple[int, ...]) -> tuple[int, int, int, int]:
    """Zeros to the left, right, top and bottom."""
    sides = tuple(padding) if isinstance(padding, (tuple, list)) else (padding,) * 4
    expected = f"padding: got {padding!r}, expected an int >= 0, two or (left, right, top, bottom)"
    if not all(map(is_int, sides)):
        raise TypeError(expected)
    if len(sides) == 2:
        sides = (sides[1], sides[1], sides[0], sides[0])
    if len(sides) != 4 or min(sides) < 0:
        raise ValueError(expected)
    return cast("tuple[int, int, int, int]", sides)


def stride_of(stride: int | tuple[int, int]) -> int:
    """The stride of both axes."""
    pair = tuple(stride) if isinstance(stride, (tuple, list)) else (stride, stride)
    expected = f"stride: got {stride!r}, expected an int >= 1, or two that are equal"
    if not all(map(is_int, pair)):
        raise TypeError(expected)
    if len(pair) != 2 or pair[0] != pair[1] or pair[0] < 1:
        raise ValueError(expected)
    return pair[0]


def is_int(value: object) -> bool:
    """Whether it is an int and no bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_groups(name: str, groups: int, channels: int) -> None:
    """Raise unless this number of groups divides the channels."""
    if not is_int(groups):
        raise TypeError(f"{name}: got {groups!r}, expected an int, a divisor of the {channels} channels")
    if groups < 1 or channels % groups:
        raise ValueError(f"{name}: got {groups}, expected a divisor of the {channels} channels")
