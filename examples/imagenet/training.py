"""The loop: accumulation, autocast, schedule, logs, checkpoints."""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from imagenet.checkpoint import save_checkpoint
from imagenet.data import Data
from imagenet.evaluation import Evaluation
from imagenet.logs import Logs
from imagenet.methods import Method
from imagenet.model import Model
from imagenet.options import Options
from imagenet.pictures import BadImages, Batch, Order, TrainingPictures, loader
from imagenet.processes import Processes


class Training:
    """Trains a method's network, from any step on."""

    def __init__(
        self,
        options: Options,
        model: Model,
        method: Method,
        data: Data,
        processes: Processes,
        bad_images: BadImages,
        logs: Logs,
        evaluation: Evaluation,
    ) -> None:
        self.options, self.method, self.data, self.processes = options, method, data, processes
        self.bad_images, self.logs, self.evaluation = bad_images, logs, evaluation
        self.pictures = TrainingPictures(data.train, model.augment, data.classes, model.tokenizer, options.seed)

    def run(self, *, start: int) -> None:
        """Trains from step ``start`` to the end."""
        options, method, processes = self.options, self.method, self.processes
        if start >= method.steps:
            return
        network = method.network
        if processes.world_size > 1:
            ids = [processes.device] if processes.device.type == "cuda" else None
            network = DistributedDataParallel(network, device_ids=ids)
        order = Order(
            len(self.data.train), start=start, steps=method.steps, batch_size=options.batch_size,
            parts=options.accumulate, rank=processes.rank, world_size=processes.world_size, seed=options.seed,
        )  # fmt: skip
        batches = iter(loader(self.pictures, options.workers, batch_sampler=order))
        a_epoch = method.steps // options.epochs
        for step in tqdm(range(start + 1, method.steps + 1), initial=start, total=method.steps, unit="step",
                         disable=not processes.is_first):  # fmt: skip
            torch.manual_seed(hash((options.seed, step, processes.rank)) % 2**63)  # dropout's, if there is any
            rate = self._set_learning_rate(step - 1)
            _train_mode(network)
            terms: dict[str, Tensor] = {}
            for part in range(options.accumulate):
                last = part == options.accumulate - 1
                for name, value in self._backward(network, next(batches), last).items():
                    terms[name] = terms.get(name, torch.zeros_like(value)) + value
            method.optimizer.step()
            method.optimizer.zero_grad()
            extra = method.after_step()
            if step % options.log_every == 0 or step == method.steps:
                values = {f"loss/{name}": value.item() for name, value in terms.items()}
                total = {"loss/total": sum(values.values()), "learning_rate": rate}
                self.logs.add(step, values | total | extra)
            if options.evaluate_every and step % (options.evaluate_every * a_epoch) == 0 and step < method.steps:
                self.evaluation.log(self.evaluation.report(method.classifier()), self.logs, step)
            if processes.is_first and (step % options.checkpoint_every == 0 or step == method.steps):
                save_checkpoint(options, method, step, logged=self.logs.flush())

    def _backward(self, network: nn.Module, batch: Batch, last: bool) -> dict[str, Tensor]:
        """Adds the gradient of one part of the batch; ranks average their gradients after the last one."""
        options, device = self.options, self.processes.device
        self.bad_images.report(batch.bad)
        moved = batch._replace(
            images=batch.images.to(device, non_blocking=True),
            target=batch.target.to(device, non_blocking=True),
            captions=batch.captions.to(device, non_blocking=True),
        )
        waits = network.no_sync() if isinstance(network, DistributedDataParallel) and not last else nullcontext()
        with waits:
            with torch.autocast(device.type, torch.bfloat16, enabled=options.precision == "bf16"):
                terms = self.method.terms(network, moved)
            scaled = {name: value / options.accumulate for name, value in terms.items()}
            torch.stack(list(scaled.values())).sum().backward()
        return {name: value.detach() for name, value in scaled.items()}

    def _set_learning_rate(self, step: int) -> float:
        """A linear warm-up, then a cosine down to zero; a function of the step, so that no state is to be saved."""
        warm_up, steps = self.options.warm_up, self.method.steps
        if step < warm_up:
            factor = (step + 1) / warm_up
        else:
            factor = 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))
        rate = self.options.learning_rate * factor
        for group in self.method.optimizer.param_groups:
            group["lr"] = rate
        return rate


def _train_mode(network: nn.Module) -> None:
    """Train mode, except that BatchNorm keeps its pre-trained statistics: averaged weights must fit them."""
    network.train()
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
