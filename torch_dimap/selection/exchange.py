"""What processes that share weights tell one another."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple, Protocol

import numpy as np


class Part(NamedTuple):
    """What a process tells of its part of a weight."""

    numbers: tuple[float, ...] = ()
    values: np.ndarray = np.empty(0, np.float32)
    counts: np.ndarray | None = None  # how often each value occurs; None: once


class Exchange(Protocol):
    """How they tell it. All processes make the same calls, and get the same answers."""

    @property
    def processes(self) -> int: ...

    def gather(self, parts: Sequence[Part]) -> list[list[Part]]:
        """Return for each place in the list what every process has put there."""

    def add(self, numbers: np.ndarray) -> np.ndarray:
        """Sum vectors of float64 over all processes."""

    def least(self, numbers: np.ndarray) -> np.ndarray:
        """Return the least of each number over all processes."""


def add_exactly(numbers: Sequence[Fraction], exchange: Exchange) -> list[Fraction]:
    """Sum fractions over all processes; their denominators are powers of two."""
    if not numbers:
        return []
    return [sum(map(_fraction, parts), Fraction(0))
            for parts in exchange.gather([_part(x) for x in numbers])]  # fmt: skip


def _part(number: Fraction) -> Part:
    digits = number.numerator.to_bytes(number.numerator.bit_length() // 8 + 1, "little")
    exponent = number.denominator.bit_length() - 1
    return Part((float(exponent),), np.frombuffer(digits, np.uint8))


def _fraction(part: Part) -> Fraction:
    numerator = int.from_bytes(part.values.tobytes(), "little")
    return Fraction(numerator, 1 << int(part.numbers[0]))
