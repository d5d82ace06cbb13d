"""open_clip's own trainer, not a line of it changed, with calrobust's loss and teacher.

``python examples/open_clip_trainer.py`` trains a tiny CLIP with random weights for two epochs on pictures it makes
(``pip install '.[open-clip]'`` in a clone; CPU, seconds). Options of ``open_clip_train`` may follow and win over the
ones below: ``python examples/open_clip_trainer.py --epochs 4``, then ``--epochs 6 --resume latest``. On several GPUs:
``torchrun --nproc-per-node 2 examples/open_clip_trainer.py --device cuda``.

open_clip makes its loss in ``create_loss`` and offers no place for a teacher that learns, but ``main`` looks up
``train_one_epoch`` at each epoch and hands it everything: that name is what we replace, by a function that calls it.
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
    """open_clip's epoch with our loss and, in the place of its distillation model, a teacher that follows."""

    def __init__(self, criterion: cr.losses.PairLoss) -> None:
        """Remembers open_clip's own function, which does the work."""
        if not hasattr(trainer, "create_loss"):
            raise RuntimeError(
                "this trainer is open_clip 4's, which makes no loss with create_loss; "
                "pip install 'open_clip_torch[training]>=3.3,<4'"
            )
        self.criterion, self.train_one_epoch = criterion, trainer.train_one_epoch
        self.teacher: cr.EMATeacher | None = None

    def __call__(
        self,
        model: Any,
        data: Any,
        loss: Any,
        epoch: int,
        optimizer: Any,
        scaler: Any,
        scheduler: Any,
        dist_model: Any,
        args: Any,
        tb_writer: Any = None,
    ) -> None:
        """One epoch; the teacher is made in the first and kept beside each of open_clip's checkpoints."""
        checkpoints = Path(args.checkpoint_path)
        if self.teacher is None:
            if args.horovod:
                raise ValueError("--horovod has no process group to gather pairs over; start with torchrun instead")
            if args.distill:
                raise ValueError("--distill-model names a fixed teacher, and this one learns; leave the option out")
            self.loss = OpenClipLoss(self.criterion, caption_weight=args.coca_caption_loss_weight)
            self.teacher = teacher = cr.EMATeacher(model, decay=0.9)
            if epoch > 0:
                kept = torch.load(checkpoints / f"teacher_{epoch}.pth", map_location=args.device, weights_only=True)
                teacher.load_state_dict(kept)
            # After each step of the optimiser: a step that a GradScaler skips calls no hook.
            optimizer.register_step_post_hook(lambda *_: teacher.update(model))
        args.distill = True  # "run the dist_model on each batch and give the loss what it returns"
        self.train_one_epoch(
            model, data, self.loss, epoch, optimizer, scaler, scheduler, self.teacher, args, tb_writer=tb_writer
        )
        if is_master(args):  # not *.pt, among which --resume latest looks for the model
            torch.save(self.teacher.state_dict(), checkpoints / f"teacher_{epoch + 1}.pth")


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
    contrastive = cr.MultimodalContrastiveLoss(label_smoothing=0.1, gather=True)  # over all ranks, if there are several
    criterion = contrastive + 1.5 * cr.MultimodalDistillationLoss(gather=True)
    trainer.train_one_epoch = CaRotEpochs(criterion)
    defaults = (
        f"--model tiny-clip --train-data {data} --logs {FOLDER} --name carot --device cpu --batch-size 8 --epochs 2"
    )
    code: int | None = trainer.main(
        [*defaults.split(), "--lr", "1e-3", "--warmup", "2", "--workers", "0", "--precision", "fp32", *options]
    )
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
