"""open_clip's own trainer, not a line of it changed, with calrobust's loss and teacher.

``python examples/open_clip_trainer.py`` trains a tiny CLIP with random weights for two epochs on pictures it makes
(``pip install '.[open-clip]'`` in a clone; CPU, seconds). Options of ``open_clip_train`` may follow and replace the
ones below: ``python examples/open_clip_trainer.py --epochs 4``, then ``--epochs 6 --resume latest``. On several GPUs:
``torchrun --nproc-per-node 2 examples/open_clip_trainer.py --device cuda``.

open_clip offers no place for a teacher that learns, but its ``main`` looks up ``train_one_epoch`` at each epoch, so
we replace that name by a function that calls it. The development version 4 also makes a task of model and loss in
``create_task``, which we replace likewise.
"""

import csv
import json
import os
import sys
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip_train import main as trainer
from open_clip_train.distributed import is_master
from PIL import Image

import calrobust as cr
from calrobust.integrations.open_clip import OpenClipLoss

FOLDER = Path("open_clip_run")
COLORS = {"red": (200, 30, 30), "green": (30, 160, 60), "blue": (40, 60, 200), "grey": (128, 128, 128)}
MODEL = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "layers": 1, "width": 32, "head_width": 16},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


class CaRotEpochs:
    """open_clip's epochs with our loss and, in the place of its distillation model, a teacher that follows."""

    def __init__(self, criterion: cr.losses.PairLoss) -> None:
        """Remembers open_clip's own functions, which do the work."""
        self.criterion, self.train_one_epoch = criterion, trainer.train_one_epoch
        self.create_task: Any = getattr(trainer, "create_task", None)  # of version 4
        self.teacher: cr.EMATeacher | None = None
        self.follows = False

    def make_teacher(self, model: Any, args: Any) -> cr.EMATeacher:
        """Makes teacher and loss; open_clip runs the teacher as its "dist_model" and gives the loss its outputs."""
        if getattr(args, "horovod", False):
            raise ValueError("--horovod has no process group to gather pairs over; start with torchrun instead")
        if args.distill:
            raise ValueError("--distill-model names a fixed teacher, and this one learns; leave the option out")
        if args.accum_freq > 1:
            raise ValueError("--accum-freq must be 1: open_clip asks no teacher when it accumulates gradients")
        args.distill = True
        self.loss = OpenClipLoss(self.criterion, caption_weight=args.coca_caption_loss_weight)
        self.teacher = cr.EMATeacher(model, decay=0.9)
        return self.teacher

    def follow(self, model: Any, optimizer: Any, epoch: int, args: Any) -> None:
        """Before the first epoch: loads the teacher if one was kept, and updates it after each optimiser step."""
        teacher = self.teacher or self.make_teacher(model, args)
        if epoch > 0:
            path = Path(args.checkpoint_path) / f"teacher_{epoch}.pth"
            teacher.load_state_dict(torch.load(path, map_location=args.device, weights_only=True))

        def update(optimizer: Any, *_: Any) -> None:
            if not getattr(optimizer, "found_inf", False):  # a GradScaler tells a fused optimiser to skip
                teacher.update(model)

        optimizer.register_step_post_hook(update)  # others are not called for steps that the scaler skips
        self.follows = True

    def keep(self, epoch: int, args: Any) -> None:
        """Saves the teacher beside open_clip's checkpoint, not as *.pt: --resume latest takes those for the model's."""
        if is_master(args) and self.teacher is not None:
            torch.save(self.teacher.state_dict(), Path(args.checkpoint_path) / f"teacher_{epoch + 1}.pth")

    def __call__(
        self, model: Any, data: Any, loss: Any, epoch: int, optimizer: Any, *others: Any, **named: Any
    ) -> None:
        """An epoch of open_clip 3."""
        scaler, scheduler, _, args, *more = others
        if not self.follows:
            self.follow(model, optimizer, epoch, args)
        teacher = self.teacher
        self.train_one_epoch(model, data, self.loss, epoch, optimizer, scaler, scheduler, teacher, args, *more, **named)
        self.keep(epoch, args)

    def task(self, args: Any, model: Any, dist_model: Any = None, **options: Any) -> Any:
        """The task of open_clip 4 that distils. It trains no captions, so our loss raises an error for a CoCa."""
        task = self.create_task(args, model=model, dist_model=self.make_teacher(model, args), **options)
        task.loss = self.loss
        return task

    def epoch_of_task(self, state: Any, data: Any, args: Any, **named: Any) -> None:
        """An epoch of open_clip 4."""
        if not self.follows:
            self.follow(state.task.trainable_module, state.optimizer, state.epoch, args)
        self.train_one_epoch(state, data, args, **named)
        self.keep(state.epoch, args)

    def take_place(self) -> None:
        """Replaces open_clip's own functions."""
        trainer.train_one_epoch = self
        if self.create_task:
            trainer.create_task, trainer.train_one_epoch = self.task, self.epoch_of_task


def make_data(folder: Path) -> Path:
    """32 pictures of one colour with captions, and the CSV file that open_clip reads."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(32):
        name, (r, g, b) = list(COLORS.items())[i % len(COLORS)]
        Image.new("RGB", (40, 40), (r + i, g + i, b + i)).save(path := folder / f"{i}.png")
        rows.append([path, f"a {name} square, number {i}"])
    with (folder / "train.csv").open("w", newline="") as file:
        csv.writer(file, delimiter="\t").writerows([["filepath", "title"], *rows])
    return folder / "train.csv"


def main(options: list[str]) -> int | None:
    """open_clip's command line and exit code, with our defaults before the user's options."""
    own = FOLDER / f"rank_{os.environ.get('RANK', 0)}"  # where no other process writes
    data = make_data(own / "data")
    (own / "tiny-clip.json").write_text(json.dumps(MODEL))
    open_clip.add_model_config(own / "tiny-clip.json")
    contrastive = cr.MultimodalContrastiveLoss(label_smoothing=0.05, gather=True)  # over all ranks, if several
    criterion = contrastive + 1.5 * cr.MultimodalDistillationLoss(gather=True)
    CaRotEpochs(criterion).take_place()
    defaults = (
        f"--model tiny-clip --train-data {data} --logs {FOLDER} --name carot --device cpu --batch-size 8 --epochs 2"
    )
    code: int | None = trainer.main(
        [*defaults.split(), "--lr", "1e-3", "--warmup", "2", "--workers", "0", "--precision", "fp32", *options]
    )
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
