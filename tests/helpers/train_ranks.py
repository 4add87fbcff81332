"""What two ranks run: `torchrun ... train_ranks.py SCENARIO FOLDER`."""

import json
import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from train_models import data, recipe, tiny, tiny_timm

from fastvit import accelerate
from fastvit.train import Interrupted, classification_loss, fit
from fastvit.train.distributed import process_group


def stop_rank_0(step):
    """A report callback (only rank 0 has one) that asks this rank alone to stop."""

    def report(row):
        if row["kind"] == "train" and row["step"] == step:
            os.kill(os.getpid(), signal.SIGTERM)

    return report


def same_losses(folder):
    for parallel, accumulate in (("ddp", 1), ("fsdp", 2)):
        plan = recipe(accumulate=accumulate)
        fit(tiny(), data(), plan, out=folder / parallel, parallel=parallel)
        model = accelerate(tiny_timm())
        fit(model, data(), recipe(epochs=1), out=folder / f"timm-{parallel}", parallel=parallel)


def resumes(folder):
    """Go on from one process's checkpoint; stop for one process to go on."""
    for parallel in ("ddp", "fsdp"):
        fit(tiny(), data(), recipe(), out=folder / f"1to{parallel}", parallel=parallel, resume=True)
        try:
            out = folder / f"{parallel}to1"
            fit(tiny(), data(), recipe(), out=out, parallel=parallel, report=stop_rank_0(8))
        except Interrupted as error:
            (folder / f"{parallel}.{dist.get_rank()}").write_text(str(error))


def killed(folder):
    """Rank 1 dies in its eighth step; torchrun starts both ranks again."""
    restart = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    plan, calls = recipe(save_every=3), []
    classify = classification_loss(plan, 3)

    def loss(module, batch):
        calls.append(0)
        if len(calls) == 8 and restart == 0 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return classify(module, batch)

    model = tiny(drop_path_rate=0.2)
    for name in ("killed", "whole"):
        out = folder / name
        again = restart > 0 and out.exists()
        fit(model, data(), plan, out=out, parallel="ddp", loss=loss, resume=again)
        model = tiny(drop_path_rate=0.2)
    if dist.get_rank() == 0:
        (folder / "steps.json").write_text(json.dumps([restart, len(calls)]))


if __name__ == "__main__":
    torch.set_num_threads(1)
    with process_group(torch.device("cpu")):
        globals()[sys.argv[1]](Path(sys.argv[2]))
