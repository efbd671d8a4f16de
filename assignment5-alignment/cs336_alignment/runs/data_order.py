"""The random order of the data, as a function of the seed and the position, so that a resumed run continues it."""

import math
from dataclasses import dataclass

import numpy as np


def shuffled_indices(size: int, seed: int, start: int, count: int) -> list[int]:
    """Return the elements `start` to `start + count` of an endless sequence of indices below `size`.

    The sequence contains all indices in a random order, then all of them in another random order, and so on.
    """
    result: list[int] = []
    while len(result) < count:
        epoch, position = divmod(start + len(result), size)
        order = np.random.default_rng((seed, epoch)).permutation(size)
        result += order[position : position + count - len(result)].tolist()
    return result


@dataclass(frozen=True)
class Epochs:
    """Batches of indices that contain all elements `epochs` times, each time in another random order."""

    size: int
    """Number of elements."""
    batch_size: int
    epochs: int
    seed: int
    """Seed of the order."""

    @property
    def updates(self) -> int:
        """Number of batches. The last one may be short."""
        return math.ceil(self.size * self.epochs / self.batch_size)

    def batch(self, number: int) -> list[int]:
        """Return the indices of a batch, numbered from 1."""
        start = (number - 1) * self.batch_size
        count = min(self.batch_size, self.size * self.epochs - start)
        return shuffled_indices(self.size, self.seed, start, count)


def seed_of_draw(seed: int, number: int) -> int:
    """Return the seed of one of many draws: below 2^32, and unrelated for different numbers."""
    return int(np.random.SeedSequence((seed, number)).generate_state(1)[0])
