"""Fits of a temperature and of a line."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from calrobust._checks import (
    check_bool,
    check_float64,
    check_floating,
    check_kind,
    check_label_values,
    check_one_device,
    check_softmax_exists,
    warn,
)
from calrobust.functional.scoring import as_rows, block_rows

FEW = 2**18  # logits that are computed in float64
SUBSET_ROWS = 4096
SMALL_STEP = 2e-5  # relative
MAX_STEPS = 100
LARGEST_RATIO = 10.0
EXTREME = 100.0  # T of degenerate data over the logits' spread
HUGE = 1e20  # logits this far below the top overflow in products
FLOOR = -200.0  # replaces them once divided by T
GAP = 32.0  # masks are this many times as far below the top as others
GAP_LOGITS = 4096  # looked at for masks
NEGLIGIBLE = 5.0  # nats below the top
BLOCK = 2**20  # pairs
SMALL_LINE_STEP = 1e-9


class _Data(NamedTuple):
    logits: Tensor
    top: Tensor  # [N] highest logit
    own: Tensor  # [N] the label's logit - top
    weight: Tensor  # [N]
    huge: bool = False

    def differences(self, dtype: torch.dtype) -> Iterator[Tensor]:
        step = block_rows(self.logits, dtype)
        buffer = self.logits.new_empty(step, self.logits.shape[1], dtype=dtype)
        for logits, top in zip(self.logits.split(step), self.top.split(step), strict=True):
            yield torch.sub(logits.to(dtype), top[:, None], out=buffer[: len(logits)])


def fit_temperature(
    logits: Tensor, target: Tensor, *, ignore_index: int | None = None, weight: Tensor | None = None
) -> Tensor:
    r"""The temperature T > 0 that minimises the negative log-likelihood of ``logits / T``.

    .. math:: T = \arg\min_{T > 0} -\sum_i w_{y_i} \log \mathrm{softmax}(z_i / T)_{y_i}

    Data without a minimum (separable, anti-correlated or constant logits) give a warning and the T that
    :doc:`/derivations` names. A single sample or class gives a warning too.

    Args:
        logits: shape ``[N, C]`` or ``[N, C, ...]``, floating; ``-inf``, or a far lower number, masks a class.
        target: shape ``[N]`` or ``[N, ...]``, int64 labels in [0, C).
        ignore_index: samples with this label are left out.
        weight: shape ``[C]``, floating, >= 0, as in :func:`torch.nn.functional.cross_entropy`.

    Returns:
        A float64 scalar with a relative error of about 1e-7, or 1e-5 where logits hardly differ.

    Raises:
        TypeError, ValueError: as for :func:`~calrobust.functional.calibration_error`, or there are no samples, a logit
            is NaN or +inf, a label's logit is ``-inf``, or a weight is invalid.

    Example:
        >>> import torch
        >>> from calrobust.functional import fit_temperature
        >>> logits, target = torch.tensor([[8.0, 0.0]]).expand(4, 2), torch.tensor([0, 0, 0, 1])
        >>> fit_temperature(logits, target)  # the odds are 3 to 1: exp(8 / T) = 3
        tensor(7.2819, dtype=torch.float64)

    Reference: Guo et al., 2017, :arxiv:`1706.04599`, section 4.2.
    """
    logits, target = as_rows(target, ignore_index, logits=logits)
    check_label_values(target, logits.shape[1])
    if weight is not None:
        check_floating(weight=weight)
        check_one_device(weight=weight, logits=logits)
        if weight.shape != logits.shape[1:] or not (weight.isfinite() & (weight >= 0)).all():
            raise ValueError(
                f"weight must be a finite number >= 0 for each of the {logits.shape[1]} classes, got shape "
                f"{list(weight.shape)} and values from {weight.min():g} to {weight.max():g}"
            )
        logits, target = (each[weight[target] > 0] for each in (logits, target))
    if len(logits) == 0:
        raise ValueError("logits must hold at least one sample, got none; pass the validation set's logits and labels")
    check_kind(from_logits=True, logits=logits)
    return logits.new_tensor(determined_temperature(logits, target, weight), dtype=torch.float64)


def determined_temperature(logits: Tensor, target: Tensor, weight: Tensor | None = None, of: str = "") -> float:
    temperature, causes = best_temperature(logits, target, weight)
    if causes:
        warn(f"the data do not determine a temperature{of}: {'; '.join(causes)}; T = {temperature:.6g}")
    return temperature


def best_temperature(logits: Tensor, target: Tensor, weight: Tensor | None = None) -> tuple[float, list[str]]:
    """T, and why the data do not determine it."""
    with torch.no_grad(), torch.autocast(logits.device.type, enabled=False):
        data, means = _scan(logits, target)
        if weight is not None:
            data = data._replace(weight=(weight.double() / weight.max())[target].to(data.top.dtype))
        limit = _mask_distance(data, means)
        # Masks affect only the first guess, and degenerate data.
        temperature, causes = _solve(data, _visible_means(data, limit) if data.huge or limit < math.inf else means)
        if causes and limit / temperature < NEGLIGIBLE:  # these were no masks
            temperature, causes = _solve(data, _visible_means(data, math.inf))
    if len(target) == 1:
        causes.append("there is a single sample")
    elif (target == target[0]).all():
        causes.append(f"all labels are of class {int(target[0])}")
    return temperature, causes


def _scan(logits: Tensor, target: Tensor) -> tuple[_Data, Tensor]:
    """The data, and the mean of logit - top of each row."""
    dtype = torch.promote_types(logits.dtype, torch.float64 if logits.numel() <= FEW else torch.float32)
    top = logits.amax(1).to(dtype)
    if not top.isfinite().all():
        check_softmax_exists(target, logits=logits)
    own = logits.gather(1, target[:, None])[:, 0].to(dtype) - top
    if own.isneginf().any():
        row = int(own.isneginf().nonzero()[0])
        raise ValueError(
            f"target must not be a masked class, got label {int(target[row])} in row {row}, whose logit is -inf; "
            "unmask the class or drop the sample"
        )
    data = _Data(logits, top, own, torch.ones_like(top))
    means = torch.cat([differences.mean(1) for differences in data.differences(dtype)])
    return data._replace(huge=bool(means.amin() < -HUGE)), means


def _visible_means(data: _Data, limit: float) -> Tensor:
    """The means of classes less than ``limit`` below the top."""
    means = []
    for differences in data.differences(torch.float64):
        hidden = differences <= -limit
        means.append(differences.masked_fill_(hidden, 0).sum(1) / (~hidden).sum(1))
    return torch.cat(means).to(data.top.dtype)


def _mask_distance(data: _Data, means: Tensor) -> float:
    """How far below the top masks begin, or inf."""
    step = max(1, data.logits.numel() // GAP_LOGITS)
    some = torch.arange(0, len(means), step, device=means.device)
    some = torch.cat((some, means.argmin()[None]))  # has masks if any has
    distances = data.top[some, None] - data.logits[some].to(data.top.dtype)
    below = (distances > 0) & distances.isfinite()
    usual = distances.where(below, math.inf).amin(1).sort().values[len(some) // 10]
    ordered = distances[below & (distances >= usual)].sort().values
    wide = (ordered[1:] / ordered[:-1] > GAP).nonzero()
    return float(ordered[wide[0, 0] + 1]) / 2 if len(wide) else math.inf


def _solve(data: _Data, means: Tensor) -> tuple[float, list[str]]:
    spread = -float(means.mean(dtype=torch.float64))
    if spread == 0:
        return 1.0, ["the logits of each sample are all equal, so that T changes nothing"]
    if (data.own == 0).all():
        return min(1.0, spread / EXTREME), ["they are separable, every label has the highest logit"]
    # The slope at 1/T = 0
    if float((data.weight * (means - data.own)).sum(dtype=torch.float64)) >= 0:
        return max(1.0, EXTREME * spread), ["logits and labels are uncorrelated or negatively correlated"]
    beta = 1 / spread
    step = len(means) // SUBSET_ROWS
    if step >= 4:
        subset = _Data(data.logits[::step], data.top[::step], data.own[::step], data.weight[::step], data.huge)
        beta, _ = _newton(subset, beta, max_steps=8)
        beta = min(max(beta, 1 / (EXTREME * spread)), EXTREME / spread)
    beta, converged = _newton(data, beta, max_steps=MAX_STEPS)
    return 1 / beta, [] if converged else [f"Newton's method did not converge in {MAX_STEPS} steps"]


def _newton(data: _Data, beta: float, *, max_steps: int) -> tuple[float, bool]:
    low, high = 0.0, math.inf  # the minimum is between them
    for _ in range(max_steps):
        gradient, curvature = _derivatives(data, beta).tolist()
        if gradient == 0:
            return beta, True
        low, high = (beta, high) if gradient < 0 else (low, beta)
        ratio = 1 - gradient / curvature if curvature > 0 else LARGEST_RATIO if gradient < 0 else 0.0
        new = beta * min(max(ratio, 1 / LARGEST_RATIO), LARGEST_RATIO)
        if not low < new < high:
            new = math.sqrt(low * high)
        if abs(new / beta - 1) <= SMALL_STEP:
            return new, True
        beta = new
    return beta, False


def _derivatives(data: _Data, beta: float) -> Tensor:
    """The derivatives in 1/T, times 1/T and 1/T²."""
    dtype = data.top.dtype
    buffer = data.logits.new_empty(block_rows(data.logits, dtype), data.logits.shape[1], dtype=dtype)
    sums = data.logits.new_zeros(2, dtype=torch.float64)
    for differences, weight in zip(data.differences(dtype), data.weight.split(len(buffer)), strict=True):
        scaled = differences.mul_(beta)
        if data.huge:
            scaled.clamp_(min=FLOOR)
        weighted = torch.softmax(scaled, 1, out=buffer[: len(scaled)])
        mean = weighted.mul_(scaled).sum(1)
        square = weighted.mul_(scaled).sum(1)
        sums += (torch.stack((mean, square - mean.square())) * weight).sum(1, dtype=torch.float64)
    sums[0] -= beta * (data.weight * data.own).sum(dtype=torch.float64)
    return sums


def fit_line(similarities: Tensor, matched: Tensor) -> Tensor:
    check_floating(similarities=similarities)
    check_bool(matched=matched)
    check_float64(similarities=similarities)
    if similarities.shape != matched.shape or not similarities.numel():
        raise ValueError(
            f"similarities and matched must have one shape and hold at least one pair, got {list(similarities.shape)} "
            f"and {list(matched.shape)}; pass one flag for each pair"
        )
    check_one_device(similarities=similarities, matched=matched)
    if not similarities.isfinite().all():
        raise ValueError("similarities must be finite, got NaN or inf; drop such pairs")
    with torch.no_grad(), torch.autocast(similarities.device.type, enabled=False):
        line, cause = _solve_line(similarities.flatten(), matched.flatten())
    if cause:
        warn(f"the data do not determine a and b: {cause}; a = {line[0]:.6g}, b = {line[1]:.6g}")
    return line


def _solve_line(z: Tensor, matched: Tensor) -> tuple[Tensor, str]:
    mean, others, cause = z.mean(dtype=torch.float64), z[~matched], ""
    squares = torch.stack([(block.double() - mean).square().sum() for block in z.split(BLOCK)])
    spread, hits = (squares.sum() / len(z)).sqrt(), z[matched]
    if not len(hits) or not len(others):
        cause = f"{'all' if len(hits) else 'no'} pairs match"
    elif spread == 0 or hits.mean(dtype=torch.float64) <= others.mean(dtype=torch.float64):
        cause = "matching pairs are not more similar than others"
    if cause:
        slope = torch.where(spread > 0, 1 / (EXTREME * spread), 1)
        return torch.stack((slope, math.log((len(hits) + 1) / (len(others) + 1)) - slope * mean)), cause
    targets = 0.0, 1.0
    if hits.amin() >= others.amax():
        cause, targets = "a threshold separates them", (1 / (len(others) + 2), (len(hits) + 1) / (len(hits) + 2))
    (slope, intercept), converged = _newton_line(z, matched, mean, spread, *targets)
    line = torch.stack((slope / spread, intercept - slope * mean / spread))
    return line, cause if converged else f"Newton's method did not converge in {MAX_STEPS} steps; drop masked pairs"


def _newton_line(
    z: Tensor, matched: Tensor, mean: Tensor, spread: Tensor, low: float, high: float
) -> tuple[Tensor, bool]:
    """The line for ``(z - mean) / spread``."""
    line, step, lowest = mean.new_zeros(2), mean.new_zeros(2), math.inf
    for _ in range(MAX_STEPS):
        loss, gradient, hessian = mean.new_zeros(()), mean.new_zeros(2), mean.new_full((2,), 1e-9).diag()
        for some, flags in zip(z.split(BLOCK), matched.split(BLOCK), strict=True):
            x = torch.stack(((some.double() - mean) / spread, torch.ones_like(some, dtype=torch.float64)))
            target, logits = torch.where(flags, high, low), line @ x
            p = logits.sigmoid()
            loss += (torch.nn.functional.softplus(logits) - target * logits).sum()
            gradient += x @ (p - target)
            hessian += (x * p * (1 - p)) @ x.T
        if float(loss) > lowest * (1 + 1e-12):  # the step went too far
            step = step / 2
            line = line - step
            continue
        lowest, step = float(loss), -torch.linalg.solve(hessian, gradient)
        line = line + step
        if step.abs().max() <= SMALL_LINE_STEP * (1 + line.abs().max()):
            return line, True
    return line, False
