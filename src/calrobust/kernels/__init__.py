"""The statistics of a pair matrix that losses need: see ``docs/derivations.md``."""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from calrobust.distributed import Ranks
from calrobust.kernels import dense, operators
from calrobust.kernels.dense import EXCLUDED, Factors, Pairing, Part, divergence_terms, merge, wide

Impl = Literal["auto", "dense", "tiled", "triton"]
Features = tuple[Tensor, Tensor, Tensor | float]  # images, texts, logit scale
Labels = Tensor | tuple[Tensor, Tensor]  # of pairs, or of images and of texts


class Anchors(NamedTuple):
    """Rows or columns of this rank."""

    weights: Tensor  # [length]: 1 with positives; without, 0 for a text and NaN for an image
    number: Tensor | int  # with positives, over all ranks
    positives: Tensor  # [length]: how many, at least 1


class Direction(NamedTuple):
    """Statistics ``[length]`` of each anchor."""

    negative_log_likelihood: Tensor  # of the own entries; 0 without any
    above_positives: Tensor  # lse of the own entries (without any: of all entries) − mean logit of the positives
    above_mean: Tensor  # the same − mean logit
    divergence: Tensor
    anchors: Anchors
    total: int  # over all ranks


class PairBatch:
    """Rows are images, or texts if ``swapped``; columns are gathered from all ranks.

    The partner of an image is the text of its place, or with labels for both sides the first of its label.
    """

    def __init__(
        self,
        student: Features,
        teacher: Features | None,
        labels: Labels | None,
        ranks: tuple[Ranks, Ranks],  # of images and of texts
        *,
        swapped: bool = False,
    ) -> None:
        images, texts, _ = student
        self.operands = torch.promote_types(images.dtype, (teacher or student)[0].dtype)
        self.dtype = torch.promote_types(self.operands, torch.float32)
        self.swapped = swapped
        self.rows, self.columns = ranks[::-1] if swapped else ranks
        with torch.autocast(images.device.type, enabled=False):
            self.student = self._factors(student, self.dtype)
            self.teacher = None
            if teacher is not None:
                with torch.no_grad():
                    self.teacher = Factors(*(factor.detach() for factor in self._factors(teacher, self.operands)))
        n, m = images.shape[0], texts.shape[0]
        self.in_order = not isinstance(labels, tuple)
        self.pairs = n if self.in_order and n <= m else 0
        self.classes: tuple[Tensor, ...] = ()  # of rows and of columns
        rows, columns = (torch.arange(k, device=images.device) for k in ((m, n) if swapped else (n, m)))
        self.partner = torch.where(rows < self.pairs, rows + self.columns.here.start, -1)
        self.of_rows = _anchors((rows < self.pairs).long(), ranks[0].total, are_images=not swapped)
        self.of_columns = _anchors((columns < self.pairs).long(), ranks[0].total, are_images=swapped)
        if labels is not None:
            both = labels if isinstance(labels, tuple) else (labels, labels)
            self._label(*(both[::-1] if swapped else both))
        start = self.columns.here.start if self.in_order and rows.shape[0] == self.pairs else -1
        self.pairing = Pairing(self.partner, start, self.classes)

    def own_of_columns(self, own: Part) -> Part:
        """Statistics ``[M]`` of the own entries of each column."""
        m, start = self.columns.total, self.columns.here.start
        if self.in_order:
            place = start, m - start - self.pairs
            filled = zip(own, (EXCLUDED, 0.0, EXCLUDED), strict=True)
            return Part(*(F.pad(v[: self.pairs], place, value=fill) if v.shape[0] else v for v, fill in filled))
        return _by_partner(own, self.partner, m)

    def _factors(self, features: Features, dtype: torch.dtype) -> Factors:
        images, texts, scale = features
        x, y = map(_tracked, (texts, images) if self.swapped else (images, texts))
        return Factors(x.to(dtype), self.columns.gather(y, dtype), self.scalar(scale, x.device))

    def scalar(self, value: Tensor | float, device: torch.device) -> Tensor:
        """A number, or equal entries, as a tensor ``[]``."""
        if isinstance(value, Tensor):
            return _tracked(value).mean().to(device, self.dtype)
        # torch.full would raise on overflow.
        return torch.ones((), dtype=self.dtype, device=device) * float(value)

    def _label(self, of_rows: Tensor, of_columns: Tensor) -> None:
        """No shape depends on a value, so no device is waited for."""
        of_rows, of_columns = self.rows.gather(of_rows, torch.int64), self.columns.gather(of_columns, torch.int64)
        row_classes, of_row, order = _occurrences(of_columns, of_rows)
        column_classes, _, _ = _occurrences(of_columns, of_columns)
        _, of_column, _ = _occurrences(of_rows, of_columns)
        rows, columns = self.rows.here, self.columns.here
        self.classes = row_classes[rows], column_classes
        self.of_rows = _anchors(of_row[rows], (of_row > 0).sum(), are_images=not self.swapped)
        self.of_columns = _anchors(of_column[columns], (of_column > 0).sum(), are_images=self.swapped)
        if not self.in_order:
            first = order.index_select(0, row_classes[rows].clamp(max=order.shape[0] - 1))
            self.partner = torch.where(of_row[rows] > 0, first, -1)


def _anchors(positives: Tensor, number: Tensor | int, *, are_images: bool) -> Anchors:
    weights = torch.ones_like(positives, dtype=wide(positives.device))
    return Anchors(weights.masked_fill(positives == 0, torch.nan if are_images else 0), number, positives.clamp(min=1))


def pair_statistics(
    batch: PairBatch, *, temperature: float, distils: bool, columns: bool, impl: Impl, memory_budget: int
) -> list[Direction]:
    """The statistics of this rank's rows and, if asked for, columns."""
    x, y, scale = batch.student
    student, teacher = Factors(x, y, scale := scale / temperature), None
    if distils and batch.teacher is not None:
        teacher = batch.teacher._replace(scale=batch.teacher.scale / temperature)
    precise = wide(x.device)
    with torch.autocast(x.device.type, enabled=False):
        if impl == "dense":
            found = dense.softmax_statistics(student, teacher, batch.pairing, columns=columns)
        else:
            options: Any = {"impl": impl, "memory_budget": memory_budget, "operands": batch.operands}
            found = operators.softmax_statistics(student, teacher, batch.pairing, columns=columns, **options)
        without = batch.partner < 0
        own = Part.without_teacher((scale * found.own).to(precise).masked_fill(without, EXCLUDED))
        if teacher:
            teacher_own = (teacher.scale * found.teacher_own).to(precise).masked_fill(without, EXCLUDED)
            own = Part(own.lse, torch.zeros_like(own.lse), teacher_own)
        n, m = batch.rows.total, batch.columns.total
        rows = _direction(own, found.rows.to(precise), scale * found.row_sums, m, batch.of_rows, n)
        if not columns:
            return [rows]
        sums = batch.columns.scatter_sum((scale * found.column_sums).T).T
        own, other = _over_ranks([batch.own_of_columns(own), found.columns.to(precise)], batch.columns)
        return [rows, _direction(own, other, sums, n, batch.of_columns, m)]


def _direction(own: Part, other: Part, sums: Tensor, candidates: int, anchors: Anchors, total: int) -> Direction:
    """``sums`` are over all candidates and, with labels, over the positives."""
    has_own = own.lse != EXCLUDED
    base = torch.where(has_own, own.lse, other.lse)
    mean, *positive = sums.to(base.dtype)
    return Direction(
        torch.where(has_own, -F.logsigmoid(own.lse - other.lse), 0),
        base - positive[0] / anchors.positives if positive else torch.zeros_like(base),
        base - mean / candidates if candidates > 1 else torch.zeros_like(base),
        merge([other, own]).divergence if other.teacher_lse.shape[0] else other.divergence,
        anchors,
        total,
    )


def _by_partner(own: Part, partner: Tensor, m: int) -> Part:
    """Statistics ``[m]`` of the own entries of the rows whose partner is a column."""
    slot = partner.remainder(m + 1)  # the last for rows without a partner

    def sums(values: Tensor) -> Tensor:
        return values.new_zeros(m + 1).index_add(0, slot, values)

    def lse(values: Tensor) -> Tensor:
        top = values.new_full((m + 1,), EXCLUDED).scatter_reduce(0, slot, values.detach(), "amax")
        total = sums((values - top.index_select(0, slot)).exp())
        return top + total.masked_fill(total == 0, 1).log()  # `EXCLUDED` for no row

    total = lse(own.lse)
    if own.teacher_lse.shape[0] == 0:
        return Part.without_teacher(total[:m])
    teacher_total = lse(own.teacher_lse)
    shares = own.teacher_lse - teacher_total.index_select(0, slot), own.lse - total.index_select(0, slot)
    return Part(total[:m], sums(divergence_terms(*shares))[:m], teacher_total[:m])


def _over_ranks(several: list[Part], ranks: Ranks) -> list[Part]:
    """Statistics of this rank's columns over all rows, from those of all columns over each rank's rows."""
    if len(ranks.sizes) == 1:
        return several
    lse, divergence, teacher_lse = (torch.stack(vectors, 1) for vectors in zip(*several, strict=True))
    if teacher_lse.shape[0] == 0:
        return [Part.without_teacher(each) for each in _total(lse, ranks).unbind(1)]
    parts = torch.stack([lse, teacher_lse], 2)
    total = _total(parts, ranks)
    share, teacher_share = (parts - ranks.gather(total, total.dtype)).unbind(2)
    terms = ranks.scatter_sum(teacher_share.exp() * divergence + divergence_terms(teacher_share, share))
    total, teacher_total = total.unbind(2)
    return [Part(*each) for each in zip(*(v.unbind(1) for v in (total, terms, teacher_total)), strict=True)]


def _total(parts: Tensor, ranks: Ranks) -> Tensor:
    top = ranks.maximum(parts)
    return ranks.scatter_sum((parts - top).exp()).log() + top[ranks.here]


def _tracked(tensor: Tensor) -> Tensor:
    """Copies a tensor of inference mode, which autograd cannot keep."""
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():  # is_inference() cannot be traced
        return tensor
    return tensor.clone() if tensor.is_inference() else tensor


def _occurrences(labels: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The class of each wanted label, its number in ``labels``, and the order of ``labels``.

    A class is the place of its first label in that order, or else ``len(labels)``.
    """
    ordered, order = labels.sort(stable=True)
    wanted = wanted.contiguous()
    first = torch.searchsorted(ordered, wanted)
    number = torch.searchsorted(ordered, wanted, right=True) - first
    return torch.where(number > 0, first, labels.shape[0]), number, order
