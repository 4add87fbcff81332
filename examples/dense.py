"""Segmentation on a frozen trained ViT: a head of a few layers on its feature map.

Pastes a cat at random places onto other photographs, so that its mask is known, and trains a
`SimpleFeaturePyramid` level and one 1x1 convolution on features of a frozen DINOv2-S. Prints the
loss, and the intersection over union on pictures that were not trained on.

    python examples/dense.py
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastvit
from fastvit import samples
from fastvit.dense import SimpleFeaturePyramid

SIZE, SIDE = 224, 96  # of a picture and of the cat in it, pixels
BACKGROUNDS = ("astronaut", "coffee", "motorcycle", "rocket")


def pictures(count: int) -> tuple[Tensor, Tensor]:
    """Images [count, 3, 224, 224] and masks [count, 224, 224]."""
    photo = {name: samples.square(samples.photo(name), SIZE) for name in BACKGROUNDS}
    cat = samples.square(samples.photo("chelsea"), SIDE)
    images, masks = [], torch.zeros(count, SIZE, SIZE)
    for mask in masks:
        picture = photo[BACKGROUNDS[int(torch.randint(len(BACKGROUNDS), ()))]].copy()
        x, y = torch.randint(SIZE - SIDE, (2,)).tolist()
        picture.paste(cat, (x, y))
        mask[y : y + SIDE, x : x + SIDE] = 1
        images.append(samples.preprocess(picture, SIZE))
    return torch.cat(images), masks


def main() -> None:
    torch.manual_seed(0)
    vit = fastvit.create_model(samples.DINOV2_SMALL, img_size=SIZE, num_classes=0).eval()
    vit.load_state_dict(samples.dinov2_small(SIZE))
    images, masks = pictures(24)
    with torch.no_grad():  # the ViT is frozen: one forward serves all steps
        (grid,) = vit.forward_intermediates(images, indices=1, norm=True, intermediates_only=True)

    head = nn.ModuleList(
        [SimpleFeaturePyramid(vit.embed_dim, 32, scales=(2,)), nn.Conv2d(32, 1, 1)]
    )
    optimizer = torch.optim.AdamW(head.parameters(), lr=2e-3)

    def logits(grid: Tensor) -> Tensor:
        (level,) = head[0](grid)  # (B, 32, 32, 32)
        return F.interpolate(head[1](level), (SIZE, SIZE), mode="bilinear")[:, 0]

    for step in range(31):
        loss = F.binary_cross_entropy_with_logits(logits(grid[:16]), masks[:16])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0:
            print(f"step {step}: loss {float(loss.detach()):.3f}")
    with torch.no_grad():
        found, true = logits(grid[16:]) > 0, masks[16:] > 0
    iou = float((found & true).sum() / (found | true).sum())
    print(f"intersection over union on 8 new pictures: {iou:.0%}")


if __name__ == "__main__":
    main()
