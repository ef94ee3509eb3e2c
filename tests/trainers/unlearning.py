"""A request through transformers' Trainer: the samples of `session.prepare`, the losses of our own
loop, the Trainer's ranks, checkpoints and logs.

Run it with `python tests/trainers/unlearning.py OUT`,
or on two ranks with `torchrun --nproc_per_node 2 tests/trainers/unlearning.py OUT [--fsdp]`.
Further arguments are those of TrainingArguments: `--report_to tensorboard --logging_steps 1`.
"""

import sys
from pathlib import Path

import torch
from transformers import HfArgumentParser, TrainingArguments

from fastsiu import Recipe, Request, session
from fastsiu.demo import MODEL_DIR
from fastsiu.demo.world import KNOWN, World, draw
from fastsiu.images import load_image
from fastsiu.model import vlm
from fastsiu.trainers import UnlearningTrainer

RECIPE = Recipe(lr=1.5e-3, dreams=0, strangers=0)


def main(args, concept=KNOWN[2], model=str(MODEL_DIR), recipe=RECIPE):
    picture = Path(args.output_dir) / f"picture-{args.process_index}.png"
    picture.parent.mkdir(parents=True, exist_ok=True)
    draw(World().sketch((concept,), "one")).save(picture)

    torch.set_num_threads(1)
    loaded = vlm.load(model, device=str(args.device))
    request = Request(concept, picture, protect=(KNOWN[6],))
    prepared = session.prepare(
        loaded, request, recipe, load_image(picture), listener=session.Listener(), seconds={}
    )
    trainer = UnlearningTrainer(loaded, prepared, recipe, args)
    trainer.train()
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    (arguments,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(
        ["--output_dir", *sys.argv[1:]]
    )
    main(arguments)
