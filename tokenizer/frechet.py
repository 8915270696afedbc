"""The Fréchet distance between two sets of features, each taken for a normal distribution (Heusel et al. 2017).

Shape letters: N items, F features."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor


class FeatureStatistics:
    """Features that come in batches, in fp64: the features themselves while they are fewer than F, else their sums."""

    def __init__(self) -> None:
        self.count = 0
        self._rows: list[Tensor] = []
        self._sum_F: Tensor | None = None
        self._products_FF: Tensor | None = None

    def add(self, features_NF: Tensor) -> None:
        """Count a batch."""
        features = features_NF.detach().to("cpu", torch.float64)
        self.count += len(features)
        self._rows.append(features)
        self.__dict__.pop("root", None)
        if self._sum_F is not None or self.count > features.shape[1]:
            rows_NF = torch.cat(self._rows)
            self._rows.clear()
            sums, products = rows_NF.sum(0), rows_NF.T @ rows_NF
            self._sum_F = sums if self._sum_F is None else self._sum_F + sums
            self._products_FF = products if self._products_FF is None else self._products_FF + products

    @property
    def scaled(self) -> Tensor | None:
        """[N, F]: centred features over sqrt(N - 1), whose products are the covariance; None if only sums are."""
        if not self._rows:
            return None
        rows_NF = torch.cat(self._rows)
        scaled_NF: Tensor = (rows_NF - rows_NF.mean(0)) / (self.count - 1) ** 0.5
        return scaled_NF

    @property
    def mean(self) -> Tensor:
        """fp64 [F]."""
        total_F = torch.cat(self._rows).sum(0) if self._sum_F is None else self._sum_F
        return total_F / self.count

    @property
    def covariance(self) -> Tensor:
        """fp64 [F, F], unbiased; needs two items."""
        scaled_NF = self.scaled
        if scaled_NF is not None:
            return scaled_NF.T @ scaled_NF
        assert self._products_FF is not None
        return (self._products_FF - self.count * torch.outer(self.mean, self.mean)) / (self.count - 1)

    @cached_property
    def root(self) -> Tensor:
        """[F, F]: the symmetric root of the covariance."""
        values, vectors = torch.linalg.eigh(self.covariance)
        # Fewer items than features leave eigenvalues of 0, which rounding makes a little negative.
        root_FF: Tensor = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
        return root_FF


def frechet_distance(first: FeatureStatistics, second: FeatureStatistics) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)); at least 0, and biased upwards for few items."""
    x_NF, y_NF = first.scaled, second.scaled
    # tr (C1 C2)^(1/2) is the sum of the singular values of A B^T for any A and B with C1 = A^T A and C2 = B^T B.
    if x_NF is not None and y_NF is not None:
        shared = torch.linalg.svdvals(x_NF @ y_NF.T).sum()
        traces = x_NF.square().sum() + y_NF.square().sum()
    else:
        covariance_FF = second.covariance
        shared = torch.linalg.eigvalsh(first.root @ covariance_FF @ first.root).clamp_min(0).sqrt().sum()
        traces = first.covariance.trace() + covariance_FF.trace()
    return max(0.0, float((first.mean - second.mean).square().sum() + traces - 2 * shared))
