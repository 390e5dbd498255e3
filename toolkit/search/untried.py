"""Points of the space that nobody has tried."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import numpy as np

from toolkit.search.space import Parameters, Space, digest

DRAWS = 500
"""All points of a space are looked at if they are no more than so many, else so many random ones."""


class Untried:
    """Looks for a point that is not among those tried; once it found none, not again until others are tried.

    Args:
        space: what may be tried.
        seed: of the order.
    """

    def __init__(self, space: Space, seed: int) -> None:
        self._space, self._seed = space, seed
        self._exhausted: frozenset[str | None] | None = None
        """What was tried when no other was found."""

    def is_exhausted(self, tried: frozenset[str | None]) -> bool:
        """Whether none was found beside these before."""
        return self._exhausted == tried

    def find(self, tried: frozenset[str | None], draw: int) -> Parameters | None:
        """A point whose digest is not in `tried`; None: there is none, or none that was drawn.

        Args:
            tried: digests.
            draw: number of this draw; the same gives the same point.
        """
        if not self.is_exhausted(tried):
            generator = np.random.default_rng([self._seed, draw])
            for name, point in self._all(generator) if self._space.size <= DRAWS else self._some(generator):
                if name not in tried:
                    return point
        self._exhausted = tried
        return None

    def _all(self, generator: np.random.Generator) -> Iterator[tuple[str, Parameters]]:
        for index in generator.permutation(len(self._points)):
            yield self._points[index]

    def _some(self, generator: np.random.Generator) -> Iterator[tuple[str, Parameters]]:
        for _ in range(DRAWS):
            point = {one.name: one.values[generator.integers(len(one.values))] for one in self._space.dimensions}
            yield digest(self._space.config(point)), point

    @cached_property
    def _points(self) -> list[tuple[str, Parameters]]:
        return [(digest(self._space.config(point)), point) for point in self._space.points()]
