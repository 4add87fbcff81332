"""Fine-tuning at a higher resolution, as in the ViT paper's section 3.2.

Trains a small ViT on scikit-learn's digits at 8x8 pixels, then enlarges the same model to 16x16:
the position embedding is interpolated, the head is new and zero. Prints the accuracy on held-out
digits after each, beside that of the same fine-tuning from random weights.

    python examples/finetune.py
"""

import copy

import torch

import fastvit
from fastvit.train import DataConfig, Recipe, fit, load_data


def digits(side: int) -> DataConfig:
    return DataConfig("digits", img_size=side, in_chans=1, mean=0.31, std=0.38)


def main() -> None:
    torch.manual_seed(0)
    model = fastvit.create_model(
        "vit_tiny_patch16_224", img_size=8, patch_size=2, in_chans=1, num_classes=10,
        embed_dim=96, depth=2,
    )  # fmt: skip
    untrained = copy.deepcopy(model)
    recipe = Recipe(epochs=10, lr=4e-3, warmup_epochs=1, eval_every=10)
    trained = fit(model, load_data(digits(8)), recipe)
    print(f"trained at 8x8: top-1 {trained.test['top1']:.1%}")

    data = load_data(digits(16))
    for name, start in (("trained", model), ("random", untrained)):
        start.set_input_size(img_size=16)  # 64 patches instead of 16
        start.reset_classifier(10, zero_init=True)
        tuned = fit(start, data, Recipe(epochs=3, lr=2e-3, warmup_epochs=0.3, eval_every=3))
        print(f"fine-tuned at 16x16 from {name} weights: top-1 {tuned.test['top1']:.1%}")


if __name__ == "__main__":
    main()
