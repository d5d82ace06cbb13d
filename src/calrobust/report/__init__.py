"""Accuracy and calibration under shift."""

import csv
import math
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from calrobust._checks import check_choice, check_flag, check_instance, check_n_bins, check_softmax_exists
from calrobust.functional.calibration import bin_confidences
from calrobust.functional.fitting import determined_temperature
from calrobust.functional.scoring import Bins
from calrobust.report._figures import (
    DEFAULT,
    HEADINGS,
    Fit,
    Samples,
    caption,
    cells,
    check_choices,
    check_held_out,
    columns_of,
    differences,
    fingerprints_of,
    latex,
    markdown,
    mean_figures,
    on_cpu,
)

if TYPE_CHECKING:
    import pandas as pd


class ShiftReport:
    """Accuracy and calibration error of methods in and out of distribution, with and without temperature scaling.

    OOD figures are plain means over all domains but ``id_domain``. Domains must not share samples. An ECE has the parts
    of :func:`~calrobust.functional.calibration_interval`, for fixed T, but a mean ECE has no interval.
    :doc:`/derivations` has the other intervals.

    Figures are fractions, in printed tables per cent. Tables raise ``ValueError`` if a method lacks
    ``id_domain`` or a domain that others have. Logits and about 40 bytes for each sample are kept on the CPU.

    Args:
        id_domain: the domain that is in distribution.
        n_bins: number of bins of the ECE.
        keep_logits: False drops logits once there is a temperature: call :meth:`fit_temperature` before :meth:`add`.
            Then ``nll_own_t`` is NaN.

    Raises:
        TypeError, ValueError: an argument is invalid.

    Example:
        >>> import torch
        >>> from calrobust import ShiftReport
        >>> report = ShiftReport(id_domain="photo")
        >>> for domain, label in ("photo", 1), ("sketch", 1), ("clipart", 0):
        ...     report.add("FT", domain, torch.tensor([[0.0, 3.0]]), torch.tensor([label]))
        >>> report.summary()[0]["ood_accuracy"]  # (1 + 0) / 2
        0.5
    """

    def __init__(self, *, id_domain: str, n_bins: int = 15, keep_logits: bool = True) -> None:
        _check_names(id_domain=id_domain)
        check_n_bins(n_bins)
        check_flag(keep_logits=keep_logits)
        self.id_domain, self.n_bins, self.keep_logits = id_domain, int(n_bins), keep_logits
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
        """Adds predictions to those of the same names.

        Args:
            method: the row of the table.
            domain: the data set.
            logits: as for :func:`~calrobust.functional.fit_temperature`.
            target: likewise.

        Raises:
            TypeError, ValueError: a name is not a string or is blank, data are invalid, the number of classes changes,
                or over 1 % of the samples that T was fitted on are in this domain. The report is unchanged.
        """
        _check_names(method=method, domain=domain)
        logits, target = on_cpu(logits, target)
        fit = self._fits.get(method)
        known = fit.n_classes if fit and domain == self.id_domain else logits.shape[1]
        samples = self._samples.get(method, {}).get(domain) or Samples(self.keep_logits, known)
        _check_classes(samples.n_classes, logits, method, domain)
        columns = columns_of(logits, target)
        if columns["confidences"].isnan().any():
            check_softmax_exists(target, logits=logits)
        if fit and torch.isin(columns["fingerprints"], fit.fingerprints).any():
            before = samples.columns.get("fingerprints", [])
            check_held_out(method, domain, fit.fingerprints, torch.cat([*before, columns["fingerprints"]]))
        samples.add(logits, columns)
        if fit and not self.keep_logits:
            samples.scale(fit.temperature)
        self._samples.setdefault(method, {})[domain] = samples

    def fit_temperature(self, method: str, logits: Tensor, target: Tensor) -> float:
        """Fits a method's T to held-out data in distribution, before or after :meth:`add`.

        T is that of :func:`~calrobust.functional.fit_temperature`. Arguments and errors are those of :meth:`add`; a
        second call for a method raises ``ValueError`` too.
        """
        _check_names(method=method)
        if method in self._fits:
            raise ValueError(
                f"{method!r} must be fitted once, on all its validation data, got a second call after T = "
                f"{self._fits[method].temperature:.6g}; concatenate the batches, or use another name"
            )
        logits, target = on_cpu(logits, target)
        fingerprints = fingerprints_of(logits, target)
        own = self._samples.get(method, {})
        for domain, samples in own.items():
            if domain == self.id_domain:
                _check_classes(samples.n_classes, logits, method, domain)
            check_held_out(method, domain, fingerprints, samples["fingerprints"])
        temperature = determined_temperature(logits, target, of=f" of {method!r}")
        self._fits[method] = Fit(temperature, fingerprints, logits.shape[1])
        for samples in own.values():
            if not self.keep_logits:
                samples.scale(temperature)
        return temperature

    def bins(self, method: str, domain: str, *, scaled: bool = False) -> Bins:
        """Sums over bins, of logits / T if ``scaled``; ``ValueError`` without such data or T."""
        confidences, correct = self.confidences(method, domain)
        if scaled:
            if method not in self._fits:
                raise ValueError(
                    f"{method!r} must have a temperature to be scaled, got none; call fit_temperature first"
                )
            confidences = self._scaled(method, domain)["confidences_ts"]
        return bin_confidences(confidences, correct, n_bins=self.n_bins)

    def confidences(self, method: str, domain: str) -> tuple[Tensor, Tensor]:
        """Confidences ``[N]`` and whether predictions are right; ``ValueError`` without such data."""
        samples = self._samples_of(method, domain)
        return samples["confidences"].clone(), samples["correct"].clone()

    def summary(self) -> list[dict[str, Any]]:
        """One row for each method, in the order of first :meth:`add`.

        Returns:
            Dicts of ``method``, ``temperature`` and, after ``id_`` and ``ood_``, with ``…_low`` and ``…_high``:
            ``accuracy``, ``ece`` and ``ece_ts`` (also with ``…_debiased``, ``…_floor`` and ``…_p``), ``nll`` in
            nats, ``nll_ts``, ``nll_own_t`` (at each domain's best T, a diagnosis),
            ``brier``, and ``aurc`` (:func:`~calrobust.functional.selective_risk`). NaN where there is no temperature,
            OOD domain, interval or logits.
        """
        self._check_complete()
        return [
            {"method": method, "temperature": self._temperature(method)}
            | {
                f"{group}_{name}": value
                for group, domains in self._groups().items()
                for name, value in self._figures(method, domains).items()
            }
            for method in self.methods
        ]

    def compare(self, a: str, b: str) -> dict[str, Any]:
        """The figures of one method minus those of another, from the same samples.

        Intervals are paired; ECEs have none (:doc:`/derivations`).

        Args:
            a: a method.
            b: another, with the same targets in the same order.

        Returns:
            ``a``, ``b``, and the differences of the figures of :meth:`summary` but ``temperature``, with ``…_low`` and
            ``…_high``. NaN as there, and ends also where fewer than about ten samples make the difference.

        Raises:
            ValueError: a name is no method's, targets differ, or the report is incomplete.

        Example:
            >>> import torch
            >>> from calrobust import ShiftReport
            >>> report = ShiftReport(id_domain="photo")
            >>> for method, logit in ("FT", 1.0), ("CaRot", 3.0):
            ...     report.add(method, "photo", torch.tensor([[0.0, logit]]), torch.tensor([1]))
            >>> round(report.compare("CaRot", "FT")["id_nll"], 4)  # log(1 + exp(-3)) - log(1 + exp(-1))
            -0.2647
        """
        self._check_complete()
        check_choice(self.methods, a=a, b=b)
        for domain in self.domains:
            first, second = (self._samples[method][domain]["target"] for method in (a, b))
            if not torch.equal(first, second):
                raise ValueError(
                    f"a and b must have the same targets in the same order, got {len(first):,} of {a!r} and others, "
                    f"{len(second):,}, of {b!r} in {domain!r}; add both from one data loader without shuffling"
                )
        row: dict[str, Any] = {"a": a, "b": b}
        for group, domains in self._groups().items():
            pairs = [(self._scaled(a, domain), self._scaled(b, domain)) for domain in domains]
            found = differences(pairs, self._figures(a, domains), self._figures(b, domains))
            row |= {f"{group}_{name}": value for name, value in found.items()}
        return row

    def per_domain(self) -> list[dict[str, Any]]:
        """One row for each method and domain. Methods may have different domains.

        Returns:
            Dicts of ``method``, ``domain``, ``n`` (samples), ``temperature``, and the figures of :meth:`summary`.
        """
        self._check_has_data()
        return [
            {"method": method, "domain": domain, "n": len(own[domain]["target"])}
            | {"temperature": self._temperature(method), **self._figures(method, [domain])}
            for method, own in self._samples.items()
            for domain in self.domains
            if domain in own
        ]

    def to_markdown(self, *, columns: Sequence[str] = DEFAULT, intervals: bool = True) -> str:
        """The summary in Markdown.

        Args:
            columns: names of :meth:`summary` without endings, such as ``"ood_nll"``.
            intervals: add intervals, noise floors and p-values.

        Raises:
            TypeError, ValueError: ``columns`` is not a list or names no column, or the report is incomplete.
        """
        return markdown(*self._table(columns, intervals))

    def to_latex(self, *, columns: Sequence[str] = DEFAULT, intervals: bool = True) -> str:
        """The same in LaTeX, for booktabs."""
        return latex(*self._table(columns, intervals))

    def to_csv(self, path: str | os.PathLike[str], *, per_domain: bool = False) -> None:
        """Writes :meth:`summary`, or :meth:`per_domain`, at once or not at all (``OSError``); NaN is an empty field."""
        path, rows = Path(os.path.realpath(path)), self.per_domain() if per_domain else self.summary()
        if path.exists() != path.is_file() or not path.parent.is_dir():
            raise FileNotFoundError(f"path must be a file in a folder that exists, got {path}")
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # in the same folder
        try:
            with temporary.open("w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, rows[0], lineterminator="\n")
                writer.writeheader()
                writer.writerows({name: "" if value != value else value for name, value in row.items()} for row in rows)
            if path.exists():
                shutil.copymode(path, temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def to_dict(self) -> dict[str, Any]:
        """Everything by name, for JSON: NaN and inf are None.

        Returns:
            ``id_domain``, ``n_bins``, ``caption``, ``summary[method][column]`` and
            ``per_domain[method][domain][column]``.
        """
        domains: dict[str, Any] = {}
        for row in map(_finite, self.per_domain()):
            domains.setdefault(row.pop("method"), {})[row.pop("domain")] = row
        head = {"id_domain": self.id_domain, "n_bins": self.n_bins, "caption": self._caption(HEADINGS, True)}
        summary = {row.pop("method"): row for row in map(_finite, self.summary())}
        return {**head, "summary": summary, "per_domain": domains}

    def to_pandas(self, *, per_domain: bool = False) -> "pd.DataFrame":
        """:meth:`summary`, or :meth:`per_domain`, as a ``DataFrame``; ``ImportError`` without pandas."""
        try:
            import pandas as pd
        except ImportError as error:
            raise ImportError("to_pandas needs pandas: pip install pandas") from error
        return pd.DataFrame(self.per_domain() if per_domain else self.summary())

    def __str__(self) -> str:
        try:
            return self.to_markdown()
        except ValueError as error:
            return f"{self!r}. No table yet: {error}"

    def __repr__(self) -> str:
        head = f"ShiftReport(id_domain={self.id_domain!r}, n_bins={self.n_bins})"
        return f"{head}: {len(self.methods)} methods, {len(self.domains)} domains"

    def _samples_of(self, method: str, domain: str) -> Samples:
        self._check_has_data()
        check_choice(self.methods, method=method)
        check_choice(list(self._samples[method]), domain=domain)
        return self._samples[method][domain]

    def _temperature(self, method: str) -> float:
        return self._fits[method].temperature if method in self._fits else math.nan

    def _groups(self) -> dict[str, list[str]]:
        return {"id": [self.id_domain], "ood": self.domains[1:]}

    def _figures(self, method: str, domains: list[str]) -> dict[str, float]:
        return mean_figures([self._scaled(method, domain) for domain in domains], self.n_bins)

    def _scaled(self, method: str, domain: str) -> Samples:
        samples = self._samples[method][domain]
        if method in self._fits:
            samples.scale(self._fits[method].temperature)
        return samples

    def _table(self, columns: Sequence[str], intervals: bool) -> tuple[list[list[str]], str]:
        check_choices([*HEADINGS], columns=columns)
        return cells(self.summary(), columns, intervals), self._caption(columns, intervals)

    def _caption(self, columns: Iterable[str], intervals: bool) -> str:
        return caption(columns, intervals, self.id_domain, self.domains[1:], self.n_bins)

    def _check_has_data(self) -> None:
        if not self._samples:
            raise ValueError("the report must hold data, got none; call add(method, domain, logits, target) first")

    def _check_complete(self) -> None:
        self._check_has_data()
        known = self.domains
        if self.id_domain not in known:
            raise ValueError(
                f"id_domain must be one of the domains added, got {self.id_domain!r} and "
                f"{', '.join(map(repr, known))}; add its data, or give the report the name you used"
            )
        for method in {**self._fits, **self._samples}:
            if missing := [domain for domain in known if domain not in self._samples.get(method, {})]:
                raise ValueError(
                    f"every method must be added in the same domains, since means over different ones do not compare; "
                    f"{method!r} lacks {', '.join(map(repr, missing))}; add them, or see per_domain()"
                )


def _check_names(**names: Any) -> None:
    for name, value in names.items():
        check_instance(str, f"pass its name, not {value!r}", **{name: value})
        if not value.strip():
            raise ValueError(f"{name} must not be blank, got {value!r}; it is a heading of tables")


def _check_classes(known: int, logits: Tensor, method: str, domain: str) -> None:
    if logits.shape[1] != known:
        raise ValueError(
            f"logits must have the same number of classes in every batch of a domain, got {known} and then "
            f"{logits.shape[1]} for {method!r} in {domain!r}; set the classes that a batch lacks to -inf"
        )


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    return {name: None if value != value or value in (math.inf, -math.inf) else value for name, value in row.items()}
