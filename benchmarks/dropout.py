"""How attention with dropout is judged, where every contender draws its own mask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import fastformer
from benchmarks.case import Case
from fastformer.testing import assert_as_accurate, in_float64

# How far the moments may lie from what they should be. The smallest case has 2 * 10^5 outputs, which makes
# 0.05 more than ten standard deviations; a p of 0.11 in place of 0.1 moves the second moment by 0.11.
TOLERANCE = 0.05


class Judge:
    """In place of the rule, for `Case.judge`: inputs are query, key, value, seed and perhaps grad_out.

    No two contenders drop the same, so that no two agree and naive sets no standard. fastformer is held to
    the rule against its own reference backend with the same seed. The others are not comparable in accuracy:
    of them is checked what holds for any mask. Everything is finite, and the output's deviation from
    attention without dropout has over all elements the mean 0 and the variance that dropout with this p has,
    p / (1 - p) * sum over keys of (weight * value)^2. Gradients of theirs are only checked to be finite.
    """

    def __init__(self, p: float) -> None:
        self.p = p

    def __call__(self, case: Case, inputs: tuple) -> Callable[[str, Any], None]:
        expected, deviation = _without_dropout(*in_float64(inputs[:3]), self.p)
        ours = case.contenders["fastformer"]
        with fastformer.use_backend("reference"):
            baseline, oracle = ours(*inputs), ours(*in_float64(inputs))

        def judge(contender: str, actual: Any) -> None:
            tensors = actual if isinstance(actual, tuple) else (actual,)
            for index, tensor in enumerate(tensors):
                assert tensor.isfinite().all(), f"{contender}[{index}]: not finite everywhere"
            scaled = (tensors[0].double() - expected) / deviation
            mean, square = scaled.mean().item(), scaled.square().mean().item()
            assert abs(mean) <= TOLERANCE and abs(square - 1) <= TOLERANCE, (
                f"{contender}: over dropout's own deviation the output's has mean {mean:.3f} and mean square "
                f"{square:.3f}; wanted 0 and 1 to within {TOLERANCE}"
            )
            if contender == "fastformer":
                assert_as_accurate(actual, baseline, oracle, contender)

        return judge


def _without_dropout(query, key, value, p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention without dropout, and the standard deviation of each element under dropout."""
    with torch.no_grad():
        weights = (query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5).softmax(-1)
        return weights @ value, (weights.square() @ value.square() * (p / (1 - p))).sqrt()
