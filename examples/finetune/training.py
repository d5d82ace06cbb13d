"""The rows of the table: what is trained, by which loss, and a loop that goes on bit for bit where it was cut off."""

from __future__ import annotations

import argparse
import hashlib
import math
import pickle
from functools import partial
from typing import Any, NamedTuple

import open_clip
import torch
import torch.nn.functional as F
from atomic import write_atomically
from PIL import Image
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import calrobust
from calrobust.functional import orthogonality_loss
from finetune import RunError
from finetune.models import Classifier, Clip
from finetune.pictures import Batch, Data, Pictures, batches, order

MAX_LOG_SCALE = math.log(100.0)  # CLIP's own bound; an unbounded logit scale is a hidden temperature
# What torch.load and load_state_dict raise, and what follows from content of another kind.
DAMAGE = (OSError, RuntimeError, EOFError, AttributeError, KeyError, TypeError, ValueError, pickle.UnpicklingError)
SILENT = {"method", "out", "checkpoint_every", "workers", "device", "test", "val", "ood", "map"}  # change no weights
Log = list[dict[str, float]]


class Row(NamedTuple):
    """One row of the paper's table. Common to all: AdamW, weight decay 0.1, a warm-up and then a cosine."""

    name: str
    learning_rate: float = 0.0
    label_smoothing: float = 0.0
    contrast: bool = False  # both towers, by a softmax loss on pairs; else image tower and head
    distillation_weight: float = 0.0
    orthogonality: float = 0.0
    interpolates: bool = False  # WiSE-FT


SMOOTHING = 0.05  # our choice, not the paper's: tune it on the validation part
METHODS = {
    "zs": Row("ZS"),
    "ft": Row("FT", 3e-5),
    "ft-ls": Row("FT w/ LS", 3e-5, SMOOTHING),
    "wise-ft": Row("WiSE-FT", 3e-5, interpolates=True),
    "wise-ft-ls": Row("WiSE-FT w/ LS", 3e-5, SMOOTHING, interpolates=True),
    "flyp": Row("FLYP", 1e-5, contrast=True),
    "flyp-ls": Row("FLYP w/ LS", 1e-5, SMOOTHING, contrast=True),
    "carot": Row("CaRot", 1e-5, SMOOTHING, contrast=True, distillation_weight=1.5),
    "carot-neurips": Row("CaRot (NeurIPS)", 1e-5, SMOOTHING, contrast=True, distillation_weight=1.5, orthogonality=0.2),
}


class Recipe(NamedTuple):
    """What is chosen beside a row; ``docs/paper_and_code.md`` compares ours with that of the authors' scripts."""

    precision: str = "bf16"
    smoothing: float | None = None  # of rows with a teacher; None is the row's
    positives: bool = True  # pairs of one class are positives of each other
    squared: bool = True  # the norm of the orthogonality term
    cross_norm: float = 0.0  # weight of the norm of the product of both projections, beside orthogonality
    decays_all: bool = False  # logit scale, biases and norms as well
    max_log_scale: float = MAX_LOG_SCALE
    warm_up: int = 0  # steps; 0 is the first 2 %
    teacher_every: int = 0  # steps, from the first on; 0 is steps // 50, from the end of the first interval on
    clip_norm: float = 0.0  # of the gradients of rows that train a head
    head_bias: bool = False
    alpha: float | None = None  # WiSE-FT's; None is that of highest accuracy
    batch_bins: int = 0  # a further ECE: the mean over batches, with this number of bins


RECIPES = {
    "ours": Recipe(),
    "released": Recipe(
        precision="fp16",
        smoothing=0.0,
        positives=False,
        squared=False,
        cross_norm=0.05,
        decays_all=True,
        max_log_scale=math.inf,
        warm_up=500,
        teacher_every=500,
        clip_norm=1.0,
        head_bias=True,
        alpha=0.5,
        batch_bins=10,
    ),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Training:
    """A network in training: the CLIP where the row contrasts, and else a classifier."""

    def __init__(
        self, options: argparse.Namespace, method: str, clip: Clip, data: Data, rank: int, world_size: int
    ) -> None:
        self.options, self.clip, self.data, self.rank, self.world_size = options, clip, data, rank, world_size
        chosen = {name: getattr(options, name) for name in ("learning_rate", "label_smoothing", "distillation_weight")}
        self.recipe, row = RECIPES[options.recipe], METHODS[method]
        if self.recipe.smoothing is not None and row.distillation_weight:
            row = row._replace(label_smoothing=self.recipe.smoothing)
        self.row = row._replace(**{name: value for name, value in chosen.items() if value is not None})
        self.templates = list(getattr(open_clip, f"{options.template}_IMAGENET_TEMPLATES", [options.template]))
        self.steps = options.epochs * (len(data.train) // options.batch_size) if METHODS[method].learning_rate else 0
        self.folder = options.out / method
        self.settings = {name: str(value) for name, value in vars(options).items() if name not in SILENT}
        pictures = hashlib.sha256(repr((data.names, data.train)).encode()).hexdigest()
        self.settings |= {"pictures": pictures, "processes": str(world_size), "version": "1"}

        self.device = next(clip.network.parameters()).device
        blank = clip.preprocess(Image.new("RGB", (64, 64)))[None].to(self.device)
        self.network: nn.Module = clip.network
        self.teacher: calrobust.EMATeacher | None = None
        if self.row.contrast:
            fill = [partial(str.replace, t, "{}") if isinstance(t, str) else t for t in self.templates]
            texts = [template(name) for name in data.names for template in fill]
            self.tokens = {key: value.to(self.device) for key, value in clip.tokens(texts).items()}
            features = clip.features(clip.network, blank, {key: value[:1] for key, value in self.tokens.items()})
            _freeze_unused(clip.network, *features)
            self._set_loss()
        else:
            self.network = Classifier(clip, data.names, self.templates, bias=self.recipe.head_bias)
            _freeze_unused(self.network, self.network(blank))
        self.zero_shot = {name: value.clone() for name, value in self.network.state_dict().items()}
        trained = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        few = 0 if self.recipe.decays_all else 2
        decays = {"params": [p for p in trained if p.ndim >= few], "weight_decay": 0.1}
        stays = {"params": [p for p in trained if p.ndim < few], "weight_decay": 0.0}  # logit scale, biases, norms
        self.optimizer = torch.optim.AdamW([decays, stays], lr=self.row.learning_rate, fused=True)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=options.precision == "fp16")

    def _set_loss(self) -> None:
        """Sets the loss of both towers and the teacher, whose decay grows in the first fifth, as in the paper."""
        row, gather = self.row, self.world_size > 1
        smoothing = row.label_smoothing
        self.criterion: Any = calrobust.MultimodalContrastiveLoss(label_smoothing=smoothing, gather=gather)
        if row.distillation_weight:
            self.criterion += row.distillation_weight * calrobust.MultimodalDistillationLoss(gather=gather)
            if self.recipe.teacher_every:  # counted in steps; the first one acts
                warm_up = calrobust.schedules.linear_warmup(0.05, 0.9, updates=max(1, round(self.steps / 5)))
                decay: Any = calrobust.schedules.every(self.recipe.teacher_every, warm_up)
                self.teacher = calrobust.EMATeacher(self.network, decay)
            else:
                every = max(1, self.steps // 50)
                decay = calrobust.schedules.linear_warmup(0.05, 0.9, updates=max(1, self.steps // every // 5))
                self.teacher = calrobust.EMATeacher(self.network, decay, update_every=every)
        if row.orthogonality:
            self.clip.projection()  # says now if there is none

    def classifier(self) -> Classifier:
        """The network so far, in the form in which it is judged."""
        if isinstance(self.network, Classifier):
            return self.network
        return Classifier(self.clip, self.data.names, self.templates)

    def terms(self, network: nn.Module, images: Tensor, target: Tensor, template: Tensor) -> dict[str, Tensor]:
        """The loss, term by term; ``network`` is ours, wrapped or not."""
        row = self.row
        if not row.contrast:
            return {"cross_entropy": F.cross_entropy(network(images), target, label_smoothing=row.label_smoothing)}
        tokens = {key: value[target * len(self.templates) + template] for key, value in self.tokens.items()}
        features: tuple[Tensor, ...] = self.clip.features(network, images, tokens)
        if self.teacher is not None:
            with torch.no_grad():
                features += self.clip.features(self.teacher, images, tokens)
        labels = target if self.recipe.positives else None  # else a class is a negative of itself
        terms: dict[str, Tensor] = self.criterion.terms(*features, labels=labels)
        if row.orthogonality:
            with torch.autocast(images.device.type, enabled=False):
                visual = self.clip.projection()
                terms["orthogonality"] = row.orthogonality * orthogonality_loss(visual, squared=self.recipe.squared)
                if self.recipe.cross_norm:
                    product = visual @ self.clip.projection("text").T
                    terms["cross_norm"] = self.recipe.cross_norm * torch.linalg.norm(product)
        return terms

    def run(self, unreadable: set[str]) -> None:
        """Trains from the checkpoint, or from the start, to the end."""
        options, rank, world_size = self.options, self.rank, self.world_size
        step, log = self.load()
        if step == self.steps:
            return
        network = DistributedDataParallel(self.network) if world_size > 1 else self.network
        pictures = Pictures(self.data.train, self.clip.augment, templates=len(self.templates), seed=options.seed)
        keys = order(len(pictures.samples), start=step, steps=self.steps, batch_size=options.batch_size,
                     rank=rank, world_size=world_size, seed=options.seed)  # fmt: skip
        with tqdm(desc=self.row.name, initial=step, total=self.steps, unit="step", disable=rank > 0) as bar:
            for batch in batches(pictures, keys, options.workers, unreadable):
                step += 1
                log.append(self.step(network, batch, step))
                if rank == 0 and (step % options.checkpoint_every == 0 or step == self.steps):
                    self.save(step, log)
                bar.set_postfix(epoch=step * options.epochs // self.steps, loss=log[-1]["loss"], refresh=False)
                bar.update()

    def step(self, network: nn.Module, batch: Batch, step: int) -> dict[str, float]:
        """One step of the optimiser and what it logs; a function of the step's number, the weights and the batch."""
        torch.manual_seed(hash((self.options.seed, step, self.rank)) % 2**63)  # dropout's, if there is any
        warm_up = self.recipe.warm_up or max(1, self.steps // 50)
        cosine = 0.5 * (1 + math.cos(math.pi * (step - 1 - warm_up) / max(1, self.steps - warm_up)))
        rate = self.row.learning_rate * (step / warm_up if step <= warm_up else cosine)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        network.train()
        for module in network.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()  # keeps its pre-trained statistics, since averaged weights must fit them
        images, target, template = (tensor.to(self.device, non_blocking=True) for tensor in batch[:3])
        precision = self.options.precision
        with torch.autocast(self.device.type, DTYPES[precision], enabled=precision != "fp32"):
            terms = self.terms(network, images, target, template)
        loss = torch.stack(list(terms.values())).sum()
        self.scaler.scale(loss).backward()
        if self.recipe.clip_norm and not self.row.contrast:  # the scripts clip gradients that are still scaled
            nn.utils.clip_grad_norm_(network.parameters(), self.recipe.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        scale: Tensor = self.clip.network.logit_scale
        if self.recipe.max_log_scale < math.inf:
            with torch.no_grad():
                scale.clamp_(0.0, self.recipe.max_log_scale)
        if self.teacher is not None:
            self.teacher.update(self.network)
        values = {name: value.item() for name, value in {**terms, "loss": loss, "logit_scale": scale.exp()}.items()}
        return {"step": step, "learning_rate": rate, **values}

    def save(self, step: int, log: Log) -> None:
        """All that the next step depends on; what is random follows from the step."""
        lines = [",".join(map(str, line)) for line in (log[0], *(values.values() for values in log))]
        write_atomically(self.folder / "log.csv", ("\n".join(lines) + "\n").encode())  # first, for the last step's sake
        teacher = None if self.teacher is None else self.teacher.state_dict()
        states = {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict(), "teacher": teacher}
        states["scaler"] = self.scaler.state_dict()
        content = {"recipe": self.settings, "step": step, "log": log, **states}
        write_atomically(self.folder / "checkpoint.pt", partial(torch.save, content))

    def load(self) -> tuple[int, Log]:
        """Goes back to where the checkpoint left off, if there is one; gives the steps done and their log."""
        path = self.folder / "checkpoint.pt"
        for stray in self.folder.glob(".*.tmp") if self.rank == 0 else ():  # of a run that was killed while it wrote
            stray.unlink()
        if not path.exists():
            return 0, []
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
            was: dict[str, str] = content["recipe"]
            changed = [name for name, value in self.settings.items() if was.get(name) != value]
            if not changed:
                self.network.load_state_dict(content["network"])
                self.optimizer.load_state_dict(content["optimizer"])
                self.scaler.load_state_dict(content["scaler"])
                if self.teacher is not None:
                    self.teacher.load_state_dict(content["teacher"])
                return content["step"], content["log"]
        except DAMAGE as error:
            raise RunError(f"{path} is damaged, or of another model or program: {error}; name another --out") from None
        before, now = was.get(changed[0]), self.settings[changed[0]]
        raise RunError(f"{path} was made with {changed[0]}={before}, not {now}; repeat that, or name another --out")


def _freeze_unused(network: nn.Module, *outputs: Tensor) -> None:
    """Freezes what no output depends on: a text tower, a decoder, the bias of a sigmoid loss."""
    torch.stack([output.sum() for output in outputs]).sum().backward()
    for parameter in network.parameters():
        parameter.requires_grad_(parameter.grad is not None)
        parameter.grad = None
