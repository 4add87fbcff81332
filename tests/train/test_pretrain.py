"""Masked autoencoding and masked patch prediction."""

import pytest
import torch

from fastvit.pos_embed import sincos_2d
from fastvit.train.pretrain import MaskedAutoencoder, MaskedPatchPrediction, patchify
from fastvit.vit import VisionTransformer

SMALL = {"img_size": 8, "patch_size": 2, "embed_dim": 32, "depth": 2, "num_heads": 2}


def encoder(**options) -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(**{**SMALL, "num_classes": 0, **options})


def test_patches_are_in_the_order_of_the_projection():
    model = encoder()
    images = torch.randn(2, 3, 8, 8)
    weight = model.patch_embed.proj.weight.flatten(1)
    by_hand = torch.nn.functional.linear(
        patchify(images, (2, 2)), weight, model.patch_embed.proj.bias
    )
    torch.testing.assert_close(by_hand, model.patch_embed(images))


def test_sincos_positions_differ_and_are_unit_pairs():
    table = sincos_2d((3, 5), 16)[0]
    assert table.shape == (15, 16)
    assert len(table.unique(dim=0)) == 15
    torch.testing.assert_close(table.square().sum(1), torch.full((15,), 8.0))
    # the first half goes by column, the second by row
    assert torch.equal(table[0, :8], table[5, :8])
    assert torch.equal(table[0, 8:], table[4, 8:])
    with pytest.raises(ValueError, match="dim=6"):
        sincos_2d((2, 2), 6)


def test_encoder_sees_visible_patches_only():
    model = MaskedAutoencoder(encoder(reg_tokens=1), mask_ratio=0.75).eval()
    images = torch.randn(2, 3, 8, 8)
    order = model.shuffle(2, images.device)
    seen = []
    hook = model.encoder.blocks.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    encoded = model.encode(images, order)
    hook.remove()
    assert seen[0].shape == (2, 2 + 4, 32)
    # the masked patches' pixels change nothing
    pixels = patchify(images, (2, 2))
    for image, masked in enumerate(order[:, 4:]):
        pixels[image, masked] = 100.0
    changed = torch.nn.functional.fold(pixels.transpose(1, 2), (8, 8), 2, stride=2)
    assert torch.equal(model.encode(changed, order), encoded)


def test_all_visible_is_the_encoder_itself():
    model = MaskedAutoencoder(encoder()).eval()
    model.visible = 16
    images = torch.randn(1, 3, 8, 8)
    order = torch.arange(16)[None]
    torch.testing.assert_close(model.encode(images, order), model.encoder.forward_features(images))


def test_loss_is_that_of_masked_patches_and_reaches_every_parameter():
    torch.manual_seed(1)
    model = MaskedAutoencoder(encoder(), normalize_target=False)
    images = torch.randn(3, 3, 8, 8)
    state = torch.get_rng_state()
    loss = model(images)
    torch.set_rng_state(state)
    order = model.shuffle(3, images.device)
    rebuilt = model.decode(model.encode(images, order), order)
    by_hand = torch.stack(
        [
            (rebuilt[i, masked] - patchify(images, (2, 2))[i, masked]).square().mean()
            for i, masked in enumerate(order[:, 4:])
        ]
    ).mean()
    torch.testing.assert_close(loss, by_hand)
    loss.backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


def test_decoder_puts_patches_back_in_place():
    """With visible patches and masked ones told apart by their size alone."""
    model = MaskedAutoencoder(encoder(class_token=False, global_pool="avg"), decoder_depth=0)
    model.decoder = torch.nn.Sequential()
    model.decoder_head = torch.nn.Linear(128, 128)
    torch.nn.init.eye_(model.decoder_head.weight)
    torch.nn.init.zeros_(model.decoder_head.bias)
    model.decoder_embed = torch.nn.Linear(32, 128)
    torch.nn.init.zeros_(model.decoder_embed.weight)
    torch.nn.init.constant_(model.decoder_embed.bias, 7.0)
    torch.nn.init.zeros_(model.mask_token)
    model.decoder_pos_embed.zero_()
    order = model.shuffle(2, torch.device("cpu"))
    decoded = model.decode(torch.zeros(2, 4, 32), order)
    for image, visible in enumerate(order[:, :4]):
        assert (decoded[image, visible] == 7).all()
        assert (decoded[image] == 7).all(dim=1).sum() == 4


def test_colour_classes():
    model = MaskedPatchPrediction(encoder(), mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    colour = torch.tensor([0.0, 0.49, 1.0])[None, :, None, None].expand(1, 3, 8, 8)
    classes = model.targets((colour - 0.5) / 0.25)
    assert torch.equal(classes, torch.full((1, 16), 0 + 3 * 8 + 7 * 64))


def test_corruption_shares():
    model = MaskedPatchPrediction(encoder(), mean=[0.0] * 3, std=[1.0] * 3)
    torch.manual_seed(0)
    patches = torch.arange(64 * 256.0).view(64, 256, 1).expand(-1, -1, 32)
    draw = torch.rand(64, 256)
    after = model.corrupt(patches, draw)
    masked = (after == model.mask_token).all(-1)
    kept = (after == patches).all(-1)
    # 16,384 draws: shares are within 0.01 of 0.4, 0.05 and 0.55 by more than two deviations
    assert masked.float().mean() == pytest.approx(0.4, abs=0.01)
    assert (~masked & ~kept).float().mean() == pytest.approx(0.05, abs=0.01)
    assert kept[draw >= 0.5].all()


def test_prediction_learns_flat_images():
    """One colour an image: a visible patch tells the corrupted ones."""
    torch.manual_seed(0)
    model = MaskedPatchPrediction(encoder(), mean=[0.0] * 3, std=[1.0] * 3)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        images = torch.randint(0, 2, (32, 3, 1, 1)).expand(-1, -1, 8, 8) * 0.9
        loss = model(images)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 5  # log 512 = 6.2
    assert losses[-1] < 1


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_mask_ratio_is_checked(ratio):
    with pytest.raises(ValueError, match="mask_ratio"):
        MaskedAutoencoder(encoder(), mask_ratio=ratio)


def test_bad_options():
    with pytest.raises(ValueError, match="relative"):
        MaskedAutoencoder(encoder(pos_embed="relative"))
    with pytest.raises(ValueError, match="one value for each of 3"):
        MaskedPatchPrediction(encoder(), mean=[0.5], std=[0.5])
    with pytest.raises(ValueError, match="corrupted=0"):
        MaskedPatchPrediction(encoder(), mean=[0.0] * 3, std=[1.0] * 3, corrupted=0)
