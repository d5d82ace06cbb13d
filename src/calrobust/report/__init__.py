"""Accuracy and calibration of several methods under distribution shift, as one table."""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from calrobust._checks import (
    check_choice,
    check_complete,
    check_fitted,
    check_has_data,
    check_held_out,
    check_n_bins,
    check_text,
    check_unfitted,
)
from calrobust.functional.bootstrap import reflected_interval
from calrobust.functional.calibration import Bins, bin_confidences, top_label
from calrobust.functional.temperature import fit_temperature
from calrobust.report import tables
from calrobust.report.samples import (
    ESTIMATED,
    Estimates,
    Fit,
    Samples,
    estimate,
    fingerprints_of,
    on_cpu,
    scaled_confidences,
)

if TYPE_CHECKING:
    import pandas as pd

LEVEL = 0.95  # of every interval


class ShiftReport:
    r"""Accuracy and calibration error of methods in and out of distribution, with and without temperature scaling.

    The mean over OOD domains is the plain mean of their values, whatever their sizes:

    .. math:: \mathrm{OOD} = \frac{1}{|\mathcal{D}|} \sum_{d \in \mathcal{D}} \mathrm{value}_d,
        \qquad \mathcal{D} = \{\text{domains}\} \setminus \{\text{id\_domain}\}

    All figures are fractions, except in the printed tables (:meth:`to_markdown`, :meth:`to_latex`, ``print(report)``),
    which are in per cent. Every accuracy and ECE comes with a 95 % interval as that of
    :func:`~calrobust.functional.bootstrap_interval`, with samples resampled within each domain and T held fixed. The
    draws depend on nothing but the data and the name of the domain, so neither the order of calls nor the split into
    batches matters.

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
        check_n_bins(n_bins)
        self.id_domain = id_domain
        self.n_bins = n_bins
        self._samples: dict[str, dict[str, Samples]] = {}
        self._fits: dict[str, Fit] = {}
        self._estimates: dict[tuple[str, str], Estimates] = {}  # the resampling is worth keeping

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
                [0, C), or more than 1 % of the samples that the method's temperature was fitted on are scored in this
                domain. The report is left as it was.
        """
        check_text(method=method, domain=domain)
        logits, target = on_cpu(logits, target)
        fingerprints = fingerprints_of(logits, target)
        fit = self._fits.get(method)
        samples = self._samples.get(method, {}).get(domain) or Samples()
        if fit is not None:
            seen = torch.isin(fit.fingerprints, fingerprints)
            fitted = seen if samples.fitted is None else samples.fitted | seen
            check_held_out(method, domain, fitted)
            samples.fitted = fitted
        confidences, correct = top_label(logits, target)
        self._samples.setdefault(method, {})[domain] = samples
        samples.fingerprints.append(fingerprints)
        samples.correct.append(correct)
        samples.confidences.append(confidences)
        if fit is None:
            samples.logits.append(logits.clone())  # the caller may fill the same buffer again
        else:
            samples.scaled.append(scaled_confidences(logits, fit.temperature))
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
            ValueError: as :func:`~calrobust.functional.fit_temperature`; the method has a temperature already; or more
                than 1 % of the samples, which leaves room for duplicates, are also scored in a domain: a T chosen on
                the test set flatters its ECE. Samples are compared by logits and label.
        """
        check_text(method=method)
        check_unfitted(method, self._temperature(method))
        logits, target = on_cpu(logits, target)
        fingerprints = fingerprints_of(logits, target)
        own = self._samples.get(method, {})
        fitted = {domain: torch.isin(fingerprints, torch.cat(s.fingerprints)) for domain, s in own.items()}
        for domain in own:
            check_held_out(method, domain, fitted[domain])
        temperature = float(fit_temperature(logits, target))
        self._fits[method] = Fit(temperature, fingerprints)
        for domain, samples in own.items():
            samples.fitted = fitted[domain]
            samples.scaled = [scaled_confidences(batch, temperature) for batch in samples.logits]
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
        return bin_confidences(confidences, torch.cat(samples.correct), n_bins=self.n_bins)

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
            for column in tables.HEADINGS:
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
        return tables.markdown(self.summary(), self._caption(intervals), intervals)

    def to_latex(self, *, intervals: bool = True) -> str:
        r"""The summary as a LaTeX ``tabular`` in per cent, for ``\usepackage{booktabs}``.

        Args:
            intervals: whether to show the 95 % intervals.

        Raises:
            ValueError: as :meth:`summary`.
        """
        return tables.latex(self.summary(), self._caption(intervals), intervals)

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
        tables.write_csv(Path(path), self._rows(per_domain))

    def to_dict(self) -> dict[str, Any]:
        """Everything by name, ready for JSON: NaN is None.

        Returns:
            ``id_domain``; ``n_bins``; ``summary``, a dict ``[method][column]``; and ``per_domain``, a dict
            ``[method][domain][column]``; as fractions.

        Raises:
            ValueError: as :meth:`summary`.
        """
        summary: dict[str, Any] = {}
        for row in map(tables.without_nan, self.summary()):
            summary[row.pop("method")] = row
        per_domain: dict[str, Any] = {}
        for row in map(tables.without_nan, self.per_domain()):
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
            estimates = [Estimates(nothing, nothing[None])]
        values, resampled = (torch.stack(each).mean(0) for each in zip(*estimates, strict=True))
        interval = torch.stack(reflected_interval(values, resampled, LEVEL)).T
        figures: dict[str, float] = {}
        for name, value, (low, high) in zip(ESTIMATED, values.tolist(), interval.tolist(), strict=True):
            figures |= {name: value, f"{name}_low": low, f"{name}_high": high}
        return figures

    def _estimate(self, method: str, domain: str) -> Estimates:
        key = method, domain
        if key not in self._estimates:
            self._estimates[key] = estimate(self._samples[method][domain], self.n_bins, zlib.crc32(domain.encode()))
        return self._estimates[key]

    def _caption(self, intervals: bool) -> str:
        with_intervals = f", with {100 * LEVEL:g} % bootstrap intervals" if intervals else ""
        ood = self.domains[1:]
        means = f"OOD: plain mean over {', '.join(ood)}." if ood else "OOD: no data."
        caption = (
            f"Accuracy and ECE ({self.n_bins} bins) in per cent{with_intervals}. ID: {self.id_domain}. {means} "
            "+ TS: logits divided by T, which was fitted on held-out data."
        )
        return " ".join(caption.split())
