r"""CaRot and the methods it is compared with, on ImageNet and its shifts, with any open_clip model.

    torchrun --nproc-per-node 8 examples/imagenet.py --method carot --model ViT-B-16 --pretrained openai \
        --train imagenet/train --val imagenet/val --ood v2=imagenetv2 --ood r=imagenet-r --ood a=imagenet-a \
        --ood sketch=sketch --ood objectnet=objectnet/images --map objectnet=objectnet.txt --out runs/carot

Also runs as ``python examples/imagenet.py ...`` on one device. A preset for each ``--method`` holds the
hyper-parameters; every one can be overridden. Written to ``--out`` are checkpoints (``--resume`` goes on from the last
one), logs, the weights and a report on accuracy and calibration. The temperature, and WiSE-FT's alpha, are fitted on a
part of the training data that no step sees. Read on in ``examples/imagenet/``; ``methods.py`` is where calrobust does
its work.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from imagenet.checkpoint import check_disk, check_fresh, load_checkpoint
from imagenet.data import read_data
from imagenet.errors import RunError
from imagenet.evaluation import Evaluation
from imagenet.logs import Logs
from imagenet.methods import method_for
from imagenet.model import build_model
from imagenet.options import Options, parse
from imagenet.pictures import BadImages
from imagenet.processes import Processes
from imagenet.training import Training


def run(options: Options, processes: Processes) -> None:
    """Checks everything that can be checked, trains, and reports."""
    check_fresh(options)
    data = read_data(options, processes)
    torch.manual_seed(options.seed)
    model = build_model(options, data.classes, processes.device)
    method = method_for(options, model, len(data.train), processes)
    check_disk(options, method)
    bad_images = BadImages(options.on_bad_image)
    evaluation = Evaluation(options, model, data, processes, bad_images)
    step, logged = load_checkpoint(options, method) if options.resume else (0, 0)
    with Logs(options, step, logged, writes=processes.is_first) as logs:
        Training(options, model, method, data, processes, bad_images, logs, evaluation).run(start=step)
        report = evaluation.final(method, logs)
    if processes.is_first:
        evaluation.write(report, method)
        print(f"\n{report}\n")
        print(f"Written to {options.out}. {bad_images}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the options and runs; what the user can mend is said in one line."""
    options = parse(arguments)
    try:
        with Processes.started(options.device) as processes:
            run(options, processes)
    except (RunError, OSError) as error:  # the latter when the disk is full, for example
        sys.exit(f"imagenet.py: error: {error}")


if __name__ == "__main__":
    main()
