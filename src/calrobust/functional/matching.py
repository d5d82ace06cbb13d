"""The probability that a pair matches."""

import warnings

import torch
from torch import Tensor
from torch.nn.functional import softplus

from calrobust._checks import check_float64, check_floating, check_one_device, check_tensor

BLOCK = 2**20  # pairs
SMALL_STEP = 1e-9  # of standardised similarities
MAX_STEPS = 100
EXTREME = 100.0


def fit_line(similarities: Tensor, matched: Tensor) -> Tensor:
    """``[2]``: the slope and the intercept of :class:`~calrobust.PlattScaler`."""
    check_floating(similarities=similarities)
    check_tensor(matched=matched)
    check_float64(similarities=similarities)
    if matched.dtype != torch.bool:
        raise TypeError(f"matched must have dtype torch.bool, got {matched.dtype}; convert it with .bool()")
    if similarities.shape != matched.shape or not similarities.numel():
        raise ValueError(
            f"similarities and matched must have one shape and hold at least one pair, got {list(similarities.shape)} "
            f"and {list(matched.shape)}; pass one flag for each pair"
        )
    check_one_device(similarities=similarities, matched=matched)
    if not similarities.isfinite().all():
        raise ValueError("similarities must be finite, got NaN or inf; drop such pairs")
    with torch.no_grad(), torch.autocast(similarities.device.type, enabled=False):
        line, cause = _solve(similarities.detach().flatten(), matched.flatten())
    if cause:
        a, b = line.tolist()
        warnings.warn(f"the data do not determine a and b: {cause}; a = {a:.6g}, b = {b:.6g}", stacklevel=3)
    return line


def _solve(z: Tensor, matched: Tensor) -> tuple[Tensor, str]:
    """The line, and why the data do not determine it."""
    mean, others, cause = z.mean(dtype=torch.float64), z[~matched], ""
    squares = torch.stack([(block.double() - mean).square().sum() for block in z.split(BLOCK)])
    spread, hits = (squares.sum() / len(z)).sqrt(), z[matched]
    if not len(hits) or not len(others):
        cause = f"{'all' if len(hits) else 'no'} pairs match"
    elif spread == 0 or hits.mean(dtype=torch.float64) <= others.mean(dtype=torch.float64):
        cause = "matching pairs are not more similar than others"
    if cause:
        slope = torch.where(spread > 0, 1 / (EXTREME * spread), 1)
        odds = (len(hits) + 1) / (len(others) + 1)
        return torch.stack((slope, torch.log(slope.new_tensor(odds)) - slope * mean)), cause
    targets = 0.0, 1.0
    if hits.amin() >= others.amax():
        cause, targets = "a threshold separates them", (1 / (len(others) + 2), (len(hits) + 1) / (len(hits) + 2))
    (slope, intercept), converged = _newton(z, matched, mean, spread, *targets)
    line = torch.stack((slope / spread, intercept - slope * mean / spread))
    return line, cause if converged else f"Newton's method did not converge in {MAX_STEPS} steps"


def _newton(z: Tensor, matched: Tensor, mean: Tensor, spread: Tensor, low: float, high: float) -> tuple[Tensor, bool]:
    """The line for ``(z - mean) / spread``, and whether the last step was a small one."""
    line, step, lowest = mean.new_zeros(2), mean.new_zeros(2), float("inf")
    for _ in range(MAX_STEPS):
        loss, gradient, hessian = mean.new_zeros(()), mean.new_zeros(2), 1e-9 * torch.eye(2).to(mean)
        for some, flags in zip(z.split(BLOCK), matched.split(BLOCK), strict=True):
            x = torch.stack(((some.double() - mean) / spread, torch.ones_like(some, dtype=torch.float64)))
            target, logits = torch.where(flags, high, low), line @ x
            p = logits.sigmoid()
            loss += (softplus(logits) - target * logits).sum()
            gradient += x @ (p - target)
            hessian += (x * p * (1 - p)) @ x.T
        if float(loss) > lowest * (1 + 1e-12):  # the step went too far
            step = step / 2
            line = line - step
            continue
        lowest, step = float(loss), -torch.linalg.solve(hessian, gradient)
        line = line + step
        if step.abs().max() <= SMALL_STEP * (1 + line.abs().max()):
            return line, True
    return line, False
