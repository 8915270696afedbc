"""Mixes datasets by weight: which dataset gives sample n, and how many it gave before, as a function of n alone.

The samples of a mixture are dealt down a balanced tree of the sources.  At each fork with integer weights a and b the
first m samples give floor((m*a + (a + b) // 2) / (a + b)) to the left, the rest to the right: error diffusion, with
its running sum written in closed form.  So any place of the schedule is computed without walking there, nothing is
drawn at random, and in every prefix each source has its share to within half a sample for each level of the tree."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Generic, Literal, Protocol, TypeVar, get_args

import numpy as np
import numpy.typing as npt

from schemas.errors import SpecError, nearest_name

Stop = Literal["first", "all", "never"]
"""When a pass over the mixture ends: before the first source would repeat, when all have been seen, or not at all."""

MAX_WEIGHT_SUM = 1 << 20
"""Integer weights sum up to at most this, so that products with sample numbers up to 2^42 fit 64 bits."""
MAX_SAMPLES = 1 << 42


class SourceInfo(Protocol):
    """What must agree between the datasets of a mixture."""

    @property
    def bits(self) -> int: ...
    @property
    def weight_sha256(self) -> str: ...


class Source(Protocol):
    """A dataset that can be mixed."""

    def __len__(self) -> int: ...
    @property
    def info(self) -> SourceInfo: ...


SourceType = TypeVar("SourceType", bound=Source)


class Mixture(Generic[SourceType]):
    """Datasets and the share of samples that each gives; `stop` says how long one pass lasts.

    A mixture of `{"photos": (a, 0.7), "clips": (b, 0.3)}` takes seven samples of ten from `a`.  Only the ratios of the
    weights count.  Sample `position` of a source, beyond its length, belongs to its next round: round number
    `position // len(source)`, sample `position % len(source)` of it."""

    def __init__(self, sources: Mapping[str, tuple[SourceType, float]], stop: Stop = "first") -> None:
        """Raises SpecError: no source, an empty one, a weight that is not above 0, or different tokenizers."""
        if stop not in get_args(Stop):
            raise SpecError(
                f"stop={stop!r}: choose from {', '.join(get_args(Stop))}.{nearest_name(str(stop), get_args(Stop))}"
            )
        if not sources:
            raise SpecError("a mixture needs at least one dataset.")
        self.names = tuple(sources)
        self.datasets = tuple(dataset for dataset, _ in sources.values())
        self.lengths = tuple(len(dataset) for dataset in self.datasets)
        self.weights = integer_weights({name: weight for name, (_, weight) in sources.items()})
        self.stop: Stop = stop
        for name, length in zip(self.names, self.lengths, strict=True):
            if length == 0:
                raise SpecError(f"{name!r} has no samples; leave it out of the mixture.")
        self._require_one_tokenizer()
        self._tree = _build(self.weights, range(len(self.names)))

    @property
    def num_samples(self) -> int | None:
        """Samples of one pass, a function of lengths and weights; None where it never ends."""
        if self.stop == "never":
            return None
        if self.stop == "first":
            return min(self.first_after(number, length + 1) for number, length in enumerate(self.lengths)) - 1
        return max(self.first_after(number, length) for number, length in enumerate(self.lengths))

    def schedule(self, start: int, count: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        """Of samples `start` to `start + count - 1`: number of the source, and how many it gave before."""
        if start < 0 or count < 0 or start + count > MAX_SAMPLES:
            raise SpecError(f"samples {start:,} to {start + count:,} of a mixture: they go from 0 to 2^42.")
        counts_SN = self.counts(np.arange(start, start + count + 1))
        source_N = np.diff(counts_SN).argmax(0).astype(np.int32)
        return source_N, np.take_along_axis(counts_SN[:, :-1], source_N[np.newaxis].astype(np.int64), 0)[0]

    def counts(self, samples: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """How many of the first `samples[n]` samples each source gives: int64 [sources, n]."""
        counts_SN = np.empty((len(self.names), len(samples)), np.int64)
        pending: list[tuple[_Tree, npt.NDArray[np.int64]]] = [(self._tree, np.asarray(samples, np.int64))]
        while pending:
            tree, total_N = pending.pop()
            if isinstance(tree, int):
                counts_SN[tree] = total_N
                continue
            whole = tree.left_weight + tree.right_weight
            left_N = (total_N * tree.left_weight + whole // 2) // whole
            pending += [(tree.left, left_N), (tree.right, total_N - left_N)]
        return counts_SN

    def first_after(self, source: int, count: int) -> int:
        """The fewest samples of the mixture among which `source` gives `count`."""
        path = []
        tree = self._tree
        while not isinstance(tree, int):
            goes_left = source in tree.left_sources
            path.append((tree, goes_left))
            tree = tree.left if goes_left else tree.right
        for fork, goes_left in reversed(path):
            if count == 0:
                return 0
            whole, half = fork.left_weight + fork.right_weight, (fork.left_weight + fork.right_weight) // 2
            if goes_left:
                count = -((half - count * whole) // fork.left_weight)
            else:
                count = ((count - 1) * whole + half) // fork.right_weight + 1
        return count

    def _require_one_tokenizer(self) -> None:
        first = self.datasets[0].info
        for name, dataset in zip(self.names[1:], self.datasets[1:], strict=True):
            if dataset.info.bits != first.bits:
                raise SpecError(
                    f"{self.names[0]!r} has tokens of {first.bits} bits and {name!r} of {dataset.info.bits}; the "
                    f"datasets of a mixture must come from one tokenizer."
                )
            if dataset.info.weight_sha256 != first.weight_sha256:
                raise SpecError(
                    f"{self.names[0]!r} was made with tokenizer {first.weight_sha256[:8]} and {name!r} with "
                    f"{dataset.info.weight_sha256[:8]}: the same token means different things in them. Tokenize one "
                    f"of them again."
                )


def integer_weights(weights: Mapping[str, float]) -> tuple[int, ...]:
    """The smallest integers in the ratio of `weights` as written in decimals; 0.7 and 0.3 give 7 and 3.

    Where their sum would pass 2^20 they are rounded to shares of that, each at least 1.  Raises SpecError."""
    fractions = []
    for name, weight in weights.items():
        if not math.isfinite(weight) or weight <= 0:
            raise SpecError(f"the weight of {name!r} is {weight}; give a number above 0.")
        fractions.append(Fraction(str(weight)))
    common = math.lcm(*(fraction.denominator for fraction in fractions))
    integers = [int(fraction * common) for fraction in fractions]
    divisor = math.gcd(*integers)
    integers = [integer // divisor for integer in integers]
    if sum(integers) > MAX_WEIGHT_SUM:
        shares = MAX_WEIGHT_SUM - len(integers)
        integers = [1 + integer * shares // sum(integers) for integer in integers]
    return tuple(integers)


@dataclass(frozen=True, slots=True)
class _Fork:
    left: _Tree
    right: _Tree
    left_weight: int
    right_weight: int
    left_sources: range


_Tree = _Fork | int


def _build(weights: tuple[int, ...], sources: range) -> _Tree:
    if len(sources) == 1:
        return sources[0]
    middle = len(sources) // 2
    left, right = sources[:middle], sources[middle:]
    left_weight, right_weight = sum(weights[number] for number in left), sum(weights[number] for number in right)
    return _Fork(_build(weights, left), _build(weights, right), left_weight, right_weight, left)
