"""`fastvit coverage --arch sm90`: which kernel each linear and attention of a model would take."""

import json
import warnings
from collections import Counter

import pytest
import torch
from typer.testing import CliRunner

from fastvit.check import kernel_choice, launches
from fastvit.check.kernel_choice import PYTORCH, kernels_of
from fastvit.cli.main import app

FEW = "so few heads are not worth a launch that turns q and k"
# linears and attentions that take one of Hopper's kernels at batch 256, and why others do not
EXPECTED = {
    "vit_base_patch16_224": ((48, 12), {PYTORCH: 1}),
    "vit_tiny_patch16_224": ((48, 12), {PYTORCH: 1}),
    "vit_so400m_patch14_siglip_gap_224": ((108, 27), {}),  # 72 channels a head, 4304 hidden
    "vit_giant_patch14_reg4_dinov2": ((200, 40), {}),  # SwiGLU, of two linears and one
    "aimv2_large_patch14_224": ((120, 24), {}),  # PyTorch's own RMSNorm
    "vit_base_patch16_dinov3": ((48, 12), {}),
    "eva02_tiny_patch14_224": ((60, 12), {}),
}


def counted(chosen: kernel_choice.Chosen) -> tuple[tuple[int, int], dict[str, int]]:
    assert chosen.raised is None
    taken, left = Counter(), Counter()
    for choice in chosen.choices:
        if choice.reason is None:
            taken[choice.op] += choice.count
        else:
            left[choice.reason] += choice.count
    return (taken["linear"], taken["attention"]), dict(left)


@pytest.mark.parametrize("name", EXPECTED)
def test_kernels_of_a_model(name):
    assert counted(kernels_of(name)) == EXPECTED[name]


def test_few_rows_and_other_gpus_have_their_reason():
    (taken, left) = counted(kernels_of("vit_base_patch16_224", batch=1))
    assert taken == (0, 12)
    assert sum(n for why, n in left.items() if "table of sm90 names" in why) == 48
    taken, left = counted(kernels_of("eva02_tiny_patch14_224", batch=1))
    assert taken == (0, 0)
    assert left[FEW] == 12
    taken, left = counted(kernels_of("vit_tiny_patch16_224", "sm80"))
    assert taken == (0, 0)
    assert all("table of sm80" in why for why in left if why != PYTORCH)


def test_a_launcher_that_kept_its_answer_is_counted_each_time():
    """As one that answers anew: neither the order of models nor a second forward matters."""
    first, again = (kernels_of("vit_tiny_patch16_224") for _ in range(2))
    assert first == again
    assert sum(choice.count for choice in first.choices) == 61


def test_nothing_is_computed():
    x = torch.ones(64, 64, 64)
    with launches.Unwritten():
        total = x.transpose(0, 1).reshape(64, -1).float() @ torch.ones(4096, 3)
        view, small = x[:, 1:], torch.arange(3) + 1
        x.mul_(0)
        cast = x.to("cpu", torch.bfloat16)
        normed = torch.nn.functional.rms_norm(cast, (64,))
    assert total.shape == (64, 3)
    assert normed.dtype == cast.dtype == torch.bfloat16
    assert view.data_ptr() == x[:, 1:].data_ptr()
    assert small.tolist() == [1, 2, 3]
    assert bool((x == 1).all())


def test_command():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        done = CliRunner().invoke(app, ["coverage", "eva02_tiny_patch14_224", "--arch", "sm90"])
        record = CliRunner().invoke(
            app, ["coverage", "vit_tiny_patch16_224", "--arch", "sm90", "--json"]
        )
    assert done.exit_code == 0, done.output
    assert "1 architectures" in done.output
    assert all(name in done.output for name in ("pingpong", "roles", "eva02_tiny_patch14_224"))
    record = json.loads(record.stdout)
    assert record["passed"]
    assert record["summary"][0] == {
        "op": "linear", "kernel": "pingpong", "reason": None, "count": 48, "models": 1,
        "examples": ["vit_tiny_patch16_224"],
    }  # fmt: skip
    done = CliRunner().invoke(app, ["coverage", "--arch", "sm90", "--library", "torchvision"])
    assert done.exit_code == 2
    assert "timm" in done.output


def test_what_raises_is_reported(monkeypatch):
    def planted(model: torch.nn.Module) -> None:
        raise RuntimeError("planted")

    monkeypatch.setattr(kernel_choice, "accelerate", planted)
    done = CliRunner().invoke(app, ["coverage", "vit_tiny_patch16_224", "--arch", "sm90"])
    assert done.exit_code == 1
    assert "planted" in done.output
