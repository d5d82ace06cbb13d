"""The seam: all that a loss needs to know about a pair matrix, as vectors, so that nobody else sees the matrix.

The words of every file here, for the *factors* ``x [N, D]``, ``y [M, D]`` and ``scale`` of ``S = scale · x yᵀ [N, M]``:

- *anchor*: a row or a column of S, whose *candidates* are its entries. *partner*: the column of the pair of a row.
- *own* entry: that of a row and its partner. It is kept apart from all *other* entries of its row and column, so that
  a loss near zero is not the small difference of two large numbers.
- *lse*: the log-sum-exp of some entries of a row or column. *divergence*: the Kullback-Leibler divergence from a
  teacher's softmax over the same entries to the student's. *part*: these statistics of disjoint sets of entries, which
  `parts.merge` joins.
- *strip*: the rows of one rank against all columns. *tile*: some rows of a strip against all columns, the most of S
  that is in memory at a time. *block*: the rectangle that a program of a CUDA kernel holds on the chip.
- *operands*: the dtype in which the features came. *unit*: the cost of one matrix product of the size of S.

The gradient in S is formed in `tiled.backward`, and by a kernel in `triton.backward`; `products` takes it on to the
factors.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from calrobust.distributed import Ranks
from calrobust.kernels import dense, operators
from calrobust.kernels.dense import Factors
from calrobust.kernels.parts import Part, divergence_terms, merge, wide

__all__ = ["IMPLS", "MEMORY_BUDGET", "Direction", "Features", "Impl", "PairBatch", "PairStatistics", "pair_statistics"]

Impl = Literal["auto", "dense", "tiled", "triton"]
IMPLS: tuple[str, ...] = get_args(Impl)
MEMORY_BUDGET = 256 * 2**20  # bytes of temporary logits
Features = tuple[Tensor, Tensor, Tensor | float]  # of images and of texts, and the logit scale


class Direction(NamedTuple):
    """Statistics of each anchor against all its candidates, of shape ``[N]`` and in the dtype of `parts.wide`."""

    negative_log_likelihood: Tensor  # −log of the softmax at the own entry
    above_positives: Tensor  # own logit − mean logit of the candidates of the same label
    above_mean: Tensor  # own logit − mean logit
    divergence: Tensor  # from the teacher's softmax to the student's, in nats; empty without a teacher


class PairStatistics(NamedTuple):
    """Rows are this rank's images against all texts, columns are its texts against all images."""

    rows: Direction
    columns: Direction


class PairBatch:
    """A batch of pairs, seen by a student and maybe by a teacher: this rank's images and the texts of all ranks."""

    def __init__(self, student: Features, teacher: Features | None, labels: Tensor | None, ranks: Ranks) -> None:
        """Casts to the dtype of the softmaxes, at least float32, and gathers over the ranks."""
        images = student[0]
        self.operands = torch.promote_types(images.dtype, (teacher or student)[0].dtype)
        self.dtype = torch.promote_types(self.operands, torch.float32)
        self.ranks = ranks
        with torch.autocast(images.device.type, enabled=False):
            self.student = self._factors(student)
            self.teacher = None
            if teacher is not None:
                with torch.no_grad():
                    self.teacher = Factors(*(factor.detach() for factor in self._factors(teacher)))
            self.partner = torch.arange(ranks.here.start, ranks.here.stop, device=images.device)
            self.classes = None if labels is None else _classes(ranks.gather(labels, labels.dtype))

    def _factors(self, features: Features) -> Factors:
        images, texts, scale = features
        if isinstance(scale, Tensor):
            scale = _tracked(scale).mean().to(images.device, self.dtype)
        else:  # What the dtype cannot hold becomes infinite, and the loss NaN; torch would raise an error of its own.
            scale = math.inf if float(scale) > torch.finfo(self.dtype).max else float(scale)
            scale = torch.full((), scale, dtype=self.dtype, device=images.device)
        return Factors(_tracked(images).to(self.dtype), self.ranks.gather(_tracked(texts), self.dtype), scale)


def pair_statistics(
    batch: PairBatch, *, temperature: float, distils: bool, impl: Impl, memory_budget: int
) -> PairStatistics:
    """The statistics of ``S = scale / temperature · x yᵀ`` along rows and columns, with divergences if a term distils.

    What is linear in ``S`` is a product of feature sums, costs O(N·D), and is differentiated by autograd. What is not
    comes from `dense`, `tiled` or `triton`. Statistics of columns are vectors, which merge over the strips of ranks.
    """
    x, y, scale = student = batch.student._replace(scale=batch.student.scale / temperature)
    teacher = None
    if distils and batch.teacher is not None:
        teacher = batch.teacher._replace(scale=batch.teacher.scale / temperature)
    ranks, partner = batch.ranks, batch.partner
    precise = wide(x.device)
    with torch.autocast(x.device.type, enabled=False):
        # Linear parts first: their small gradients then come after the tiles of backward, not beside them.
        own = scale * torch.linalg.vecdot(x, y[ranks.here])
        row_mean = scale * (x @ y.mean(0))
        column_mean = scale * (y @ (x.sum(0) / ranks.total))
        if batch.classes is None:
            row_positive = column_positive = own
            column_mean = ranks.scatter_sum(column_mean)
        else:
            classes, counts = batch.classes
            of_images = classes[ranks.here]
            row_positive = scale * torch.linalg.vecdot(x, _class_sums(y, classes, of_images)) / counts[ranks.here]
            of_texts = scale * torch.linalg.vecdot(y, _class_sums(x, of_images, classes)) / counts
            column_mean, column_positive = ranks.scatter_sum(torch.stack([column_mean, of_texts], 1)).T
        if impl == "dense":
            strip = dense.softmax_statistics(student, teacher, partner)
        else:
            strip = operators.softmax_statistics(
                student, teacher, partner, impl=impl, memory_budget=memory_budget, operands=batch.operands
            )
        own_part = Part.without_teacher(own.to(precise))
        if teacher is not None:
            teacher_own = teacher.scale * torch.linalg.vecdot(teacher.x, teacher.y[ranks.here])
            own_part = Part(own_part.lse, teacher_own.to(precise), torch.zeros_like(own_part.lse))
        rows, columns = (
            Direction(
                -torch.nn.functional.logsigmoid(own_part.lse - other.lse),
                (own - positive).to(precise),
                (own - mean).to(precise),
                merge([other, own_part]).divergence,
            )
            for other, positive, mean in (
                (strip.rows.to(precise), row_positive, row_mean),
                (_over_ranks(strip.columns.to(precise), ranks), column_positive, column_mean),
            )
        )
        return PairStatistics(rows, columns)


def _over_ranks(part: Part, ranks: Ranks) -> Part:
    """The columns of this rank's own texts against the images of all ranks, from those of its strip."""
    if len(ranks.sizes) == 1:
        return part
    if part.teacher_lse.shape[0] == 0:
        return Part.without_teacher(_total(part.lse[:, None], ranks)[:, 0])
    parts = torch.stack([part.lse, part.teacher_lse], 1)
    total = _total(parts, ranks)
    share, teacher_share = (parts - ranks.gather(total, total.dtype)).T
    terms = teacher_share.exp() * part.divergence + divergence_terms(teacher_share, share)
    return Part(total[:, 0], total[:, 1], ranks.scatter_sum(terms))


def _total(parts: Tensor, ranks: Ranks) -> Tensor:
    top = ranks.maximum(parts)
    return ranks.scatter_sum((parts - top).exp()).log() + top[ranks.here]


def _tracked(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of one that was made in inference mode, which autograd may not keep for backward."""
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():  # is_inference() cannot be traced
        return tensor
    return tensor.clone() if tensor.is_inference() else tensor


def _classes(labels: Tensor) -> tuple[Tensor, Tensor]:
    """The class of each row, from 0, and its size, ``[N]`` each. Shapes depend on no value: no device is waited for."""
    ordered, order = labels.sort()
    first = torch.ones_like(ordered)
    first[1:] = ordered[1:] != ordered[:-1]
    classes = torch.empty_like(order).scatter_(0, order, first.cumsum(0) - 1)
    ones = torch.ones_like(labels)
    return classes, torch.zeros_like(ones).index_add(0, classes, ones)[classes]


def _class_sums(features: Tensor, classes: Tensor, wanted: Tensor) -> Tensor:
    """For each of the ``wanted`` classes ``[K]`` the sum ``[K, D]`` of its features, zero if there are none."""
    sums = features.new_zeros(max(classes.shape[0], wanted.shape[0]), features.shape[1])
    return sums.index_add(0, classes, features).index_select(0, wanted)  # its backward is cheaper than that of indexing
