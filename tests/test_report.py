from __future__ import annotations

import csv
import itertools
import json
import math
import os
import re
import sys
import warnings
from collections.abc import Callable
from functools import partial
from operator import methodcaller
from pathlib import Path
from typing import Any, cast

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from strategies import Predictions, classifier, predictions, seeds
from torch.testing import assert_close

from calrobust.functional.calibration import bin_confidences, calibration_error, calibration_interval
from calrobust.functional.fitting import best_temperature, fit_temperature
from calrobust.functional.scoring import risk_coverage_curve, top_label
from calrobust.plotting import reliability_grid, risk_coverage
from calrobust.report import ShiftReport
from calrobust.report._figures import ECE_PARTS, ENDS, FIGURES, SCORES, fingerprints_of, score_interval

DOMAINS = ("photo", "sketch", "clipart")


def scored_set(domain: str, n: int = 300, seed: int = 0, **options: Any) -> Predictions:
    """Overconfident predictions, others for every domain."""
    return classifier(n, 4, seed * len(DOMAINS) + DOMAINS.index(domain), **({"sharpness": 0.5} | options))


def validation_set(n: int = 200) -> Predictions:
    """Shares no sample with any test set."""
    return classifier(n, 4, 12345, sharpness=0.5)


def make_report(*methods: str, fit: bool = True) -> ShiftReport:
    """Every method in every domain, with different predictions."""
    report = ShiftReport(id_domain="photo")
    for seed, method in enumerate(methods or ("FT", "CaRot")):
        if fit:
            report.fit_temperature(method, *validation_set())
        for domain in DOMAINS:
            report.add(method, domain, *scored_set(domain, seed=seed))
    return report


def accuracy(p: Predictions) -> float:
    """Share of rows whose maximum is the label."""
    return sum(int(row.argmax() == label) for row, label in zip(p.logits, p.target, strict=True)) / len(p.target)


def ece(p: Predictions, temperature: float = 1.0) -> float:
    """By definition, of the float64 softmax."""
    confidences = (p.logits.double() / temperature).softmax(1).amax(1)
    return oracles.calibration_error(confidences, p.logits.argmax(1) == p.target, 15)


class TestFigures:
    """What the columns hold."""

    def test_are_the_definitions(self) -> None:
        """Accuracy, ECE and ECE at T of the ID domain, by the naive formulas."""
        row = make_report("FT").summary()[0]
        p, temperature = scored_set("photo"), oracles.best_temperature(*validation_set())
        assert row["id_accuracy"] == pytest.approx(accuracy(p), abs=1e-12)
        assert row["id_ece"] == pytest.approx(ece(p), abs=1e-6)
        assert row["temperature"] == pytest.approx(temperature, rel=1e-6)
        assert row["id_ece_ts"] == pytest.approx(ece(p, temperature), abs=1e-6)

    def test_the_ood_mean_is_over_the_ood_domains_alone(self) -> None:
        """The sum over OOD data sets, divided by their number, whatever their sizes; nothing else counts (trap 34)."""
        report = ShiftReport(id_domain="photo")
        sets = {d: scored_set(d, n) for d, n in zip(DOMAINS, (50, 500, 20), strict=True)}
        for domain, p in sets.items():
            report.add("FT", domain, *p)
        row = report.summary()[0]
        assert row["ood_accuracy"] == pytest.approx((accuracy(sets["sketch"]) + accuracy(sets["clipart"])) / 2)
        assert row["ood_ece"] == pytest.approx((ece(sets["sketch"]) + ece(sets["clipart"])) / 2, abs=1e-6)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_scores_are_the_definitions(self, dtype: torch.dtype) -> None:
        """NLL as given, at T and at the domain's own T; Brier score; AURC: by the naive formulas, from batches."""
        report = ShiftReport(id_domain="photo")
        temperature = report.fit_temperature("FT", *validation_set())
        for domain in DOMAINS:
            logits, target = scored_set(domain, dtype=dtype)
            for rows in (slice(100), slice(100, None)):
                report.add("FT", domain, logits[rows], target[rows])
        for row in report.per_domain():
            p = scored_set(row["domain"], dtype=dtype)
            one_hot = torch.nn.functional.one_hot(p.target, 4)
            expected = {
                "nll": oracles.negative_log_likelihood(*p),
                "nll_ts": oracles.negative_log_likelihood(*p, temperature),
                "nll_own_t": oracles.negative_log_likelihood(*p, oracles.best_temperature(*p)),
                "brier": (p.logits.double().softmax(1) - one_hot).square().sum(1).mean(),
                "aurc": risk_coverage_curve(*top_label(p.logits.double(), p.target)).mean(),
            }
            tolerance = 1e-6 if dtype == torch.float32 else 1e-12
            assert {name: row[name] for name in SCORES} == pytest.approx(
                {name: float(value) for name, value in expected.items()}, abs=tolerance
            )
            assert row["nll_own_t"] <= min(row["nll"], row["nll_ts"])

    @given(p=predictions(min_samples=2), seed=seeds())
    def test_no_temperature_is_better_than_a_domains_own(self, p: Predictions, seed: int) -> None:
        """The NLL as given, and at the T of other data, unless the data have no best T."""
        report = ShiftReport(id_domain="photo")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the held-out data need not determine T
            report.fit_temperature("FT", *classifier(30, p.logits.shape[1], seed, spread=1.0))
        report.add("FT", "photo", *p)
        row = report.summary()[0]
        if not best_temperature(*p)[1]:
            assert row["id_nll_own_t"] <= min(row["id_nll"], row["id_nll_ts"]) + 1e-7  # float32 losses

    def test_scores_have_intervals_and_a_mean_over_domains(self) -> None:
        """As wide as the normal one on average, and the mean of two domains of one size varies by 1/√2 of one."""
        report = ShiftReport(id_domain="photo")
        for domain in DOMAINS:
            report.add("FT", domain, *scored_set("photo", 2000))
        p, row = scored_set("photo", 2000), report.summary()[0]
        losses = torch.nn.functional.cross_entropy(p.logits, p.target, reduction="none")
        for group, n in (("id", 2000), ("ood", 4000)):
            width = row[f"{group}_nll_high"] - row[f"{group}_nll_low"]
            assert width == pytest.approx(2 * 1.96 * float(losses.std()) / math.sqrt(n), rel=0.01)
            for name in SCORES:
                if name != "nll_ts":
                    assert row[f"{group}_{name}_low"] < row[f"{group}_{name}"] < row[f"{group}_{name}_high"]

    @pytest.mark.parametrize("wrong", [9, 10, 290, 291])
    def test_scores_of_few_right_or_wrong_predictions_have_no_interval(self, wrong: int) -> None:
        """Below ten of either kind the tail of the scores is not in the sample; the values stand."""
        p, report = scored_set("photo"), ShiftReport(id_domain="photo")
        predicted = p.logits.argmax(1)
        report.add("FT", "photo", p.logits, (predicted + (torch.arange(300) < wrong)) % 4)
        row = report.summary()[0]
        assert [math.isnan(row[f"id_{name}_low"]) for name in ("nll", "brier", "aurc")] == [wrong not in (10, 290)] * 3
        assert row["id_nll"] > 0

    def test_a_label_of_a_masked_class_has_an_infinite_score(self) -> None:
        """At any temperature, without an interval; what is not a number is None in JSON."""
        report = ShiftReport(id_domain="photo")
        logits, target = scored_set("photo")
        logits[0, target[0]] = -math.inf
        report.add("FT", "photo", logits, target)
        row = report.summary()[0]
        assert row["id_nll"] == row["id_nll_own_t"] == math.inf
        assert math.isnan(row["id_nll_low"])
        assert math.isfinite(row["id_brier"])
        assert report.to_dict()["summary"]["FT"]["id_nll"] is None

    @pytest.mark.parametrize("n", [1, 300])
    def test_degenerate_data_have_a_score_at_their_own_temperature(self, n: int) -> None:
        """No warning, as nobody takes that temperature home: separable, constant, of one class, a single sample."""
        logits, _ = scored_set("photo", n)
        report = ShiftReport(id_domain="photo")
        report.add("separable", "photo", logits, logits.argmax(1))
        report.add("constant", "photo", 0 * logits, logits.argmax(1))
        report.add("anti-correlated", "photo", logits, logits.argmin(1))
        separable, constant, anti_correlated = (row["nll_own_t"] for row in report.per_domain())
        assert separable < min(0.01, report.per_domain()[0]["nll"])
        assert constant == pytest.approx(math.log(4))
        assert anti_correlated == pytest.approx(math.log(4), abs=0.02)

    def test_without_a_temperature_scaled_columns_are_nan(self) -> None:
        """Of this method only; the others keep theirs."""
        report = make_report("CaRot")
        for domain in DOMAINS:
            report.add("ZS", domain, *scored_set(domain, seed=7))
        fitted, unfitted = report.summary()
        no_interval = {f"ood_ece{ts}_{end}" for ts in ("", "_ts") for end in ("low", "high")}  # of a mean of two
        scaled = {"temperature", *(f"{group}_ece_ts{part}" for group in ("id", "ood") for part in ECE_PARTS)}
        scaled |= {f"{group}_nll_ts{end}" for group in ("id", "ood") for end in ENDS}
        assert {name for name, value in unfitted.items() if value != value} == scaled | no_interval
        assert {name for name, value in fitted.items() if value != value} == no_interval

    def test_figures_are_python_floats(self) -> None:
        """T as well, which ``functional.fit_temperature`` gives as a tensor: they are to be printed and saved."""
        report = make_report(fit=False)
        temperature = report.fit_temperature("FT", *validation_set())
        figures = [value for row in (*report.summary(), *report.per_domain()) for value in row.values()]
        assert {type(value) for value in (temperature, *figures)} == {float, int, str}
        assert type(temperature) is float
        assert temperature == float(fit_temperature(*validation_set())) == report.summary()[0]["temperature"]

    def test_without_ood_domains_their_columns_are_nan(self) -> None:
        """There is no mean over nothing; the ID columns stand, and so does the table."""
        report = ShiftReport(id_domain="photo")
        report.add("FT", "photo", *scored_set("photo"))
        row = report.summary()[0]
        assert all(math.isnan(row[f"ood_{name}"]) for name in FIGURES)
        assert row["id_accuracy"] == accuracy(scored_set("photo"))
        assert "OOD: no data;" in str(report)

    def test_per_domain_has_a_row_for_each_method_and_domain(self) -> None:
        """ID first, then as added; sizes and figures are those of the domain."""
        report = ShiftReport(id_domain="photo")
        for method, domain in itertools.product(("B", "A"), ("clipart", "photo", "sketch")):
            report.add(method, domain, *scored_set(domain, 40))
        rows = report.per_domain()
        assert [(row["method"], row["domain"]) for row in rows] == [
            (method, domain) for method in ("B", "A") for domain in ("photo", "clipart", "sketch")
        ]
        assert [row["n"] for row in rows] == [40] * 6
        assert rows[1]["ece"] == pytest.approx(ece(scored_set("clipart", 40)), abs=1e-6)

    def test_methods_keep_the_order_of_first_add(self) -> None:
        """Neither later batches nor temperatures move a row."""
        report = ShiftReport(id_domain="photo")
        report.fit_temperature("third", *validation_set())
        for method in ("first", "second", "third", "first"):
            report.add(method, "photo", *scored_set("photo"))
        assert [row["method"] for row in report.summary()] == report.methods == ["first", "second", "third"]

    def test_masked_and_half_precision_logits_are_scaled_in_float32(self) -> None:
        """-inf stays masked, and a division by T does not round to bfloat16."""
        p, masked = scored_set("photo", dtype=torch.bfloat16), torch.tensor([0.0, 0.0, 0.0, -math.inf])
        p = Predictions(p.logits + masked.bfloat16(), p.target.clamp(max=2))
        report = ShiftReport(id_domain="photo")
        temperature = report.fit_temperature("FT", *validation_set())
        report.add("FT", "photo", *p)
        assert report.summary()[0]["id_ece_ts"] == pytest.approx(ece(p, temperature), abs=1e-6)


class TestMerging:
    """Batches, order of calls, buffers."""

    @given(p=predictions(min_samples=2), cut=st.integers(1, 59))
    def test_batches_do_not_show(self, p: Predictions, cut: int) -> None:
        """Any split in two, in any order, gives the figures and intervals of the whole."""
        whole, split = ShiftReport(id_domain="photo"), ShiftReport(id_domain="photo")
        whole.add("FT", "photo", *p)
        cut = min(cut, len(p.target) - 1)
        split.add("FT", "photo", p.logits[cut:], p.target[cut:])
        split.add("FT", "photo", p.logits[:cut], p.target[:cut])
        assert values(split) == pytest.approx(values(whole), abs=1e-9, nan_ok=True)

    def test_the_order_of_adds_and_fits_does_not_matter(self) -> None:
        """T before, between or after the data; domains and methods in any order: the same numbers to the last digit."""
        expected = {row["method"]: row for row in make_report("A", "B").summary()}
        calls = [(seed, method, domain) for seed, method in enumerate("AB") for domain in (*DOMAINS, "fit")]
        for order in (calls[::-1], calls[::2] + calls[1::2], sorted(calls, key=lambda call: call[2])):
            report = ShiftReport(id_domain="photo")
            for seed, method, domain in order:
                if domain == "fit":
                    report.fit_temperature(method, *validation_set())
                else:
                    report.add(method, domain, *scored_set(domain, seed=seed))
            for row in report.summary():
                assert list(map(str, row.values())) == list(map(str, expected[row["method"]].values()))  # NaN is NaN

    @settings(max_examples=settings().max_examples // 10)
    @given(data=st.data())
    def test_any_order_of_any_pieces_gives_the_same_report(self, data: st.DataObject) -> None:
        """All data cut into pieces, which are shuffled among the fits and the reads: the figures of the whole."""
        whole = ShiftReport(id_domain="photo")
        calls: list[Callable[[ShiftReport], object]] = []
        for (seed, method), domain in itertools.product(enumerate("AB"), DOMAINS):
            p = scored_set(domain, 30, seed=seed)
            whole.add(method, domain, *p)
            cuts = [0, *sorted(data.draw(st.lists(st.integers(1, 29), max_size=3, unique=True))), 30]
            for rows in itertools.starmap(slice, itertools.pairwise(cuts)):
                calls.append(
                    partial(ShiftReport.add, method=method, domain=domain, logits=p.logits[rows], target=p.target[rows])
                )
        for method in "AB":
            whole.fit_temperature(method, *validation_set())
            calls.append(methodcaller("fit_temperature", method, *validation_set()))
            calls.append(lambda report: report.methods and report.per_domain())
        report = ShiftReport(id_domain="photo")
        for call in data.draw(st.permutations(calls)):
            call(report)
        rows_of = {row["method"]: row for row in report.summary()}
        for row in whole.summary():
            method = row.pop("method")
            found = {name: rows_of[method][name] for name in row}
            assert found == pytest.approx(row, abs=1e-9, nan_ok=True)

    def test_figures_follow_what_is_added_after_they_were_read(self) -> None:
        """No cached number outlives new data or a new temperature."""
        report, p = ShiftReport(id_domain="photo"), scored_set("photo")
        report.add("FT", "photo", p.logits[:100], p.target[:100])
        first = report.summary()[0]
        report.add("FT", "photo", p.logits[100:], p.target[100:])
        second = report.summary()[0]
        report.fit_temperature("FT", *validation_set())
        third = report.summary()[0]
        assert first["id_accuracy"] != second["id_accuracy"] == accuracy(p)
        assert math.isnan(second["id_ece_ts"])
        assert third["id_ece_ts"] == pytest.approx(ece(p, third["temperature"]), abs=1e-6)

    def test_the_caller_may_fill_the_same_buffers_again(self) -> None:
        """What was added is the report's own, and holds no graph."""
        report, p = ShiftReport(id_domain="photo"), scored_set("photo")
        logits, target = p.logits.clone().requires_grad_(), p.target.clone()
        report.add("FT", "photo", logits, target)
        with torch.no_grad():
            logits.zero_()
        target.zero_()
        temperature = report.fit_temperature("FT", *validation_set())
        row = report.summary()[0]
        assert (row["id_accuracy"], row["id_ece"]) == (accuracy(p), pytest.approx(ece(p), abs=1e-6))
        assert row["id_ece_ts"] == pytest.approx(ece(p, temperature), abs=1e-6)

    def test_what_it_gives_can_be_changed(self) -> None:
        """The figures stay."""
        report = make_report("FT")
        before = report.to_dict()
        for column in report.confidences("FT", "photo"):
            column.zero_()
        assert report.to_dict() == before

    def test_a_default_device_changes_nothing(self) -> None:
        """Figures and pictures are computed where the data are, on the CPU."""
        expected, validation = make_report("FT").to_dict(), validation_set()
        sets = {domain: scored_set(domain) for domain in DOMAINS}
        report = ShiftReport(id_domain="photo")
        with torch.device("meta"):
            for domain, data in sets.items():
                report.add("FT", domain, *data)
            report.fit_temperature("FT", *validation)
            assert report.to_dict() == expected
            risk_coverage(report)
            reliability_grid(report)

    @pytest.mark.parametrize("keep_logits", [True, False])
    def test_logits_are_kept_if_asked_or_until_there_is_a_temperature(self, keep_logits: bool) -> None:
        """As documented: else about forty bytes for each sample, whatever the number of classes."""
        report = ShiftReport(id_domain="photo", keep_logits=keep_logits)
        report.add("FT", "photo", *classifier(100, 1000, 0))
        report.summary()
        assert held_bytes(report) > 4 * 100 * 1000
        report.fit_temperature("FT", *classifier(10, 1000, 1))
        report.add("FT", "photo", *classifier(100, 1000, 2))
        row = report.summary()[0]
        both = classifier(100, 1000, 0), classifier(100, 1000, 2)
        logits, target = (torch.cat(pair) for pair in zip(*both, strict=True))
        expected = oracles.negative_log_likelihood(logits, target, row["temperature"])
        assert row["id_nll_ts"] == pytest.approx(float(expected), abs=1e-6)
        if keep_logits:
            assert held_bytes(report) > 4 * 200 * 1000
            expected = oracles.negative_log_likelihood(logits, target, oracles.best_temperature(logits, target))
            assert row["id_nll_own_t"] == pytest.approx(float(expected), abs=1e-6)
        else:
            assert held_bytes(report) <= 44 * 200 + 10 * 8
            assert math.isnan(row["id_nll_own_t"])


def values(report: ShiftReport) -> list[float]:
    """Every number of the summary."""
    return [value for row in report.summary() for name, value in row.items() if name != "method"]


def held_bytes(report: ShiftReport) -> int:
    """Of all tensors a report holds."""
    tensors = [fit.fingerprints for fit in report._fits.values()]
    for samples in (samples for own in report._samples.values() for samples in own.values()):
        tensors += [*samples.logits, *itertools.chain(*samples.columns.values(), *samples.unscaled)]
    return sum(t.numel() * t.itemsize for t in {id(t): t for t in tensors}.values())


class TestIntervals:
    """95 % intervals and noise floors."""

    def test_those_of_an_ece_are_calibration_intervals(self) -> None:
        """In distribution, in a single OOD domain, and at T; the printed table shows interval and floor (trap 26)."""
        report = ShiftReport(id_domain="photo")
        temperature = report.fit_temperature("FT", *validation_set())
        for domain in ("photo", "sketch"):
            report.add("FT", domain, *scored_set(domain))
        row = report.summary()[0]
        for group, domain in (("id", "photo"), ("ood", "sketch")):
            p = scored_set(domain)
            for name, logits in (("ece", p.logits), ("ece_ts", p.logits / temperature)):
                expected = calibration_interval(*top_label(logits, p.target))
                found = [row[f"{group}_{name}{part}"] for part in ECE_PARTS]
                assert found == pytest.approx([float(figure) for figure in expected], abs=1e-6)
                value, _, low, high, floor, _ = (100 * figure for figure in found)
                assert f"{value:.1f} ({low:.1f}\N{EN DASH}{high:.1f}; {floor:.1f})" in str(report)

    def test_the_mean_ece_of_several_domains_has_no_interval(self) -> None:
        """The table prints the mean of debiased values and of floors, and the p-value instead."""
        report = make_report("FT")
        row, rows = report.summary()[0], report.per_domain()[1:]
        for part in ("_debiased", "_floor"):
            assert row["ood_ece" + part] == pytest.approx(sum(r["ece" + part] for r in rows) / 2)
        assert math.isnan(row["ood_ece_low"])
        everything = report.to_dict()
        assert everything["summary"]["FT"]["ood_ece_high"] is None
        for said in (str(report), report.to_latex(), everything["caption"]):
            assert "has its debiased value, noise floor and p-value against perfect calibration." in said
        value, debiased, floor = (100 * row["ood_ece" + part] for part in ("", "_debiased", "_floor"))
        assert row["ood_ece_p"] < 0.001
        assert f"| {value:.1f} ({debiased:.1f}; {floor:.1f}; p < 0.001) |" in str(report)
        assert rf"{value:.1f} ({debiased:.1f}; {floor:.1f}; p \textless{{}} 0.001) &" in report.to_latex()

    def test_an_ece_of_few_samples_has_no_interval_either(self) -> None:
        """Nor does its cell; a p-value has three decimals."""
        report = ShiftReport(id_domain="photo")
        report.add("FT", "photo", *scored_set("photo", 20, sharpness=1.0))
        row = report.summary()[0]
        value, debiased, floor = (100 * row["id_ece" + part] for part in ("", "_debiased", "_floor"))
        assert math.isnan(row["id_ece_low"])
        assert 0.001 < row["id_ece_p"] < 1
        assert f"| {value:.1f} ({debiased:.1f}; {floor:.1f}; p = {row['id_ece_p']:.3f}) |" in str(report)

    @pytest.mark.parametrize("group", ["id", "ood"])
    def test_of_the_accuracy_has_the_width_of_the_binomial(self, group: str) -> None:
        """2 * 1.96 standard errors; the mean of two domains of one size varies by 1/√2 of what one does."""
        report = ShiftReport(id_domain="photo")
        for domain in DOMAINS:
            report.add("FT", domain, *scored_set("photo", 2000))
        row, share = report.summary()[0], accuracy(scored_set("photo", 2000))
        expected = 2 * 1.96 * math.sqrt(share * (1 - share) / (2000 if group == "id" else 4000))
        assert row[f"{group}_accuracy_high"] - row[f"{group}_accuracy_low"] == pytest.approx(expected, rel=0.01)


class TestCompare:
    """Paired differences of two methods."""

    @staticmethod
    def report(n: int = 2000, fit: bool = True, **noise: float) -> ShiftReport:
        """Methods whose logits are those of one model and some noise of their own."""
        report = ShiftReport(id_domain="photo")
        for i, (method, size) in enumerate(noise.items()):
            generator = torch.Generator().manual_seed(i)
            if fit:
                report.fit_temperature(method, *validation_set())
            for domain in DOMAINS:
                logits, target = scored_set(domain, n)
                report.add(method, domain, logits + size * torch.randn(logits.shape, generator=generator), target)
        return report

    def test_are_differences_of_the_figures(self) -> None:
        """Of both groups, of every figure but T, in the order of the arguments."""
        report = self.report(A=0.0, B=0.5)
        a, b = report.summary()
        for first, second, sign in (("A", "B", 1), ("B", "A", -1)):
            found = report.compare(first, second)
            assert (found.pop("a"), found.pop("b")) == (first, second)
            names = [f"{group}_{name}" for group in ("id", "ood") for name in ("accuracy", "ece", "ece_ts", *SCORES)]
            assert list(found) == [f"{name}{end}" for name in names for end in ENDS]
            for name in names:
                assert found[name] == pytest.approx(sign * (a[name] - b[name]), abs=1e-15)
                low, high = (found[f"{name}_{end}"] for end in ("low", "high"))
                assert math.isnan(low) == math.isnan(high) == ("ece" in name)
                assert "ece" in name or low < found[name] < high

    def test_intervals_are_those_of_the_mean_difference(self) -> None:
        """1.96 standard errors of what differs for each sample, far less than of two independent samples."""
        report = self.report(A=0.0, B=0.3)
        (a, *_), (b, *_) = ([s["nll"] for s in report._samples[method].values()] for method in "AB")
        found, own = report.compare("A", "B"), report.summary()[0]
        expected = 2 * 1.96 * float((a - b).std()) / math.sqrt(2000)
        assert found["id_nll_high"] - found["id_nll_low"] == pytest.approx(expected, rel=0.01)
        assert expected < 0.5 * (own["id_nll_high"] - own["id_nll_low"])

    def test_the_mean_over_domains_is_of_independent_ones(self) -> None:
        """Three times the same OOD domain: the interval is shorter by the root of 3."""
        reports = [ShiftReport(id_domain="photo") for _ in range(2)]
        (logits, target), noise = scored_set("photo", 2000), torch.randn(2000, 4, generator=torch.Generator())
        for report, domains in zip(reports, (("a",), ("a", "b", "c")), strict=True):
            for domain in ("photo", *domains):
                report.add("A", domain, logits, target)
                report.add("B", domain, logits + noise, target)
        one, three = (report.compare("A", "B") for report in reports)
        for name in ("accuracy", "nll", "nll_own_t", "brier", "aurc"):
            assert one[f"ood_{name}"] == pytest.approx(three[f"ood_{name}"])
            widths = [found[f"ood_{name}_high"] - found[f"ood_{name}_low"] for found in (one, three)]
            assert widths[0] == pytest.approx(math.sqrt(3) * widths[1])

    @pytest.mark.parametrize("fit", [True, False])
    def test_a_method_is_no_different_from_itself(self, fit: bool) -> None:
        """All is 0 exactly, with its interval, also under another name; what is scaled is NaN without a temperature."""
        report = self.report(300, fit, A=0.0, B=0.0)
        for b in "AB":
            found = dict(list(report.compare("A", b).items())[2:])
            scaled = {f"{group}_{name}_ts{end}" for group in ("id", "ood") for name in ("ece", "nll") for end in ENDS}
            assert {name for name, value in found.items() if value != 0} == (set() if fit else scaled)

    def test_a_model_that_differs_in_scale_is_no_different_at_its_temperature(self) -> None:
        """Twice the logits have twice the T; what only the given confidence tells apart is told apart."""
        report, v = ShiftReport(id_domain="photo"), validation_set()
        for method, scale in (("A", 1), ("B", 2)):
            report.fit_temperature(method, scale * v.logits, v.target)
            report.add(method, "photo", scale * scored_set("photo").logits, scored_set("photo").target)
        found = report.compare("A", "B")
        for name in ("nll_ts", "nll_own_t"):
            assert [found[f"id_{name}{end}"] for end in ENDS] == pytest.approx([0, 0, 0], abs=1e-7)
        assert found["id_nll_high"] < 0 == found["id_accuracy"]

    @pytest.mark.parametrize("n", [20, 40, 1000])
    def test_few_differences_have_students_quantiles(self, n: int) -> None:
        """With as many degrees of freedom as there are differences of one size."""
        mean, low, high = score_interval(torch.tensor([1.0, -1.0]).repeat(n // 2), paired=True)
        expected = stats.t.ppf(0.975, n) / math.sqrt(n - 1)
        assert mean == 0
        assert [-float(low), float(high)] == pytest.approx([expected] * 2, rel=3e-4)

    def test_few_samples_that_differ_have_no_interval(self) -> None:
        """Predictions that nine samples tell apart are not surely equal, nor are those of equal accuracy."""
        logits, target = scored_set("photo")
        for n, name, is_given in ((9, "nll", False), (40, "nll", True), (40, "accuracy", False)):
            report, changed = ShiftReport(id_domain="photo"), logits.clone()
            changed[torch.arange(n), target[:n]] += 1e-3
            report.add("A", "photo", logits, target)
            report.add("B", "photo", changed, target)
            found = report.compare("A", "B")
            assert math.isnan(found[f"id_{name}_low"]) != is_given, (n, name)
            assert found["id_accuracy"] == 0 != found["id_nll"]

    def test_other_targets_are_refused(self) -> None:
        """Another order, another size, other labels, in any domain, are no pairs."""
        report = self.report(100, A=0.0)
        p = scored_set("clipart", 100)
        for method, other in (
            ("order", Predictions(p.logits.flip(0), p.target.flip(0))),
            ("size", Predictions(p.logits[:99], p.target[:99])),
            ("labels", Predictions(p.logits, (p.target + 1) % 4)),
        ):
            for domain in DOMAINS[:2]:
                report.add(method, domain, *scored_set(domain, 100))
            report.add(method, "clipart", *other)
            with pytest.raises(ValueError, match=f"same order, got 100 of 'A'.*of '{method}' in 'clipart'"):
                report.compare("A", method)

    def test_batches_do_not_show(self) -> None:
        """Different batches of the same samples are the same samples."""
        report, (logits, target) = ShiftReport(id_domain="photo"), scored_set("photo")
        report.add("A", "photo", logits, target)
        for rows in (slice(7), slice(7, None)):
            report.add("B", "photo", 2 * logits[rows], target[rows])
        whole = ShiftReport(id_domain="photo")
        whole.add("A", "photo", logits, target)
        whole.add("B", "photo", 2 * logits, target)
        assert list(map(str, report.compare("A", "B").values())) == list(map(str, whole.compare("A", "B").values()))


def shuffled(p: Predictions) -> Predictions:
    """The same rows in another order."""
    order = torch.randperm(len(p.target), generator=torch.Generator().manual_seed(3))
    return Predictions(p.logits[order], p.target[order])


class TestHeldOut:
    """T is never chosen on data that is scored."""

    LEAKS = (
        lambda p: p,
        shuffled,
        lambda p: Predictions(p.logits[::3], p.target[::3]),
        lambda p: Predictions(p.logits[-1:].repeat(2, 1), p.target[-1:].repeat(2)),
        lambda p: Predictions(p.logits.double(), p.target),
        lambda p: Predictions(*(torch.cat(pair) for pair in zip(validation_set(), p, strict=True))),
    )

    @pytest.mark.parametrize("leak", LEAKS, ids=["same", "shuffled", "part", "one", "float64", "mixed"])
    @pytest.mark.parametrize("domain", DOMAINS)
    @pytest.mark.filterwarnings("ignore:the data do not determine:UserWarning")  # the single sample
    def test_a_temperature_fitted_on_scored_data_is_refused(self, leak: Any, domain: str) -> None:
        """By content, in any order, in part or whole, in any domain, whichever call comes first (trap 32)."""
        added, fitted = ShiftReport(id_domain="photo"), ShiftReport(id_domain="photo")
        p = scored_set(domain)
        added.add("FT", domain, *p)
        with pytest.raises(ValueError, match=f"does not score.*domain '{domain}'.*validation split"):
            added.fit_temperature("FT", *leak(p))
        fitted.fit_temperature("FT", *leak(p))
        with pytest.raises(ValueError, match=f"does not score.*domain '{domain}'.*validation split"):
            fitted.add("FT", domain, *p)

    def test_batches_hide_nothing(self) -> None:
        """A leak in a later batch is found, and one that is below the threshold in every batch."""
        report, p = ShiftReport(id_domain="photo"), scored_set("photo")
        report.fit_temperature("FT", p.logits[50:], p.target[50:])
        for i in range(52):  # the first 50 are others
            report.add("FT", "photo", p.logits[i : i + 1], p.target[i : i + 1])
        with pytest.raises(ValueError, match="got 3 of 53 samples"):
            report.add("FT", "photo", p.logits[52:53], p.target[52:53])

    @pytest.mark.parametrize("rounded", [lambda z: z.clamp(-6, 6), lambda z: z.softmax(1).clamp(1e-3, 0.999).log()])
    @pytest.mark.parametrize(("n_classes", "fitted", "scored"), [(2, 9.0, 2.0), (2, 2.0, 9.0), (10, 9.0, 4.0)])
    def test_rows_that_coincide_by_themselves_are_no_leak(
        self, rounded: Callable[[torch.Tensor], torch.Tensor], n_classes: int, fitted: float, scored: float
    ) -> None:
        """Logits and probabilities that were cut off, and more of them on one side."""
        generator = torch.Generator().manual_seed(0)

        def drawn(n: int, certain: float) -> Predictions:
            target = torch.randint(0, n_classes, (n,), generator=generator)
            margins = 4 * torch.randn(n, 1, generator=generator) + certain
            own = torch.nn.functional.one_hot(target, n_classes)
            return Predictions(rounded(margins * (2 * own - 1)), target)

        report = ShiftReport(id_domain="photo")
        report.fit_temperature("FT", *drawn(500, fitted))
        report.add("FT", "sketch", *drawn(2000, scored))
        report.add("FT", "clipart", *drawn(100, scored))

    @pytest.mark.parametrize("shared", [4, 5])
    def test_a_stray_duplicate_is_no_leak(self, shared: int) -> None:
        """One sample in a hundred may be in both, as data sets with duplicates have it, and three deviations more."""
        p, v = scored_set("photo", n=100), validation_set(100)
        mixed = Predictions(*(torch.cat((a[:shared], b[shared:])) for a, b in zip(p, v, strict=True)))
        report = ShiftReport(id_domain="photo")
        report.add("FT", "photo", *p)
        if shared > 1 + 3:
            with pytest.raises(ValueError, match="got 5 of 100 samples"):
                report.fit_temperature("FT", *mixed)
        else:
            report.fit_temperature("FT", *mixed)

    @pytest.mark.parametrize("fit_first", [True, False])
    def test_the_id_domain_has_the_classes_of_the_fit(self, fit_first: bool) -> None:
        """The other domains may have fewer or more."""
        report = ShiftReport(id_domain="photo")
        calls: list[Any] = [
            lambda: report.fit_temperature("FT", *classifier(300, 7, 0)),
            lambda: report.add("FT", "photo", *classifier(100, 4, 1)),
        ]
        report.add("FT", "sketch", *classifier(100, 9, 2))
        calls[not fit_first]()
        before = repr(report.per_domain()) if not fit_first else ""
        got = "7 and then 4" if fit_first else "4 and then 7"
        with pytest.raises(ValueError, match=rf"^logits must have the same number of classes .* got {got} for 'FT' in"):
            calls[fit_first]()
        assert report.domains == ["photo", "sketch"][fit_first:]
        assert fit_first or repr(report.per_domain()) == before
        report.add("FT", "clipart", *classifier(100, 2, 3))

    @pytest.mark.parametrize("fit_first", [True, False])
    def test_a_small_scored_set_inside_a_large_fit_set_is_a_leak(self, fit_first: bool) -> None:
        """100 of 20,100 are less than 1 % of what T was fitted on, and all that is scored."""
        large, report = classifier(20100, 4, 0), ShiftReport(id_domain="photo")
        small = Predictions(large.logits[:100], large.target[:100])
        calls: list[Callable[[], object]] = [
            lambda: report.fit_temperature("FT", *large),
            lambda: report.add("FT", "photo", *small),
        ]
        first, second = calls if fit_first else calls[::-1]
        first()
        with pytest.raises(ValueError, match="got 100 of 100 samples"):
            second()

    @pytest.mark.filterwarnings("ignore:the data do not determine:UserWarning")  # the constant model
    @pytest.mark.parametrize("sizes", [(1000, 1000), (500, 5000), (5000, 500)])
    @pytest.mark.parametrize("kind", ["binary in 16 bits", "one decimal", "constant"])
    def test_coincidences_among_few_distinct_rows_are_no_leak(self, kind: str, sizes: tuple[int, int]) -> None:
        """Different samples of two classes in 16 bits often have the same logits, of a constant model always."""
        for seed in range(5):
            fitted, scored = (classifier(n, 2, 2 * seed + i) for i, n in enumerate(sizes))
            coarse: dict[str, Callable[[Any], Any]] = {
                "binary in 16 bits": lambda x: (x - x[:, :1]).bfloat16(),
                "one decimal": lambda x: (10 * x).round() / 10,
                "constant": lambda x: torch.tensor([[0.0, 1.0]]).expand(len(x), 2),
            }
            report = ShiftReport(id_domain="photo")
            report.fit_temperature("FT", coarse[kind](fitted.logits), fitted.target)
            report.add("FT", "photo", coarse[kind](scored.logits), scored.target)

    @pytest.mark.parametrize("repeated", ["fitted", "scored"])
    def test_rows_that_were_only_repeated_are_still_a_leak(self, repeated: str) -> None:
        """Twins in one of the sets alone are no sign of few distinct rows."""
        p, report = scored_set("photo"), ShiftReport(id_domain="photo")
        twice = Predictions(p.logits.repeat(2, 1), p.target.repeat(2))
        report.add("FT", "photo", *(twice if repeated == "scored" else p))
        with pytest.raises(ValueError, match="does not score"):
            report.fit_temperature("FT", *(twice if repeated == "fitted" else p))

    def test_a_refused_call_changes_nothing(self) -> None:
        """Neither the data nor the temperature of a call that raised are kept."""
        report = make_report("FT", fit=False)
        before = report.to_dict()
        with pytest.raises(ValueError, match="does not score"):
            report.fit_temperature("FT", *scored_set("photo"))
        assert report.to_dict() == before
        report.fit_temperature("FT", *validation_set())
        with pytest.raises(ValueError, match="does not score"):
            report.add("FT", "photo", *validation_set())
        assert report.to_dict() == make_report("FT").to_dict()

    @given(seed=seeds())
    def test_equal_logits_of_another_label_or_method_are_other_data(self, seed: int) -> None:
        """A sample is its logits and its label; methods do not share temperatures."""
        p = classifier(60, 3, seed)
        report = ShiftReport(id_domain="photo")
        report.add("A", "photo", *p)
        report.fit_temperature("B", *p)
        relabelled = (p.target + 1) % 3
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # wrong labels are anti-correlated
            report.fit_temperature("A", p.logits, relabelled)

    def test_coarse_logits_do_not_collide(self) -> None:
        """bfloat16 has few bits to tell rows apart, and all of them count: no two of 40,000 different rows agree."""
        p = classifier(40000, 10, 0, dtype=torch.bfloat16)
        assert len({tuple(row) for row in p.logits.tolist()}) == 40000
        assert len(fingerprints_of(*p).unique()) == 40000

    def test_of_many_classes_enough_tell_rows_apart(self) -> None:
        """1,000 classes of which 800 are masked, in bfloat16: another split is no leak, the same rows are one."""
        p = classifier(2000, 1000, 0, dtype=torch.bfloat16)
        p.logits[:, torch.randperm(1000, generator=torch.Generator().manual_seed(0))[:800]] = -math.inf
        target = p.logits.argmax(1)
        assert len(fingerprints_of(p.logits, target).unique()) == 2000
        assert torch.equal(fingerprints_of(p.logits.double(), target), fingerprints_of(p.logits, target))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_one_bit_of_one_logit_makes_another_sample(self, dtype: torch.dtype) -> None:
        """The smallest change is seen in any column; but -0.0 is 0.0."""
        logits, target = classifier(40, 4, 0, sharpness=0.5, dtype=dtype)
        logits[:, 3] = 0
        for column in range(3):
            report, other = ShiftReport(id_domain="photo"), logits.clone()
            held = other[:, column].to(dtype if dtype != torch.float64 else torch.float32)  # what is compared
            other[:, column] = torch.nextafter(held, torch.full_like(held, 99)).to(dtype)
            report.add("FT", "photo", logits, target)
            report.fit_temperature("FT", other, target)
        negative = logits.clone()
        negative[:, 3] = -0.0
        report = ShiftReport(id_domain="photo")
        report.add("FT", "photo", logits, target)
        with pytest.raises(ValueError, match="got 40 of 40 samples"):
            report.fit_temperature("FT", negative, target)


class TestTables:
    """What is printed and written."""

    def test_print_is_the_markdown_table_in_per_cent(self) -> None:
        """A header, a rule and a row a method of one width; NaN is an en dash."""
        report = make_report("FT", fit=False)
        table, caption = str(report).split("\n\n")
        header, rule, row = table.splitlines()
        assert len(header) == len(rule) == len(row)
        assert header.split(" | ")[1].strip() == "ID accuracy"
        assert f"{100 * accuracy(scored_set('photo')):.1f} (" in row
        assert row.count(" \N{EN DASH} |") == 3  # T and two ECEs
        assert caption.startswith("Accuracy and ECE (15 bins) in per cent; ID: photo; OOD: plain mean over sketch,")
        assert caption.count(". ") + 1 <= 3  # sentences that a reader of a table reads
        for printed in ("95 % interval", "noise floor", "debiased value", "p-value"):
            assert printed in caption

    @pytest.mark.parametrize("fit", [True, False])
    def test_every_column_has_a_rule_that_markdown_knows(self, fit: bool) -> None:
        """At least three characters, also of the narrow column of temperatures that are missing."""
        rule = make_report("FT", fit=fit).to_markdown(intervals=False).splitlines()[1]
        assert all(re.fullmatch(r" -{2,}[-:] ", cell) for cell in rule.strip("|").split("|"))

    def test_an_incomplete_report_prints_what_is_missing(self) -> None:
        """print() never raises, in a notebook least of all."""
        report = ShiftReport(id_domain="photo")
        assert str(report).endswith(
            "0 methods, 0 domains. No table yet: the report must hold data, got none; call "
            "add(method, domain, logits, target) first"
        )
        report.add("FT", "sketch", *scored_set("sketch"))
        assert "No table yet: id_domain must be one of the domains added" in str(report)

    def test_columns_choose(self) -> None:
        """In the order given, each with its unit; the caption explains those that are there, and no others."""
        report = make_report("FT")
        columns = ["ood_nll", "ood_nll_own_t", "id_brier", "id_aurc"]
        table, caption = report.to_markdown(columns=columns).split("\n\n")
        header, _, row = ([cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines())
        assert header == ["Method", "OOD NLL", "OOD NLL at own T", "ID Brier score", "ID AURC"]
        figures = report.summary()[0]
        for cell, name in zip(row[1:], columns, strict=True):
            factor, digits = (100, 2) if name == "id_aurc" else (1, 3)
            low, value, high = (f"{factor * figures[name + end]:.{digits}f}" for end in ("_low", "", "_high"))
            assert cell == f"{value} ({low}\N{EN DASH}{high})"
        assert "a diagnosis that no method may claim as its result. Brier score" in caption
        assert caption.startswith("ID: photo; OOD: plain mean over sketch, clipart. NLL: negative")
        assert caption.endswith(
            "AURC: area under the risk-coverage curve, in per cent. In brackets: the 95 % interval."
        )
        more = report.to_markdown(columns=["ood_ece_ts", "id_aurc"])
        assert "\n\nECE (15 bins) in per cent; ID: photo; OOD: plain mean over sketch, clipart; + TS: logits" in more
        assert "noise floor, the ECE that a perfectly calibrated model shows on as many samples. " in more
        assert more.endswith("in per cent. Other figures have their 95 % interval in brackets.")
        assert report.to_markdown(columns=["id_accuracy"]).endswith("clipart. In brackets: the 95 % interval.")
        assert report.to_markdown(columns=["temperature"]).endswith("which was fitted on held-out data.")
        assert "diagnosis" not in report.to_markdown(columns=["id_nll"])
        assert "interval" not in report.to_markdown(columns=["id_nll"], intervals=False)
        assert report.to_latex(columns=columns).count("&") == 2 * len(columns)

    def test_intervals_can_be_left_out(self) -> None:
        """Then neither cells nor caption speak of them."""
        for text in (make_report().to_markdown(intervals=False), make_report().to_latex(intervals=False)):
            assert "(" not in text.replace("(15 bins)", "")
            assert "interval" not in text
            assert "floor" not in text
            assert "p-value" not in text

    def test_names_are_escaped(self) -> None:
        """A method's name is text, not markup, in Markdown and in LaTeX."""
        report = make_report("a|b & 50% of_{x} #1 $~^\\")
        assert r"| a\|b & 50%" in report.to_markdown()
        assert r"| c\\\|d |" in make_report("c\\|d").to_markdown(columns=["id_nll"])
        assert (
            r"a\textbar{}b \& 50\% of\_\{x\} \#1 \$\textasciitilde{}\textasciicircum{}\textbackslash{} &"
            in report.to_latex()
        )
        for name, cell in (("[ours] CaRot", "{[}ours] CaRot &"), ("*CaRot", "{*}CaRot &")):  # options of the line break
            assert cell in make_report(name).to_latex()

    def test_latex_has_a_row_for_each_method(self) -> None:
        """Eight columns in every row, booktabs' rules around them."""
        lines = make_report().to_latex().splitlines()
        assert lines[1] == r"\begin{tabular}{lrrrrrrr}"
        rows = [line for line in lines if line.endswith(r"\\")]
        assert [row.count(" & ") for row in rows] == [7, 7, 7]
        assert rows[1].startswith("FT & ")

    @pytest.mark.parametrize("per_domain", [False, True])
    def test_csv_round_trips_in_full_precision(self, tmp_path: Path, per_domain: bool) -> None:
        """Fractions to the last digit, NaN as an empty field."""
        report, path = make_report("FT, the first", fit=False), tmp_path / "results.csv"
        report.to_csv(path, per_domain=per_domain)
        rows = report.per_domain() if per_domain else report.summary()
        with path.open(encoding="utf-8", newline="") as file:
            read = list(csv.DictReader(file))
        for row, fields in zip(rows, read, strict=True):
            assert list(fields) == list(row)
            assert fields == {n: "" if isinstance(v, float) and v != v else str(v) for n, v in row.items()}

    def test_csv_replaces_a_file_at_once_or_not_at_all(self, tmp_path: Path) -> None:
        """On a full disk, as /dev/full is, the old file stands and nothing else is left in the folder."""
        path = tmp_path / "results.csv"
        path.write_text("old")
        (tmp_path / f".results.csv.{os.getpid()}.tmp").symlink_to("/dev/full")
        with pytest.raises(OSError, match="No space left on device"):
            make_report().to_csv(path)
        assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("results.csv", "old")]
        make_report().to_csv(str(path))
        assert path.read_text().startswith("method,temperature,id_accuracy,id_accuracy_low,")
        assert len(list(tmp_path.iterdir())) == 1

    def test_csv_goes_through_a_link_and_keeps_permissions(self, tmp_path: Path) -> None:
        """The link stays one, and what it leads to is written."""
        real, link = tmp_path / "real.csv", tmp_path / "latest.csv"
        link.symlink_to(real)
        make_report().to_csv(link)
        real.chmod(0o600)
        real.write_text("old")
        make_report().to_csv(link)
        assert link.is_symlink()
        assert real.read_text().startswith("method,")
        assert real.stat().st_mode & 0o777 == 0o600

    @pytest.mark.parametrize("place", ["", "missing/results.csv", "pipe"])
    def test_csv_names_the_path_that_cannot_be_written(self, tmp_path: Path, place: str) -> None:
        """Not that of the temporary file; what is no regular file is not replaced."""
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(FileNotFoundError, match=rf"^path must be a file in a folder .* got {tmp_path / place}$"):
            make_report().to_csv(tmp_path / place)
        assert [file.name for file in tmp_path.iterdir()] == ["pipe"]

    def test_to_dict_is_json(self) -> None:
        """Strictly: no NaN, no NumPy integer; figures by method, and by method and domain."""
        report = ShiftReport(id_domain="photo", n_bins=cast(int, np.int64(15)))
        report.add("FT", "photo", *scored_set("photo"))
        assert json.loads(json.dumps(report.to_dict()))["n_bins"] == 15
        report = make_report("FT", fit=False)
        everything = json.loads(json.dumps(report.to_dict(), allow_nan=False))
        assert everything["id_domain"] == "photo"
        assert everything["summary"]["FT"]["id_ece"] == report.summary()[0]["id_ece"]
        assert everything["summary"]["FT"]["temperature"] is None
        assert everything["per_domain"]["FT"]["sketch"]["n"] == 300

    def test_to_pandas_has_the_rows(self) -> None:
        """Both forms."""
        report = make_report()
        assert report.to_pandas()["method"].tolist() == ["FT", "CaRot"]
        assert report.to_pandas(per_domain=True).shape == (6, 34)

    def test_without_pandas_the_error_names_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """And says how to get it."""
        monkeypatch.setitem(sys.modules, "pandas", None)
        with pytest.raises(ImportError, match="pip install pandas"):
            make_report().to_pandas()

    def test_bins_add_up_and_scale(self) -> None:
        """Those of a domain are bin_confidences', at T = 1 or at the method's T."""
        report, p = make_report("FT"), scored_set("sketch")
        for scaled, t in ((False, torch.tensor(1.0)), (True, fit_temperature(*validation_set()))):
            confidences, correct = top_label(p.logits / t, p.target)
            for found, expected in zip(
                report.bins("FT", "sketch", scaled=scaled), bin_confidences(confidences, correct), strict=True
            ):
                assert_close(found, expected, rtol=1e-6, atol=1e-6)

    def test_repr_is_short_and_never_fails(self) -> None:
        """Also for a report with no data."""
        assert repr(ShiftReport(id_domain="photo")) == "ShiftReport(id_domain='photo', n_bins=15): 0 methods, 0 domains"
        assert repr(make_report()).endswith("2 methods, 3 domains")

    def test_n_bins_is_that_of_the_ece(self) -> None:
        """Another number gives another ECE: calibration_error's."""
        report, p = ShiftReport(id_domain="photo", n_bins=3), scored_set("photo")
        report.add("FT", "photo", *p)
        assert report.summary()[0]["id_ece"] == pytest.approx(float(calibration_error(*p, n_bins=3)), abs=1e-12)
        assert "ECE (3 bins)" in str(report)


class TestErrors:
    """What the table of wrong calls does not have."""

    def test_probabilities_are_refused_everywhere(self) -> None:
        """In any precision, by name: their softmax would be nonsense, and the value with it."""
        p = classifier(4096, 10, 0, spread=4.0)
        for dtype in (torch.float32, torch.bfloat16):
            probs = p.logits.to(dtype).softmax(1).float()
            report = ShiftReport(id_domain="photo")
            for call in (partial(report.add, "FT", "photo"), partial(report.fit_temperature, "FT")):
                with pytest.raises(ValueError, match=r"^logits must be logits, got rows in \[0, 1\] that sum to 1"):
                    call(probs, p.target)
            assert report.methods == []

    def test_further_dimensions_hold_more_samples(self) -> None:
        """[N, C, d] with [N, d], as F.cross_entropy takes them."""
        p, report = scored_set("photo"), ShiftReport(id_domain="photo")
        report.add("FT", "photo", p.logits.unflatten(0, (100, 3)).movedim(2, 1), p.target.view(100, 3))
        assert report.summary()[0]["id_ece"] == pytest.approx(ece(p), abs=1e-6)

    def test_a_method_that_lacks_a_domain_is_not_averaged(self) -> None:
        """A mean over other data sets than the other rows' would be silently wrong; per_domain still works."""
        report = make_report("FT", "CaRot")
        report.add("ZS", "photo", *scored_set("photo", seed=9))
        with pytest.raises(ValueError, match=r"'ZS' lacks 'sketch', 'clipart'; add them, or see per_domain\(\)"):
            report.summary()
        assert len(report.per_domain()) == 7

    def test_a_fitted_method_without_data_is_a_typing_error(self) -> None:
        """It would be missing in the table."""
        report = make_report("FT w/ LS", fit=False)
        report.fit_temperature("FT w LS", *validation_set())
        with pytest.raises(ValueError, match="'FT w LS' lacks 'photo'"):
            report.summary()
