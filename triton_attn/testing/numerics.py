"""The tolerance policy: when is a kernel right? The only file with a tolerance in it.

Truth is the reference in float64, the yardstick the reference in the working dtype.

- Tier 0, exact: shape; integers and truth values; infinities and NaN exactly where the truth has them, and where the dtype's largest
  number is less than the truth or within its bound: there rounding gives infinity too.
- Tier 1, componentwise: |error| <= K u S + eta for every element, u being the unit roundoff and S the same formula on magnitudes
  (the mechanism's `bound`). K is 4, and 8 for gradients in float32 and float64, whose sums accumulate in the working precision. What
  is `borrowed`, computed by torch's own call, has 8 throughout in float32: torch 2.13's fused CPU call was seen at 4.9, kernels were not.
  It needs no assumption on the data, and catches index, mask and NaN faults.
- Tier 2, statistical: the RMS error is at most twice the yardstick's (three times for gradients) and a twentieth of u S, which counts
  where the yardstick happens to be exact. On tensors of 1024 elements and more, drawn from a normal distribution of spread one at
  most; it catches lost precision.

Where nobody wrote a `bound`, `testing.sensitivity` measures S, and K is 8.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ROUNDOFF = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
SMALLEST = {torch.float64: 1e-300, torch.float32: 1e-36, torch.float16: 2.0**-24, torch.bfloat16: 1e-36}
TF32_ROUNDOFF = 2.0**-10
FACTOR, FACTOR_WIDE = 4.0, 8.0
RMS_FACTOR, RMS_FACTOR_GRADIENT, RMS_SHARE = 2.0, 3.0, 0.05
ENOUGH = 1024


@dataclass(frozen=True)
class Comparison:
    """How far a tensor is from the truth, as shares of what is allowed: above 1 is wrong. `fault` says what, empty if right."""

    name: str
    ratio: float  # tier 1, worst element
    rms: float  # tier 2, 0 where it does not apply
    fault: str = ""

    @property
    def share(self) -> float:
        return max(self.ratio, self.rms)


def compare(
    name: str,
    found: Tensor,
    truth: Tensor,
    size: Tensor,
    *,
    dtype: torch.dtype,
    borrowed: bool = False,
    gradient: bool = False,
    yardstick: Tensor | None = None,
    tf32: bool = False,
    measured: bool = False,
) -> Comparison:
    """Judge one tensor computed from inputs of `dtype`.

    `size` is S of the bound, `measured` if nobody derived it; `yardstick` is the naive result in that dtype.
    """
    if found.shape != truth.shape:
        return Comparison(name, float("inf"), 0.0, f"{name} has shape {tuple(found.shape)}, not {tuple(truth.shape)}")
    if not (found.is_floating_point() and truth.is_floating_point()):
        return _exactly(name, found.detach().cpu(), truth.detach().cpu())
    largest = torch.finfo(found.dtype).max
    found, truth, size = (x.detach().to("cpu", torch.float64) for x in (found, truth, size))
    unit = TF32_ROUNDOFF if tf32 and dtype == torch.float32 else ROUNDOFF[dtype]
    wide = measured or (gradient and dtype in (torch.float32, torch.float64)) or (borrowed and dtype == torch.float32)
    factor = FACTOR_WIDE if wide else FACTOR
    if dtype == torch.float64:
        factor *= 2  # the truth errs as much
    overflown = truth.isfinite() & (truth.abs() + factor * unit * size > largest) & (found == truth.sign() * torch.inf)
    truth = torch.where(overflown, found, truth)
    odd = truth.isfinite() != found.isfinite()
    odd |= ~truth.isfinite() & ~((found == truth) | (found.isnan() & truth.isnan()))
    if odd.any():
        where = tuple(odd.nonzero()[0].tolist())
        return Comparison(name, float("inf"), 0.0, f"{name}{list(where)} is {found[where].item()}, the truth {truth[where].item()}")
    finite = truth.isfinite()
    allowing = (size >= 0) & size.isfinite()
    if (finite & ~allowing).any():
        where = tuple((finite & ~allowing).nonzero()[0].tolist())
        return Comparison(
            name, float("inf"), 0.0, f"{name}{list(where)} has no bound: S is {size[where].item()}; allowed: 0 and more, finite"
        )
    error = (found - truth).masked_fill(~finite, 0.0).abs()
    if error.numel() == 0:
        return Comparison(name, 0.0, 0.0)
    allowed = factor * unit * size.masked_fill(~finite, 0.0) + SMALLEST[dtype]
    shares = error / allowed
    worst = tuple(int(i) for i in torch.unravel_index(shares.argmax(), shares.shape))
    ratio, fault = shares[worst].item(), ""
    if ratio > 1.0:
        fault = f"{name}{list(worst)} is {found[worst].item():.9g}, the truth {truth[worst].item():.9g}: {ratio:.2f} times its bound"
    rms = 0.0
    if yardstick is not None and dtype != torch.float64 and error.numel() >= ENOUGH:  # in float64 the yardstick is the truth
        naive = _rms((yardstick.detach().to("cpu", torch.float64) - truth).masked_fill(~finite, 0.0))
        limit = (RMS_FACTOR_GRADIENT if gradient else RMS_FACTOR) * naive + RMS_SHARE * unit * _rms(size.masked_fill(~finite, 0.0))
        rms = _rms(error) / (limit + SMALLEST[dtype])
        if rms > 1.0 and not fault:
            fault = f"{name} has an RMS error of {_rms(error):.3g}, {rms:.2f} times what is allowed beside the naive {naive:.3g}"
    return Comparison(name, ratio, rms, fault)


def _exactly(name: str, found: Tensor, truth: Tensor) -> Comparison:
    """Integers and truth values have no roundoff."""
    if found.is_floating_point() or truth.is_floating_point():
        return Comparison(name, float("inf"), 0.0, f"{name} is of {found.dtype}, the truth of {truth.dtype}")
    wrong = found != truth
    if wrong.any():
        where = tuple(wrong.nonzero()[0].tolist())
        return Comparison(name, float("inf"), 0.0, f"{name}{list(where)} is {found[where].item()}, the truth {truth[where].item()}")
    return Comparison(name, 0.0, 0.0)


def assert_matches(name: str, found: Tensor, truth: Tensor, size: Tensor, *, context: Any = "", **how: Any) -> Comparison:
    """`compare`, which takes the same arguments, and AssertionError unless right."""
    result = compare(name, found, truth, size, **how)
    assert_right([result], context)
    return result


def assert_right(comparisons: Sequence[Comparison], context: Any = "") -> None:
    """Raise AssertionError with every fault and every measured ratio."""
    if any(c.fault for c in comparisons):
        table = "\n".join(f"  {c.name:<12} bound {c.ratio:8.3f}   rms {c.rms:8.3f}   {c.fault}" for c in comparisons)
        raise AssertionError(f"{context}\nshares of what is allowed; above 1 is wrong\n{table}")


def _rms(tensor: Tensor) -> float:
    return float(tensor.square().mean().sqrt())
