"""Accuracy and calibration of several methods under distribution shift, as one table."""

from __future__ import annotations

import csv
import math
import os
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from calrobust._checks import (
    check_choice,
    check_complete,
    check_fitted,
    check_has_data,
    check_held_out,
    check_label_values,
    check_not_empty,
    check_positive_integer,
    check_predictions,
    check_softmax_exists,
    check_text,
    check_unfitted,
)
from calrobust.functional.calibration import (
    BOOTSTRAP_BLOCK,
    Bins,
    bin_confidences,
    bin_index,
    binned_error,
    top_label,
)
from calrobust.functional.temperature import fit_temperature

if TYPE_CHECKING:
    import pandas as pd

LEVEL = 0.95  # of every interval
N_RESAMPLES = 1000

ESTIMATED = ("accuracy", "ece", "ece_ts")
HEADINGS = {  # column of the summary -> of the printed tables
    "id_accuracy": "ID accuracy",
    "ood_accuracy": "OOD accuracy",
    "id_ece": "ID ECE",
    "ood_ece": "OOD ECE",
    "temperature": "T",
    "id_ece_ts": "ID ECE + TS",
    "ood_ece_ts": "OOD ECE + TS",
}
MISSING = "\N{EN DASH}"

HASH_ROWS = 4096  # rows at a time, so that their float64 copies stay small


@dataclass
class _Samples:
    """One method in one domain, batch by batch."""

    fingerprints: list[Tensor] = field(default_factory=list)
    correct: list[Tensor] = field(default_factory=list)
    confidences: list[Tensor] = field(default_factory=list)
    scaled: list[Tensor] = field(default_factory=list)  # confidences of logits / T; empty until there is T
    logits: list[Tensor] = field(default_factory=list)  # empty once there is T


class _Fit(NamedTuple):
    """A method's T, and what it was fitted on."""

    temperature: float
    fingerprints: Tensor


class _Estimates(NamedTuple):
    """Of ``ESTIMATED``: ``[3]``, and ``[N_RESAMPLES, 3]`` of resampled data."""

    values: Tensor
    resampled: Tensor


class ShiftReport:
    r"""Accuracy and calibration error of methods in and out of distribution, with and without temperature scaling.

    The mean over OOD domains is the plain mean of their values, whatever their sizes:

    .. math:: \mathrm{OOD} = \frac{1}{|\mathcal{D}|} \sum_{d \in \mathcal{D}} \mathrm{value}_d,
        \qquad \mathcal{D} = \{\text{domains}\} \setminus \{\text{id_domain}\}

    All figures are fractions, except in the printed tables (:meth:`to_markdown`, :meth:`to_latex`, ``print(report)``),
    which are in per cent. Every accuracy and ECE comes with a 95 % bootstrap interval: samples are resampled within
    each domain, independently of the other domains, T is held fixed, and the percentiles are reflected as in
    :func:`~calrobust.functional.bootstrap_interval`. The draws depend on nothing but the data and the name of the
    domain, so a report is reproducible and neither the order of calls nor the split into batches matters.

    Memory, on the CPU: a method without a temperature keeps its logits, ``N * C`` numbers in each domain, since one may
    come. Once it has one, some 20 bytes a sample are left. So call :meth:`fit_temperature` before :meth:`add` for large
    data sets.

    Args:
        id_domain: the domain that is in distribution; all others are OOD.
        n_bins: number of bins of equal width of the ECE.

    Raises:
        TypeError: ``id_domain`` is not a string or ``n_bins`` not an integer.
        ValueError: ``id_domain`` is blank or ``n_bins`` < 1.

    Example:
        >>> import torch
        >>> from calrobust import ShiftReport
        >>> report = ShiftReport(id_domain="photo")
        >>> logits = torch.tensor([[0.9, 0.1]]).log().expand(10, 2)  # always 90 % sure of class 0
        >>> report.add("FT", "photo", logits, torch.tensor([0] * 9 + [1]))
        >>> report.add("FT", "sketch", logits, torch.tensor([0] * 7 + [1] * 3))
        >>> report.add("FT", "clipart", logits, torch.tensor([0] * 5 + [1] * 5))
        >>> print(report.to_markdown(intervals=False).splitlines()[2])  # OOD: accuracy (70 + 50) / 2, ECE (20 + 40) / 2
        | FT     |        90.0 |         60.0 |    0.0 |    30.0 |  – |           – |            – |
    """

    def __init__(self, *, id_domain: str, n_bins: int = 15) -> None:
        check_text(id_domain=id_domain)
        check_positive_integer(n_bins=n_bins)
        self.id_domain = id_domain
        self.n_bins = n_bins
        self._samples: dict[str, dict[str, _Samples]] = {}
        self._fits: dict[str, _Fit] = {}
        self._estimates: dict[tuple[str, str], _Estimates] = {}  # the resampling is worth keeping

    @property
    def methods(self) -> list[str]:
        """In the order in which they were first added."""
        return list(self._samples)

    @property
    def domains(self) -> list[str]:
        """In the order in which they were first added, ``id_domain`` first."""
        known = dict.fromkeys(domain for own in self._samples.values() for domain in own)
        return sorted(known, key=lambda domain: domain != self.id_domain)

    def add(self, method: str, domain: str, logits: Tensor, target: Tensor) -> None:
        """Adds predictions; further calls with the same names add to them.

        Args:
            method: the row of the table.
            domain: the data set.
            logits: shape ``[N, C]``, floating, N ≥ 1, on any device; ``-inf`` masks a class. C may differ by domain.
            target: shape ``[N]``, int64 labels in [0, C).

        Raises:
            TypeError: a name is not a string, ``logits`` is not floating or ``target`` is not int64.
            ValueError: shapes or devices do not fit, there are no samples, a logit is NaN or +inf, a label is outside
                [0, C), or a sample (its logits and label) is one of those that the method's temperature was fitted on.
                The report is left as it was.
        """
        check_text(method=method, domain=domain)
        logits, target = _on_cpu(logits, target)
        fingerprints = _fingerprints(logits, target)
        fit = self._fits.get(method)
        if fit is not None:
            check_held_out(method, domain, _n_shared(fingerprints, fit.fingerprints))
        confidences, correct = top_label(logits, target)
        samples = self._samples.setdefault(method, {}).setdefault(domain, _Samples())
        samples.fingerprints.append(fingerprints)
        samples.correct.append(correct)
        samples.confidences.append(confidences)
        if fit is None:
            samples.logits.append(logits.clone())  # the caller may fill the same buffer again
        else:
            samples.scaled.append(_scaled_confidences(logits, fit.temperature))
        self._estimates.pop((method, domain), None)

    def fit_temperature(self, method: str, logits: Tensor, target: Tensor) -> float:
        """Gives a method its temperature, hence its "+ TS" columns; before or after its data are added.

        Args:
            method: the row of the table.
            logits: shape ``[N, C]``, floating, of held-out data in distribution.
            target: shape ``[N]``, int64 labels in [0, C).

        Returns:
            T, as :func:`~calrobust.functional.fit_temperature` finds it.

        Raises:
            TypeError: ``method`` is not a string, ``logits`` is not floating or ``target`` is not int64.
            ValueError: as :func:`~calrobust.functional.fit_temperature`; the method has a temperature already; or a
                sample (its logits and label) is also scored: a T chosen on the test set flatters its ECE. Samples are
                compared by content, in any order and however they are split into batches.
        """
        check_text(method=method)
        check_unfitted(method, self._temperature(method))
        logits, target = _on_cpu(logits, target)
        fingerprints = _fingerprints(logits, target)
        own = self._samples.get(method, {})
        for domain, samples in own.items():
            check_held_out(method, domain, _n_shared(torch.cat(samples.fingerprints), fingerprints))
        temperature = float(fit_temperature(logits, target))
        self._fits[method] = _Fit(temperature, fingerprints)
        for domain, samples in own.items():
            samples.scaled = [_scaled_confidences(batch, temperature) for batch in samples.logits]
            samples.logits = []
            self._estimates.pop((method, domain), None)
        return temperature

    def bins(self, method: str, domain: str, *, scaled: bool = False) -> Bins:
        """Sums over bins, for :func:`~calrobust.plotting.reliability_diagram`; those of two domains add up.

        Args:
            method: one of :attr:`methods`.
            domain: one of :attr:`domains`.
            scaled: whether logits are divided by the method's temperature.

        Returns:
            What :func:`~calrobust.functional.bin_confidences` gives, over ``n_bins`` bins.

        Raises:
            ValueError: there are no such data, or no temperature.
        """
        check_has_data(self._samples)
        check_choice(tuple(self._samples), method=method)
        check_choice(tuple(self._samples[method]), domain=domain)
        if scaled:
            check_fitted(method, self._temperature(method))
        samples = self._samples[method][domain]
        confidences = torch.cat(samples.scaled if scaled else samples.confidences)
        return bin_confidences(confidences, torch.cat(samples.correct), self.n_bins)

    def summary(self) -> list[dict[str, Any]]:
        """One row a method, in the order of first :meth:`add`.

        Returns:
            Dicts of ``method`` and, as fractions, ``id_accuracy``, ``ood_accuracy``, ``id_ece``, ``ood_ece``,
            ``id_ece_ts``, ``ood_ece_ts``, each followed by ``…_low`` and ``…_high``; and ``temperature``. NaN where
            there is no temperature, or no OOD domain.

        Raises:
            ValueError: there are no data, none of ``id_domain``, or a method lacks a domain that others have.
        """
        check_complete(self.id_domain, {**dict.fromkeys(self._fits, ()), **self._samples})
        rows = []
        for method in self._samples:
            groups = {"id": [self.id_domain], "ood": self.domains[1:]}
            figures = {
                f"{group}_{name}": value
                for group, domains in groups.items()
                for name, value in self._figures(method, domains).items()
            }
            row: dict[str, Any] = {"method": method}
            for column in HEADINGS:
                if column == "temperature":
                    row[column] = self._temperature(method) or math.nan
                else:
                    row |= {name: figures[name] for name in (column, f"{column}_low", f"{column}_high")}
            rows.append(row)
        return rows

    def per_domain(self) -> list[dict[str, Any]]:
        """The long form: one row for each method and domain.

        Returns:
            Dicts of ``method``, ``domain``, ``n`` (samples), ``temperature`` and, as fractions, ``accuracy``, ``ece``,
            ``ece_ts``, each followed by ``…_low`` and ``…_high``. NaN where there is no temperature. Methods may have
            different domains.

        Raises:
            ValueError: there are no data.
        """
        check_has_data(self._samples)
        return [
            {
                "method": method,
                "domain": domain,
                "n": sum(map(len, own[domain].correct)),
                "temperature": self._temperature(method) or math.nan,
                **self._figures(method, [domain]),
            }
            for method, own in self._samples.items()
            for domain in self.domains
            if domain in own
        ]

    def to_markdown(self, *, intervals: bool = True) -> str:
        """The summary as a Markdown table in per cent, with a caption that says what the columns are.

        Args:
            intervals: whether to show the 95 % intervals.

        Raises:
            ValueError: as :meth:`summary`.
        """
        table = self._table(intervals, escape=lambda text: text.replace("|", r"\|"))
        widths = [max(3 if i == 0 else 0, *map(len, column)) for i, column in enumerate(zip(*table, strict=True))]
        rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
        lines = [
            "| " + " | ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) + " |"
            for row in (table[0], rule, *table[1:])
        ]
        return "\n".join([*lines, "", self._caption(intervals)])

    def to_latex(self, *, intervals: bool = True) -> str:
        r"""The summary as a LaTeX ``tabular`` in per cent, for ``\usepackage{booktabs}``.

        Args:
            intervals: whether to show the 95 % intervals.

        Raises:
            ValueError: as :meth:`summary`.
        """
        head, *body = (" & ".join(row) + r" \\" for row in self._table(intervals, escape=_escape_latex))
        return "\n".join(
            [
                "% " + self._caption(intervals),
                rf"\begin{{tabular}}{{l{'r' * len(HEADINGS)}}}",
                r"\toprule",
                head,
                r"\midrule",
                *body,
                r"\bottomrule",
                r"\end{tabular}",
            ]
        )

    def to_csv(self, path: str | os.PathLike[str], *, per_domain: bool = False) -> None:
        """Writes the summary in full precision, as fractions; a NaN is an empty field.

        A file that is there is replaced at once, or not at all.

        Args:
            path: the file.
            per_domain: whether to write the rows of :meth:`per_domain` instead.

        Raises:
            ValueError: as :meth:`summary`.
            OSError: the file cannot be written.
        """
        rows = self._rows(per_domain)
        path = Path(path)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # a rename is atomic within a folder
        try:
            with temporary.open("w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, rows[0], lineterminator="\n")
                writer.writeheader()
                writer.writerows({name: "" if _is_nan(value) else value for name, value in row.items()} for row in rows)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def to_dict(self) -> dict[str, Any]:
        """Everything by name, ready for JSON: NaN is None.

        Returns:
            ``id_domain``; ``n_bins``; ``summary``, a dict ``[method][column]``; and ``per_domain``, a dict
            ``[method][domain][column]``; as fractions.

        Raises:
            ValueError: as :meth:`summary`.
        """
        summary: dict[str, Any] = {}
        for row in map(_without_nan, self.summary()):
            summary[row.pop("method")] = row
        per_domain: dict[str, Any] = {}
        for row in map(_without_nan, self.per_domain()):
            per_domain.setdefault(row.pop("method"), {})[row.pop("domain")] = row
        return {"id_domain": self.id_domain, "n_bins": self.n_bins, "summary": summary, "per_domain": per_domain}

    def to_pandas(self, *, per_domain: bool = False) -> pd.DataFrame:
        """The summary as a ``DataFrame``, as fractions.

        Args:
            per_domain: whether to give the rows of :meth:`per_domain` instead.

        Raises:
            ImportError: pandas is not installed.
            ValueError: as :meth:`summary`.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise ImportError("to_pandas needs pandas: pip install pandas") from error
        return pd.DataFrame(self._rows(per_domain))

    def __str__(self) -> str:
        return self.to_markdown()

    def __repr__(self) -> str:
        return (
            f"ShiftReport(id_domain={self.id_domain!r}, n_bins={self.n_bins}): "
            f"{len(self.methods)} methods, {len(self.domains)} domains"
        )

    def _rows(self, per_domain: bool) -> list[dict[str, Any]]:
        return self.per_domain() if per_domain else self.summary()

    def _temperature(self, method: str) -> float | None:
        return self._fits[method].temperature if method in self._fits else None

    def _figures(self, method: str, domains: Sequence[str]) -> dict[str, float]:
        """Means over ``domains`` of everything estimated, with intervals."""
        estimates = [self._estimate(method, domain) for domain in domains]
        if not estimates:
            nothing = torch.full((3,), math.nan, dtype=torch.float64)
            estimates = [_Estimates(nothing, nothing[None])]
        values, resampled = (torch.stack(each).mean(0) for each in zip(*estimates, strict=True))
        tails = values.new_tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        low, high = torch.quantile(resampled, tails, dim=0)
        lows = torch.minimum(values, 2 * values - high).clamp(min=0).tolist()
        highs = torch.maximum(values, 2 * values - low).clamp(max=1).tolist()
        figures: dict[str, float] = {}
        for name, value, *ends in zip(ESTIMATED, values.tolist(), lows, highs, strict=True):
            figures |= {name: value, f"{name}_low": ends[0], f"{name}_high": ends[1]}
        return figures

    def _estimate(self, method: str, domain: str) -> _Estimates:
        key = method, domain
        if key not in self._estimates:
            self._estimates[key] = _estimate(self._samples[method][domain], self.n_bins, zlib.crc32(domain.encode()))
        return self._estimates[key]

    def _table(self, intervals: bool, escape: Callable[[str], str]) -> list[list[str]]:
        table = [["Method", *HEADINGS.values()]]
        for row in self.summary():
            cells = [" ".join(row["method"].split())]
            for column in HEADINGS:
                value = row[column]
                if _is_nan(value):
                    cells.append(MISSING)
                elif column == "temperature":
                    cells.append(f"{value:.2f}" if 0.1 <= value < 100 else f"{value:.3g}")
                elif intervals:
                    low, high = row[f"{column}_low"], row[f"{column}_high"]
                    cells.append(f"{100 * value:.1f} ({100 * low:.1f}{MISSING}{100 * high:.1f})")
                else:
                    cells.append(f"{100 * value:.1f}")
            table.append([escape(cell) for cell in cells])
        return table

    def _caption(self, intervals: bool) -> str:
        with_intervals = f", with {100 * LEVEL:g} % bootstrap intervals" if intervals else ""
        ood = self.domains[1:]
        means = f"OOD: plain mean over {', '.join(ood)}." if ood else "OOD: no data."
        caption = (
            f"Accuracy and ECE ({self.n_bins} bins) in per cent{with_intervals}. ID: {self.id_domain}. {means} "
            "+ TS: logits divided by T, which was fitted on held-out data."
        )
        return " ".join(caption.split())


def _on_cpu(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    check_predictions(target, logits=logits)
    check_not_empty(logits=logits)
    logits, target = logits.detach().cpu(), target.cpu()
    check_label_values(target, logits.shape[1])
    check_softmax_exists(target, logits=logits)
    return logits, target


def _scaled_confidences(logits: Tensor, temperature: float) -> Tensor:
    scaled = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    return top_label(scaled, torch.zeros(len(scaled), dtype=torch.int64))[0]


def _fingerprints(logits: Tensor, target: Tensor) -> Tensor:
    """``[N]`` int64 hashes of each row's values and label; equal values give equal hashes in any dtype that holds them.

    The bits of each float64 are mixed, multiplied by a random odd number for their column and summed modulo 2^64, so
    that two different rows agree with a probability near 2^-64.
    """
    generator = torch.Generator().manual_seed(0)
    odd = torch.randint(-(2**62), 2**62, (logits.shape[1] + 1,), generator=generator) * 2 + 1
    hashes = []
    for scores, labels in zip(logits.split(HASH_ROWS), target.split(HASH_ROWS), strict=True):
        values = scores.double() + 0.0  # -0.0 becomes 0.0
        bits = torch.cat((values.contiguous().view(torch.int64), labels[:, None]), 1) * odd[-1]
        bits ^= bits >> 32  # the low bits of a float32's float64 are all zero
        hashes.append((bits * odd).sum(1))
    return torch.cat(hashes)


def _n_shared(fingerprints: Tensor, others: Tensor) -> int:
    return int(torch.isin(fingerprints, others).sum())


def _estimate(samples: _Samples, n_bins: int, seed: int) -> _Estimates:
    """Accuracy, ECE and ECE at T, and the same of N samples drawn from the N with replacement."""
    order = torch.cat(samples.fingerprints).argsort()  # by content, so that no draw depends on the order of batches
    correct = torch.cat(samples.correct)[order]
    kinds = [torch.cat(kind)[order].double() for kind in (samples.confidences, samples.scaled) if kind]
    bins = [bin_confidences(confidences, correct, n_bins) for confidences in kinds]
    missing = [torch.tensor(math.nan, dtype=torch.float64)] * (2 - len(kinds))
    values = torch.stack([correct.double().mean(), *map(binned_error, bins), *missing])

    # Everything resampled is linear in how often each sample is drawn, up to the absolute value of a bin's gap.
    n = len(correct)
    hits = correct.double()[:, None]
    gaps = [
        torch.zeros(n, n_bins, dtype=torch.float64).scatter_(1, bin_index(c, n_bins)[:, None], c[:, None] - hits)
        for c in kinds
    ]
    summands = torch.cat([hits, *gaps], 1)
    generator = torch.Generator().manual_seed(seed)
    resampled = torch.full((N_RESAMPLES, 3), math.nan, dtype=torch.float64)
    step = max(1, BOOTSTRAP_BLOCK // n)
    for start in range(0, N_RESAMPLES, step):
        rows = min(step, N_RESAMPLES - start)
        draws = torch.randint(n, (rows, n), generator=generator) + n * torch.arange(rows)[:, None]
        counts = torch.bincount(draws.flatten(), minlength=rows * n).view(rows, n).double()
        hit_sums, *gap_sums = (counts @ summands).split([1, *[n_bins] * len(kinds)], dim=1)
        block = resampled[start : start + rows]
        block[:, 0] = hit_sums[:, 0] / n
        for column, (sums, whole) in enumerate(zip(gap_sums, bins, strict=True), start=1):
            block[:, column] = binned_error(Bins(whole.counts, sums, torch.zeros_like(sums)))  # counts: their total
    return _Estimates(values, resampled)


def _is_nan(value: object) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _without_nan(row: dict[str, Any]) -> dict[str, Any]:
    return {name: None if _is_nan(value) else value for name, value in row.items()}


LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", MISSING: "--"}


def _escape_latex(text: str) -> str:
    return re.sub(rf"[\\~^{MISSING}&%$#_{{}}]", lambda match: LATEX.get(match[0], "\\" + match[0]), text)
