"""What things are by definition: naive, float64, from the papers, sharing no code with the library."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def contrastive(
    image: Tensor, text: Tensor, scale: Tensor | float, *, labels: Tensor | None = None, smoothing: float = 0.0
) -> Tensor:
    """MCL of each pair: torch's soft-target cross-entropy on the whole matrix, in both directions."""
    logits = scale * image @ text.T
    labels = torch.arange(len(logits)) if labels is None else labels
    same = (labels[:, None] == labels[None, :]).to(logits.dtype)
    target = (1 - smoothing) * same / same.sum(1, keepdim=True) + smoothing / len(logits)
    rows, columns = (F.cross_entropy(s, target, reduction="none") for s in (logits, logits.T))
    return (rows + columns) / 2


def directed(
    image: Tensor,
    text: Tensor,
    scale: Tensor | float,
    direction: str,
    *,
    labels: tuple[Tensor, Tensor] | None = None,
    smoothing: float = 0.0,
    teacher: tuple[Tensor, Tensor, Tensor | float] | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """MCL, or with a teacher MKD, of each anchor of one direction: of the images or texts that have a positive."""
    if direction == "text_to_image":
        image, text = text, image
        labels = None if labels is None else labels[::-1]
        teacher = None if teacher is None else (teacher[1], teacher[0], teacher[2])
    logits = scale * image @ text.T / temperature
    if teacher is not None:
        target = teacher[2] * teacher[0] @ teacher[1].T / temperature
        terms = F.kl_div(logits.log_softmax(1), target.log_softmax(1), reduction="none", log_target=True)
        return temperature**2 * terms.sum(1)
    n, m = logits.shape
    positive = torch.eye(n, m) if labels is None else labels[0][:, None] == labels[1][None]
    positive = positive.to(logits.dtype)
    anchors = positive.sum(1) > 0
    target = (1 - smoothing) * positive / positive.sum(1, keepdim=True) + smoothing / m
    return F.cross_entropy(logits[anchors], target[anchors], reduction="none")


def distillation(
    student: tuple[Tensor, Tensor, Tensor | float],
    teacher: tuple[Tensor, Tensor, Tensor | float],
    temperature: float = 1.0,
) -> Tensor:
    """MKD of each pair: torch's KL on the whole matrices, in both directions."""
    s, t = (scale * image @ text.T / temperature for image, text, scale in (student, teacher))
    rows, columns = (
        F.kl_div(a.log_softmax(1), b.log_softmax(1), reduction="none", log_target=True).sum(1)
        for a, b in ((s, t), (s.T, t.T))
    )
    return temperature**2 * (rows + columns)


def sigmoid_contrastive(
    image: Tensor, text: Tensor, scale: Tensor | float, bias: Tensor | float, positive: Tensor
) -> Tensor:
    """SigLIP's loss of each image: torch's binary cross-entropy on the whole matrix, of which True is ``positive``."""
    logits = scale * image @ text.T + bias
    return F.binary_cross_entropy_with_logits(logits, positive.to(logits.dtype), reduction="none").sum(1)


def sigmoid_distillation(
    student: tuple[Tensor, Tensor, Tensor | float, Tensor | float],
    teacher: tuple[Tensor, Tensor, Tensor | float, Tensor | float],
    temperature: float = 1.0,
) -> Tensor:
    """Of each image: torch's KL of softmaxes over the two answers, on the whole matrices."""
    s, t = ((scale * image @ text.T + bias) / temperature for image, text, scale, bias in (student, teacher))
    student_log, teacher_log = (torch.stack([z, torch.zeros_like(z)]).log_softmax(0) for z in (s, t))
    return temperature**2 * F.kl_div(student_log, teacher_log, reduction="none", log_target=True).sum((0, 2))


def gradients(value: Tensor, *inputs: Tensor) -> list[Tensor]:
    """Of a scalar, without touching ``.grad``."""
    return list(torch.autograd.grad(value, inputs))


def binned_gaps(values: list[float], hits: list[bool], bins: list[int]) -> dict[int, tuple[int, float]]:
    """Number of samples, and |frequency of hits - mean value|, of each bin that has samples."""
    gaps = {}
    for b in set(bins):
        inside = [i for i, own in enumerate(bins) if own == b]
        frequency = sum(hits[i] for i in inside) / len(inside)
        gaps[b] = len(inside), abs(frequency - sum(values[i] for i in inside) / len(inside))
    return gaps


def calibration_error(
    confidences: Tensor, correct: Tensor, n_bins: int, norm: str = "l1", bins: list[int] | None = None
) -> float:
    """Sample by sample: the bin is the last whose lower edge ``k * (1 / n_bins)`` is not above the confidence."""
    values, hits = confidences.double().tolist(), correct.tolist()
    if bins is None:
        bins = [max(k for k in range(n_bins) if k * (1 / n_bins) <= value) for value in values]
    gaps = binned_gaps(values, hits, bins).values()
    if norm == "max":
        return max(gap for _, gap in gaps)
    power = {"l1": 1, "l2": 2}[norm]
    mean = sum(n * gap**power for n, gap in gaps) / len(values)
    return math.pow(mean, 1 / power)


def negative_log_likelihood(logits: Tensor, target: Tensor, temperature: float = 1.0) -> Tensor:
    """Torch's cross-entropy in float64."""
    return F.cross_entropy(logits.double() / temperature, target)


def best_temperature(logits: Tensor, target: Tensor) -> float:
    """By bisection of the derivative in 1/T, which torch's autograd gives in float64."""

    def derivative(log_beta: float) -> float:
        beta = torch.tensor(log_beta, dtype=torch.float64).exp().requires_grad_()
        return float(gradients(F.cross_entropy(logits.double() * beta, target), beta)[0])

    low, high = -30.0, 30.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if derivative(middle) < 0 else (low, middle)
    return float(torch.tensor(-(low + high) / 2, dtype=torch.float64).exp())
