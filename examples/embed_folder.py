"""Features of a folder of images, and a search by image in them.

Cuts three crops out of each of four photographs, embeds the folder with a trained DINOv2-S
(`fastvit embed`), and looks for each crop's nearest neighbour by cosine. Prints each pair, and how
many neighbours are of the same photograph. For a folder of your own: the `fastvit embed` line.

    python examples/embed_folder.py
"""

import tempfile
from pathlib import Path

import torch.nn.functional as F

from fastvit import samples
from fastvit.cli.main import app
from fastvit.train.embed import read_features

PHOTOS = ("astronaut", "chelsea", "coffee", "rocket")
CROPS = {"left": (0.0, 0.0), "middle": (0.2, 0.15), "right": (0.4, 0.3)}
SHARE = 0.6  # of the sides


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        crops, out = Path(folder) / "crops", Path(folder) / "features"
        crops.mkdir()
        for name in PHOTOS:
            photo = samples.photo(name)
            w, h = photo.size
            for place, (x, y) in CROPS.items():
                box = (x * w, y * h, (x + SHARE) * w, (y + SHARE) * h)
                photo.crop(box).save(crops / f"{name}-{place}.png")
        options = ["--model", "demo", "--format", "safetensors", "--out", str(out)]
        app(["embed", str(crops), *options], standalone_mode=False)
        files, features = read_features(out)
        names = [Path(name).stem for name in files]

    features = F.normalize(features, dim=-1)
    likeness = (features @ features.T).fill_diagonal_(-1)
    same = 0
    for name, row in zip(names, likeness, strict=True):
        nearest = names[int(row.argmax())]
        same += nearest.split("-")[0] == name.split("-")[0]
        print(f"{name:16} nearest {nearest:16} cosine {float(row.max()):.2f}")
    print(f"{same} of {len(names)} neighbours are of the same photograph")


if __name__ == "__main__":
    main()
