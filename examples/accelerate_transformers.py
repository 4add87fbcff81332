"""A model of transformers, whole, and then by its attention alone.

Prints the plan of a small Dinov2 with random weights; the largest difference that `accelerate`
makes to any hidden state; and that of ``attn_implementation="fastvit"`` in a CLIP vision tower.
With weights from a hub: ``AutoModel.from_pretrained(NAME)`` in the place of the constructors.

    python examples/accelerate_transformers.py
"""

import copy
from typing import Any

import torch

import fastvit
from fastvit._compat import import_transformers


def main() -> None:
    torch.manual_seed(0)
    transformers = import_transformers()
    images = torch.randn(2, 3, 224, 224)

    config = transformers.Dinov2Config(
        hidden_size=192, num_attention_heads=3, num_hidden_layers=4, attn_implementation="sdpa"
    )
    theirs: Any = transformers.Dinov2Model(config).eval()
    ours = fastvit.accelerate(copy.deepcopy(theirs), strict=True)  # raises where it would fall back
    fastvit.explain(ours)
    with torch.inference_mode():
        pairs = zip(
            theirs(images, output_hidden_states=True).hidden_states,
            ours(images, output_hidden_states=True).hidden_states,
            strict=True,
        )
        worst = max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs)
    print(f"accelerate: hidden states within {worst:.1e} of the largest value")

    fastvit.register_transformers()
    config = transformers.CLIPVisionConfig(
        hidden_size=192, num_attention_heads=3, num_hidden_layers=4, patch_size=16
    )
    clip: Any = transformers.CLIPVisionModel(config).eval()
    with torch.inference_mode():
        before = clip(images).pooler_output
        clip.set_attn_implementation("fastvit")
        after = clip(images).pooler_output
    difference = float((after - before).abs().max() / before.abs().max())
    print(f"attn_implementation='fastvit': within {difference:.1e}")


if __name__ == "__main__":
    main()
