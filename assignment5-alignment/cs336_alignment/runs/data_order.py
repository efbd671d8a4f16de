"""What a run draws at random, as a function of its seed and of how much came before, so that a resumed run goes on."""

import math
from dataclasses import dataclass

import numpy as np


def shuffled_indices(size: int, seed: int, start: int, count: int) -> list[int]:
    """Elements `start` to `start + count` of an endless sequence of indices below `size`.

    The sequence goes through all indices in a random order, then through all of them in another one, and so on.
    """
    result: list[int] = []
    while len(result) < count:
        epoch, position = divmod(start + len(result), size)
        order = np.random.default_rng((seed, epoch)).permutation(size)
        result += order[position : position + count - len(result)].tolist()
    return result


@dataclass(frozen=True)
class Epochs:
    """Batches that go through all elements `epochs` times, each time in another random order."""

    size: int
    """Elements to go through."""
    batch_size: int
    epochs: int
    seed: int
    """Fixes the order."""

    @property
    def updates(self) -> int:
        """How many batches there are; the last one may be short."""
        return math.ceil(self.size * self.epochs / self.batch_size)

    def batch(self, number: int) -> list[int]:
        """The indices of batch `number`, from 1."""
        start = (number - 1) * self.batch_size
        count = min(self.batch_size, self.size * self.epochs - start)
        return shuffled_indices(self.size, self.seed, start, count)


def seed_of_draw(seed: int, number: int) -> int:
    """The seed of one of many draws: below 2^32, and unrelated for different numbers."""
    return int(np.random.SeedSequence((seed, number)).generate_state(1)[0])
