"""Self-supervised pre-training of a `VisionTransformer`: masked autoencoding and the ViT paper's
masked patch prediction. Both are modules of images to a loss, so that any training loop runs them;
`encoder` is the model to keep.

Shape legend: B batch, N patches, P prefix tokens, D width, V visible patches, C channels, p patch
size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvit.layers import LayerNorm
from fastvit.pos_embed import sincos_2d
from fastvit.variants import ViTConfig
from fastvit.vit import Block, VisionTransformer

LEVELS = 8  # of a colour channel, 3 bits


def patchify(images: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """[B, C, H, W] to [B, N, C * ph * pw], each patch in the order of the patch projection."""
    ph, pw = patch_size
    return F.unfold(images, (ph, pw), stride=(ph, pw)).transpose(1, 2)


class MaskedAutoencoder(nn.Module):
    """Rebuild the pixels of masked patches from the visible ones, which alone the encoder sees.

    Args:
        encoder: its head is not used.
        mask_ratio: share of the patches that are masked.
        decoder_dim, decoder_depth, decoder_heads: of the small Transformer that is thrown away.
        normalize_target: rebuild each patch with its own mean and variance taken out.

    Raises:
        ValueError: a ratio that leaves no patch visible or none masked, sizes that do not fit, an
            encoder with a relative position bias, which is made for all patches.

    Source: MAE (arXiv:2111.06377), sections 3 and 4.
    """

    decoder_pos_embed: Tensor

    def __init__(
        self,
        encoder: VisionTransformer,
        *,
        mask_ratio: float = 0.75,
        decoder_dim: int = 128,
        decoder_depth: int = 2,
        decoder_heads: int = 4,
        normalize_target: bool = True,
    ) -> None:
        super().__init__()
        embed = encoder.patch_embed
        self.visible = embed.num_patches - round(mask_ratio * embed.num_patches)
        if not 0 < self.visible < embed.num_patches:
            raise ValueError(
                f"mask_ratio={mask_ratio} leaves {self.visible} of {embed.num_patches} patches"
                " visible"
            )
        if any(block.attn.rel_pos is not None for block in encoder.blocks):  # pyright: ignore
            raise ValueError("a masked autoencoder cannot have pos_embed='relative'")
        self.encoder = encoder
        self.normalize_target = normalize_target
        cfg = ViTConfig(
            img_size=embed.img_size,
            patch_size=embed.patch_size,
            embed_dim=decoder_dim,
            num_heads=decoder_heads,
        )
        self.decoder_embed = nn.Linear(encoder.embed_dim, decoder_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_dim))
        nn.init.normal_(self.mask_token, std=0.02)
        position = sincos_2d(embed.grid_size, decoder_dim)
        self.register_buffer("decoder_pos_embed", position, persistent=False)
        self.decoder = nn.Sequential(
            *(Block(cfg, 0.0, None) for _ in range(decoder_depth)), LayerNorm(decoder_dim)
        )
        pixels = encoder.in_chans * embed.patch_size[0] * embed.patch_size[1]
        self.decoder_head = nn.Linear(decoder_dim, pixels)

    def shuffle(self, batch: int, device: torch.device) -> Tensor:
        """int64 [B, N]: a random order of each image's patches; the first V are visible."""
        noise = torch.rand(batch, self.encoder.patch_embed.num_patches, device=device)
        return noise.argsort(dim=1)

    def encode(self, images: Tensor, order: Tensor) -> Tensor:
        """The visible patches of [B, C, H, W] through the encoder: [B, P + V, D]."""
        x = self.encoder._embed(images)
        prefix = self.encoder.num_prefix_tokens
        kept = order[:, : self.visible, None].expand(-1, -1, x.shape[2]) + prefix
        x = torch.cat([x[:, :prefix], x.gather(1, kept)], dim=1)
        return self.encoder.norm(self.encoder.blocks(x))

    def decode(self, encoded: Tensor, order: Tensor) -> Tensor:
        """Every patch's pixels, [B, N, C * ph * pw]."""
        x = self.decoder_embed(encoded)
        prefix, visible = x.split([x.shape[1] - self.visible, self.visible], dim=1)
        masked = self.mask_token.expand(len(x), order.shape[1] - self.visible, -1)
        patches = torch.cat([visible, masked.to(x.dtype)], dim=1)
        back = order.argsort(dim=1)[..., None].expand(-1, -1, x.shape[2])
        patches = patches.gather(1, back) + self.decoder_pos_embed.to(x.dtype)
        return self.decoder_head(self.decoder(torch.cat([prefix, patches], 1)))[
            :, prefix.shape[1] :
        ]

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W], normalised, to the mean squared error over masked patches."""
        order = self.shuffle(len(images), images.device)
        rebuilt = self.decode(self.encode(images, order), order)
        target = patchify(images, self.encoder.patch_embed.patch_size)
        if self.normalize_target:
            variance, mean = torch.var_mean(target, dim=-1, keepdim=True)
            target = (target - mean) / (variance + 1e-6).sqrt()
        errors = (rebuilt.float() - target.float()).square().mean(dim=-1)  # (B, N)
        return errors.gather(1, order[:, self.visible :]).mean()


class MaskedPatchPrediction(nn.Module):
    """Predict the mean colour, 3 bits a channel, of corrupted patches.

    Half of the patch embeddings are corrupted: 80 % of these become a learned mask embedding, 10 %
    another patch's embedding, 10 % stay.

    Args:
        encoder: its head is not used.
        mean, std: C values each, by which images were normalised from pixels in [0, 1].
        corrupted: share of the patches that are corrupted and predicted.

    Raises:
        ValueError: statistics for another number of channels, a share outside (0, 1].

    Source: ViT paper (arXiv:2010.11929), appendix B.1.2.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        encoder: VisionTransformer,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        corrupted: float = 0.5,
    ) -> None:
        super().__init__()
        channels = encoder.in_chans
        if not len(mean) == len(std) == channels:
            raise ValueError(f"mean {mean} and std {std} need one value for each of {channels}")
        if not 0 < corrupted <= 1:
            raise ValueError(f"corrupted={corrupted} is not in (0, 1]")
        self.encoder, self.corrupted = encoder, corrupted
        self.mask_token = nn.Parameter(torch.zeros(encoder.embed_dim))
        nn.init.normal_(self.mask_token, std=0.02)
        self.classifier = nn.Linear(encoder.embed_dim, LEVELS**channels)
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)

    def targets(self, images: Tensor) -> Tensor:
        """Class of every patch's mean colour, int64 [B, N]."""
        pixels = images * self.std + self.mean
        colour = F.avg_pool2d(pixels, self.encoder.patch_embed.patch_size)  # (B, C, gh, gw)
        level = (colour * LEVELS).long().clamp(0, LEVELS - 1)
        weights = LEVELS ** torch.arange(level.shape[1], device=level.device)
        return (level * weights[:, None, None]).sum(dim=1).flatten(1)

    def corrupt(self, patches: Tensor, draw: Tensor) -> Tensor:
        """Patch embeddings [B, N, D] with those of `draw` (uniform, [B, N]) below `corrupted`
        masked, replaced by any other's of the batch, or kept."""
        share = (draw / self.corrupted)[..., None]
        others = patches.flatten(0, 1)
        others = others[torch.randint(len(others), draw.shape, device=draw.device)]
        mask = self.mask_token.to(patches.dtype)
        return torch.where(share < 0.8, mask, torch.where(share < 0.9, others, patches))

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W], normalised, to the cross-entropy over corrupted patches."""
        encoder = self.encoder
        # the position goes on after the corruption, so that a masked patch knows where it is
        embed = encoder.patch_embed
        x = embed(images)
        draw = torch.rand(x.shape[:2], device=x.device)
        x = encoder._add_positions(self.corrupt(x, draw), embed.grid_size)
        x = encoder.norm(encoder.blocks(x))[:, encoder.num_prefix_tokens :]
        chosen = draw < self.corrupted
        return F.cross_entropy(self.classifier(x[chosen]).float(), self.targets(images)[chosen])
