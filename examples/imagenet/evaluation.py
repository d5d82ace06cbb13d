"""Logits, the temperature, WiSE-FT's α, and the report; nothing is fitted but on the held-out part of ``--train``."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

import torch
from torch import Tensor, nn

import calrobust
from imagenet.checkpoint import write_atomically
from imagenet.data import ID_DOMAIN, Data, Domain
from imagenet.errors import RunError
from imagenet.logs import Logs
from imagenet.methods import Classification, Method
from imagenet.model import Classifier, Model
from imagenet.options import Options
from imagenet.pictures import BadImages, TestPictures, loader
from imagenet.processes import Processes

ALPHAS = [step / 20 for step in range(21)]


class Evaluation:
    """Judges classifiers on all test sets; every process scores its share of the pictures."""

    def __init__(self, options: Options, model: Model, data: Data, processes: Processes, bad_images: BadImages) -> None:
        self.options, self.model, self.data, self.processes = options, model, data, processes
        self.bad_images = bad_images

    def report(self, classifier: Classifier) -> calrobust.ShiftReport:
        """Accuracy and calibration of a classifier, before and after its temperature."""
        row = self.options.preset.row
        report = calrobust.ShiftReport(id_domain=ID_DOMAIN)
        report.fit_temperature(row, *self._logits("held-out part", classifier, self.data.held_out))
        for name, domain in self.data.domains.items():
            report.add(row, name, *self._logits(name, classifier, domain))
        return report

    def final(self, method: Method, logs: Logs) -> calrobust.ShiftReport:
        """The report on what is written down at the end."""
        self.classifier = method.classifier()
        if self.options.preset.interpolates and isinstance(method, Classification):
            alpha = self._best_alpha(method)
            self.classifier = method.interpolated(alpha)
            logs.add(method.steps, {"alpha": alpha})
        report = self.report(self.classifier)
        self.log(report, logs, method.steps)
        return report

    def log(self, report: calrobust.ShiftReport, logs: Logs, step: int) -> None:
        """T, and accuracy and ECE of every test set."""
        for row in report.per_domain():
            logs.add(step, {f"{figure}/{row['domain']}": row[figure] for figure in ("accuracy", "ece", "ece_ts")})
        logs.add(step, {"temperature": report.summary()[0]["temperature"]})

    def write(self, report: calrobust.ShiftReport, method: Method) -> None:
        """The tables, the classifier, and for both towers the whole model."""
        out = self.options.out
        write_atomically(out / "report.md", f"{report.to_markdown()}\n".encode())
        report.to_csv(out / "report.csv", per_domain=True)
        write_atomically(out / "classifier.pt", self.classifier.state_dict())
        if not isinstance(method, Classification):
            write_atomically(out / "model.pt", method.network.state_dict())  # as open_clip's --pretrained takes it

    def _best_alpha(self, method: Classification) -> float:
        """Of highest accuracy on the held-out part; of equal ones, the nearest to the zero-shot model."""

        def accuracy(alpha: float) -> float:
            logits, target = self._logits(f"alpha = {alpha}", method.interpolated(alpha), self.data.held_out)
            return (logits.argmax(1) == target).float().mean().item()

        return max(ALPHAS, key=accuracy)

    def _logits(self, name: str, classifier: Classifier, domain: Domain) -> tuple[Tensor, Tensor]:
        """Those of the whole domain, on every process."""
        rank, world_size = self.processes.rank, self.processes.world_size
        pictures = TestPictures(domain.samples[rank::world_size], self.model.preprocess)
        batch_size = max(1, self.options.batch_size // self.options.accumulate // world_size)
        batches = loader(pictures, self.options.workers, batch_size=batch_size)

        def readable() -> Iterator[tuple[Tensor, Tensor]]:
            for batch in batches:
                self.bad_images.report(batch.bad)
                if len(batch.target):
                    yield batch.images, batch.target

        def forward(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            images, target = batch
            with torch.autocast(images.device.type, torch.bfloat16, enabled=self.options.precision == "bf16"):
                return domain.logits(model(images)), target

        checked = readable()
        if (first := next(checked, None)) is None:
            raise RunError(f"{name}: not one picture can be read, {domain.samples[0][0]} for one")
        device, bar = self.processes.device, self.processes.is_first
        own = calrobust.collect_logits(
            classifier, chain([first], checked), forward=forward, device=device, progress=bar
        )
        shares = self.processes.gathered(own)
        return torch.cat([logits for logits, _ in shares]), torch.cat([target for _, target in shares])
