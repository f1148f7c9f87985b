"""Aspect buckets, and which images make up each batch.

Images are cut to the bucket whose shape is nearest to theirs, so that little is lost, and a batch has images
of one bucket, so that it is one tensor (NovelAI 2022; Podell et al. 2023, §2.3).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

Size = tuple[int, int]  # height, width


def bucket_sizes(resolution: int, step: int, *, most_elongated: float = 2.0) -> list[Size]:
    """Sizes of about resolution² pixels and no more, their sides multiples of `step`, from tall to wide.

    Args:
        resolution: the square's side, a multiple of `step`.
        step: pixels.
        most_elongated: the longer side is at most so many times the shorter.

    Raises:
        ValueError: `resolution` is no multiple of `step`.
    """
    if resolution < step or resolution % step:
        below = resolution - resolution % step
        raise ValueError(
            f"resolution: got {resolution}, expected a multiple of {step}; the nearest are"
            f" {max(below, step)} and {below + step}"
        )
    sizes = set()
    for short in range(step, resolution + 1, step):
        long = resolution**2 // short // step * step
        if long <= most_elongated * short:
            sizes |= {(short, long), (long, short)}
    return sorted(sizes, key=lambda size: (size[1] / size[0], size))


def nearest_bucket(size: Size, sizes: Sequence[Size]) -> int:
    """The index of the bucket whose ratio of sides is nearest, in logarithms; the first of equals."""
    ratio = math.log(size[1] / size[0])
    return min(range(len(sizes)), key=lambda i: abs(ratio - math.log(sizes[i][1] / sizes[i][0])))


class Batches:
    """Which images each step reads: an endless row of epochs, a function of the seed alone.

    Each epoch is a permutation of all images. They go to their buckets in this order, and whenever a bucket
    holds a batch that is the next one; so every image comes equally often, those of rare shapes too.

    Args:
        buckets: the bucket of each image, (N,).
        batch_size: images in a batch, over all processes.
        seed: of the permutations.
    """

    def __init__(self, buckets: Sequence[int], batch_size: int, seed: int) -> None:
        if not len(buckets):
            raise ValueError("buckets: there is no image")
        self._buckets, self._batch_size, self._seed = list(buckets), batch_size, seed
        self._next, self._batches = 0, self._from_the_start()

    def at(self, step: int) -> list[int]:
        """The images of step 0, 1, …; asked in order this is quick."""
        if step < self._next:
            self._next, self._batches = 0, self._from_the_start()
        while self._next < step:  # a resumed run passes over what it has seen
            next(self._batches)
            self._next += 1
        self._next += 1
        return next(self._batches)

    def _from_the_start(self) -> Iterator[list[int]]:
        waiting: dict[int, list[int]] = {bucket: [] for bucket in self._buckets}
        epoch = 0
        while True:
            order = np.random.Generator(np.random.PCG64((self._seed, epoch))).permutation(len(self._buckets))
            for image in order.tolist():
                batch = waiting[self._buckets[image]]
                batch.append(image)
                if len(batch) == self._batch_size:
                    yield list(batch)
                    batch.clear()
            epoch += 1
