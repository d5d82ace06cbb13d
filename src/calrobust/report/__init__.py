"""Accuracy and calibration of methods under distribution shift, as one table."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from calrobust._checks import check_choice, check_n_bins
from calrobust.functional.calibration import Bins
from calrobust.functional.scoring import fit_temperature
from calrobust.report.samples import Fit, Samples, check_held_out, fingerprints_of, mean_figures, on_cpu

if TYPE_CHECKING:
    import pandas as pd

Row = dict[str, Any]

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
BRACKETS = (
    " In brackets: the 95 % interval of the accuracy, or of the ECE without noise, which can lie below the value; then "
    "the noise floor, which is the ECE that a perfectly calibrated model shows. An ECE without an interval, such as "
    "the mean of several domains, has in brackets its debiased value, noise floor and p-value against perfect "
    "calibration."
)
MARKDOWN = str.maketrans({"|": r"\|"})
LATEX = str.maketrans(
    {mark: "\\" + mark for mark in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", MISSING: "--"}
    | {"<": r"\textless{}", ">": r"\textgreater{}"}
)


class ShiftReport:
    r"""Accuracy and calibration error of methods in and out of distribution, with and without temperature scaling.

    The mean over OOD domains is the plain mean of their values, whatever their sizes:

    .. math:: \mathrm{OOD} = \frac{1}{|\mathcal{D}|} \sum_{d \in \mathcal{D}} \mathrm{value}_d,
        \qquad \mathcal{D} = \{\text{domains}\} \setminus \{\text{id\_domain}\}

    :func:`~calrobust.functional.calibration_interval` defines the debiased value, 95 % interval, noise floor and
    p-value of an ECE, for fixed T. The mean ECE of several domains has no interval. Accuracies have Wilson's interval.
    Domains are assumed to have no samples in common.

    Figures are fractions; only printed tables are in per cent. Whatever makes a table raises ``ValueError`` if there
    are no data, none of ``id_domain``, or if a method lacks a domain that others have. A method without a temperature
    keeps its logits on the CPU, so call :meth:`fit_temperature` before :meth:`add` for large data sets.

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
        >>> for domain, wrong in ("photo", 1), ("sketch", 3), ("clipart", 5):
        ...     report.add("FT", domain, logits, (torch.arange(10) < wrong).long())
        >>> report.summary()[0]["ood_accuracy"]  # (0.7 + 0.5) / 2
        0.6
    """

    def __init__(self, *, id_domain: str, n_bins: int = 15) -> None:
        _check_names(id_domain=id_domain)
        check_n_bins(n_bins)
        self.id_domain = id_domain
        self.n_bins = n_bins
        self._samples: dict[str, dict[str, Samples]] = {}
        self._fits: dict[str, Fit] = {}

    @property
    def methods(self) -> list[str]:
        """In the order of first :meth:`add`."""
        return list(self._samples)

    @property
    def domains(self) -> list[str]:
        """``id_domain``, then the others in the order of first :meth:`add`."""
        known = dict.fromkeys(domain for own in self._samples.values() for domain in own)
        return sorted(known, key=lambda domain: domain != self.id_domain)

    def add(self, method: str, domain: str, logits: Tensor, target: Tensor) -> None:
        """Adds predictions; further calls with the same names add to them.

        Args:
            method: the row of the table.
            domain: the data set.
            logits: shape ``[N, C]`` or ``[N, C, ...]``, floating, not empty; ``-inf`` masks a class. C may differ by
                domain.
            target: shape ``[N]`` or ``[N, ...]``, int64 labels in [0, C).

        Raises:
            TypeError: a name is not a string, ``logits`` is not floating or ``target`` is not int64.
            ValueError: shapes or devices do not fit, a logit is NaN or +inf, a label is outside [0, C), or over 1 % of
                the samples that T was fitted on are scored in this domain. The report is left as it was.
        """
        _check_names(method=method, domain=domain)
        logits, target = on_cpu(logits, target)
        samples = self._samples.get(method, {}).get(domain) or Samples(self.n_bins)
        fit = self._fits.get(method)
        fingerprints = fingerprints_of(logits, target)
        if fit and torch.isin(fingerprints, fit.fingerprints).any():
            check_held_out(method, domain, fit.fingerprints, torch.cat([*samples.fingerprints, fingerprints]))
        samples.add(logits, target, fingerprints, fit.temperature if fit else None)
        self._samples.setdefault(method, {})[domain] = samples

    def fit_temperature(self, method: str, logits: Tensor, target: Tensor) -> float:
        """Gives a method its temperature T and so its "+ TS" columns, before or after its data are added.

        Arguments are those of :meth:`add`, of held-out data in distribution. T is that of
        :func:`~calrobust.functional.fit_temperature`.

        Raises:
            TypeError, ValueError: as both of these, or the method already has a temperature.
        """
        _check_names(method=method)
        if method in self._fits:
            raise ValueError(
                f"{method!r} must be fitted once, on all its validation data, got a second call after T = "
                f"{self._fits[method].temperature:.6g}; concatenate the batches, or use another method name"
            )
        logits, target = on_cpu(logits, target)
        fingerprints = fingerprints_of(logits, target)
        own = self._samples.get(method, {})
        for domain, samples in own.items():
            check_held_out(method, domain, fingerprints, torch.cat(samples.fingerprints))
        temperature = float(fit_temperature(logits, target))
        self._fits[method] = Fit(temperature, fingerprints)
        for samples in own.values():
            samples.scale(temperature)
        return temperature

    def bins(self, method: str, domain: str, *, scaled: bool = False) -> Bins:
        """Sums over bins, for :func:`~calrobust.plotting.reliability_diagram`; those of two domains add up.

        ``scaled`` divides logits by T. Raises ``ValueError`` if there are no such data, or no T.
        """
        self._check_has_data()
        check_choice(tuple(self._samples), method=method)
        check_choice(tuple(self._samples[method]), domain=domain)
        if scaled and method not in self._fits:
            raise ValueError(f"{method!r} must have a temperature to be scaled, got none; call fit_temperature first")
        samples = self._samples[method][domain]
        return Bins(*(samples.scaled if scaled else samples.plain)[:3])

    def summary(self) -> list[dict[str, Any]]:
        """One row for each method, in the order of first :meth:`add`.

        Returns:
            Dicts of ``method``, ``temperature``, ``id_accuracy`` and ``ood_accuracy`` with ``…_low`` and ``…_high``,
            and ``id_ece``, ``ood_ece``, ``id_ece_ts``, ``ood_ece_ts`` with ``…_debiased``, ``…_low``, ``…_high``,
            ``…_floor`` and ``…_p``. NaN where there is no temperature, no OOD domain or no interval.
        """
        self._check_complete()
        groups = {"id": [self.id_domain], "ood": self.domains[1:]}
        return [
            {"method": method, "temperature": self._temperature(method)}
            | {
                f"{group}_{name}": value
                for group, domains in groups.items()
                for name, value in mean_figures([own[domain] for domain in domains], method in self._fits).items()
            }
            for method, own in self._samples.items()
        ]

    def per_domain(self) -> list[dict[str, Any]]:
        """One row for each method and domain. Methods may have different domains.

        Returns:
            Dicts of ``method``, ``domain``, ``n`` (samples), ``temperature``, and ``accuracy``, ``ece`` and ``ece_ts``
            with the endings of :meth:`summary`.
        """
        self._check_has_data()
        return [
            {"method": method, "domain": domain, "n": int(own[domain].plain[0].sum())}
            | {"temperature": self._temperature(method), **mean_figures([own[domain]], method in self._fits)}
            for method, own in self._samples.items()
            for domain in self.domains
            if domain in own
        ]

    def to_markdown(self, *, intervals: bool = True) -> str:
        """The summary in Markdown, in per cent; ``intervals`` shows also intervals, noise floors and p-values."""
        return _markdown(self.summary(), self._caption(intervals), intervals)

    def to_latex(self, *, intervals: bool = True) -> str:
        r"""The same in LaTeX, for ``\usepackage{booktabs}``."""
        return _latex(self.summary(), self._caption(intervals), intervals)

    def to_csv(self, path: str | os.PathLike[str], *, per_domain: bool = False) -> None:
        """Writes :meth:`summary`, or :meth:`per_domain`, with an empty field for NaN.

        The file is replaced at once, or not at all with an ``OSError``.
        """
        _write_csv(Path(path), self.per_domain() if per_domain else self.summary())

    def to_dict(self) -> dict[str, Any]:
        """Everything by name, ready for JSON: NaN is None.

        Returns:
            ``id_domain``, ``n_bins``, ``caption``, ``summary[method][column]`` and
            ``per_domain[method][domain][column]``.
        """
        domains: dict[str, Any] = {}
        for row in map(_without_nan, self.per_domain()):
            domains.setdefault(row.pop("method"), {})[row.pop("domain")] = row
        head = {"id_domain": self.id_domain, "n_bins": self.n_bins, "caption": self._caption(True)}
        summary = {row.pop("method"): row for row in map(_without_nan, self.summary())}
        return {**head, "summary": summary, "per_domain": domains}

    def to_pandas(self, *, per_domain: bool = False) -> pd.DataFrame:
        """:meth:`summary`, or :meth:`per_domain`, as a ``DataFrame``; ``ImportError`` without pandas."""
        try:
            import pandas as pd
        except ImportError as error:
            raise ImportError("to_pandas needs pandas: pip install pandas") from error
        return pd.DataFrame(self.per_domain() if per_domain else self.summary())

    def __str__(self) -> str:
        try:
            return self.to_markdown()
        except ValueError as error:  # the report is still incomplete
            return f"{self!r}. No table yet: {error}"

    def __repr__(self) -> str:
        head = f"ShiftReport(id_domain={self.id_domain!r}, n_bins={self.n_bins})"
        return f"{head}: {len(self.methods)} methods, {len(self.domains)} domains"

    def _temperature(self, method: str) -> float:
        return self._fits[method].temperature if method in self._fits else math.nan

    def _caption(self, intervals: bool) -> str:
        return _caption(self.n_bins, self.id_domain, self.domains[1:], intervals)

    def _check_has_data(self) -> None:
        if not self._samples:
            raise ValueError("the report must hold data, got none; call add(method, domain, logits, target) first")

    def _check_complete(self) -> None:
        """Raises unless every method has data of the same domains, ``id_domain`` among them."""
        self._check_has_data()
        known = self.domains
        if self.id_domain not in known:
            raise ValueError(
                f"id_domain must be one of the domains added, got {self.id_domain!r} and "
                f"{', '.join(map(repr, known))}; add its data, or give the report the name you used"
            )
        for method in {**self._fits, **self._samples}:
            missing = [domain for domain in known if domain not in self._samples.get(method, {})]
            if missing:
                raise ValueError(
                    f"every method must be added in the same domains, since means over different ones do not compare; "
                    f"{method!r} lacks {', '.join(map(repr, missing))}; add them, or see per_domain()"
                )


def _check_names(**names: Any) -> None:
    for name, value in names.items():
        if not isinstance(value, str):
            raise TypeError(f"{name} must be a str, got {type(value).__name__} {value!r}")
        if not value.strip():
            raise ValueError(f"{name} must not be blank, got {value!r}; it is a heading of the report's tables")


def _caption(n_bins: int, id_domain: str, ood_domains: Sequence[str], intervals: bool) -> str:
    """What the figures of printed tables are."""
    ood = f"plain mean over {', '.join(ood_domains)}" if ood_domains else "no data"
    figures = f"Accuracy and ECE ({n_bins} bins) in per cent; ID: {id_domain}; OOD: {ood}; "
    scaling = "+ TS: logits divided by T, which was fitted on held-out data."
    return " ".join((figures + scaling + BRACKETS * intervals).split())


def _markdown(rows: Sequence[Row], caption: str, intervals: bool) -> str:
    table = _cells(rows, intervals, MARKDOWN)
    widths = [max(3, *map(len, column)) for column in zip(*table, strict=True)]  # a rule has three characters
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = [
        "| " + " | ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) + " |"
        for row in (table[0], rule, *table[1:])
    ]
    return "\n".join([*lines, "", caption])


def _latex(rows: Sequence[Row], caption: str, intervals: bool) -> str:
    head, *body = (" & ".join(row) + r" \\" for row in _cells(rows, intervals, LATEX))
    begin, end = rf"\begin{{tabular}}{{l{'r' * len(HEADINGS)}}}", r"\end{tabular}"
    return "\n".join(["% " + caption, begin, r"\toprule", head, r"\midrule", *body, r"\bottomrule", end])


def _write_csv(path: Path, rows: Sequence[Row]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # a rename is atomic within a folder
    try:
        with temporary.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(map(_without_nan, rows))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _without_nan(row: Row) -> Row:
    """With None in place of NaN, which CSV writes as an empty field."""
    return {name: None if value != value else value for name, value in row.items()}


def _cells(rows: Sequence[Row], intervals: bool, escapes: dict[int, str]) -> list[list[str]]:
    body = [[" ".join(row["method"].split()), *(_cell(row, name, intervals) for name in HEADINGS)] for row in rows]
    return [["Method", *HEADINGS.values()], *([cell.translate(escapes) for cell in cells] for cells in body)]


def _cell(row: Row, column: str, intervals: bool) -> str:
    value = row[column]
    if math.isnan(value):
        return MISSING
    if column == "temperature":
        return f"{value:.2f}" if 0.1 <= value < 100 else f"{value:.3g}"
    shown = f"{100 * value:.1f}"
    if not intervals:
        return shown
    ends = (f"{100 * row.get(column + end, math.nan):.1f}" for end in ("_low", "_high", "_debiased", "_floor"))
    low, high, debiased, floor = ends
    if "accuracy" in column:
        return f"{shown} ({low}{MISSING}{high})"
    if low != "nan":
        return f"{shown} ({low}{MISSING}{high}; {floor})"
    p = row[column + "_p"]
    return f"{shown} ({debiased}; {floor}; " + (f"p = {p:.3f})" if p >= 0.001 else "p < 0.001)")
