"""Philox4x32-10 and Box-Muller inside a kernel: `_philox.py` is the definition, csrc/cpu_philox.h the model.

The words and uniforms are the definition's bit for bit. Normals are within 2 units in the last place of fp32
of exact logarithms, roots and cosines: approximate functions of the hardware would not be, so logarithm and
cosine are polynomials here, and what their arithmetic rounds off is carried beside them.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def words(seed, block, step):
    """The four words of each block of four elements; seed, block and step are int64."""
    return tl.philox(
        seed, block.to(tl.uint32), (block >> 32).to(tl.uint32), step.to(tl.uint32), (step >> 32).to(tl.uint32)
    )


@triton.jit
def _uniform(word):
    return word.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10  # 2^-32, 2^-33


@triton.jit
def _head(v, mask: tl.constexpr):
    """A number of few bits near v, so that products of heads are exact; the mask clears the others."""
    return (v.to(tl.int32, bitcast=True) & mask).to(tl.float32, bitcast=True)


@triton.jit
def _radius(u):
    """sqrt(-2 ln u) to about 2^-33, as a head of 12 bits and a tail."""
    # u = 2^n (1 + f) with f from -1/3 to 1/3, ln(1 + f) = f - f^2 / 2 + f^3 p(f), p minimax; ln 2 in two
    # parts, the first exact when multiplied by n.
    bits = u.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F2AAAAB) & -0x800000
    f = (bits - exponent).to(tl.float32, bitcast=True) - 1.0
    n = (exponent >> 23).to(tl.float32)
    p = f * -0.128916830 + 0.139844388
    p = p * f - 0.121842615
    p = p * f + 0.140058681
    p = p * f - 0.166804880
    p = p * f + 0.200104058
    p = p * f - 0.249997973
    p = p * f + 0.333332151
    square = f * f
    whole = n * 0.693145751953125
    first = whole + f
    second = (square * f * p + n * 1.42860682e-6 - square * 0.5) + (f - (first - whole))
    log = first + second
    log_rest = second - (log - first)
    # The root, and a Newton step of it for what rounding it has left.
    squared = log * -2.0
    root = tl.sqrt(squared)
    head = _head(root, -4096)
    tail = root - head
    residual = (squared - head * head) - (root + head) * tail
    slope = tl.maximum(root + root, 1e-20)  # the root is zero where u is 1
    return head, tail + (residual - log_rest * 2.0) / slope


@triton.jit
def _cosine_sine(u):
    """Of 2 pi u."""
    # 2 pi u = pi/2 (n + f), f from -1/2 to 1/2: exact, unlike a product with pi.
    nearest = tl.floor(u * 4.0 + 0.5)
    n = nearest.to(tl.int32)
    f = u * 4.0 - nearest
    square = f * f
    head = _head(f, -65536)  # 8 bits
    tail = f - head
    # pi/2 f + f^3 p(f^2) and 1 - pi^2/8 f^2 + f^4 q(f^2), minimax; the leading terms in two parts.
    p = square * -0.00460483413 + 0.0796814114
    p = p * square - 0.645963609
    sine = head * 1.5703125 + (tail * 1.5703125 + (f * 0.00048382679 + f * square * p))
    q = square * 0.000903766544 - 0.0208601654
    q = q * square + 0.253669232
    drop = head * head * 1.2265625
    first = 1.0 - drop
    rest = tail * (f + head) * 1.2265625 + square * 0.0071380502
    cosine = first + (((1.0 - first) - drop) + (square * square * q - rest))
    # Quadrant n mod 4: odd ones swap the two, half of them change a sign.
    c = tl.where(n & 1 != 0, sine, cosine)
    s = tl.where(n & 1 != 0, cosine, sine)
    return tl.where((n + 1) & 2 != 0, -c, c), tl.where(n & 2 != 0, -s, s)


@triton.jit
def _product(head, tail, b):
    b_head = _head(b, -4096)
    return head * b_head + (head * (b - b_head) + tail * b)


@triton.jit
def normals(word0, word1):
    """Two normals from two words."""
    head, tail = _radius(_uniform(word0))
    cosine, sine = _cosine_sine(_uniform(word1))
    return _product(head, tail, cosine), _product(head, tail, sine)


@triton.jit
def normals_of_row(seed, first, step, BLOCK: tl.constexpr):
    """z of elements first to first + BLOCK - 1; both are multiples of 4. Each block is drawn once."""
    r0, r1, r2, r3 = words(seed, first // 4 + tl.arange(0, BLOCK // 4), step)
    z0, z1 = normals(r0, r1)
    z2, z3 = normals(r2, r3)
    return tl.interleave(tl.interleave(z0, z2), tl.interleave(z1, z3))


@triton.jit
def normals_at(seed, element, step):
    """z of elements wherever they are; each draws a whole block for itself."""
    r0, r1, r2, r3 = words(seed, element >> 2, step)
    back = element & 2 != 0
    even, odd = normals(tl.where(back, r2, r0), tl.where(back, r3, r1))
    return tl.where(element & 1 != 0, odd, even)
