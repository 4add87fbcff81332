"""Two gloo ranks on a CPU: the losses of one process, checkpoints that travel, a killed rank."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from train_models import assert_same, data, recipe, tiny, tiny_timm, weights
from typer.testing import CliRunner

from fastvit import ops
from fastvit.cli.main import app
from fastvit.train import fit
from fastvit.train.data import TrainBatches, eval_batches
from fastvit.train.embed import read_features
from fastvit.train.loop import Row

HELPERS = Path(__file__).parents[1] / "helpers"
RANKS = HELPERS / "train_ranks.py"


def torchrun(*arguments):
    """Run torchrun with two ranks; what rank 0 printed."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "FASTVIT_BACKEND": "torch"}
    env["PYTHONPATH"] = os.pathsep.join([str(HELPERS.parents[1]), str(HELPERS)])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, *map(str, arguments)],
        env=env, capture_output=True, text=True, timeout=1200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def rows(folder) -> list[Row]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_close(ours: list[Row], theirs: list[Row]):
    """Equal up to the order of float32 sums: Adam turns differences of 1e-7 in a gradient into
    some 1e-5 in 15 steps."""
    assert [r["step"] for r in ours] == [r["step"] for r in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        for name in other.keys() - {"kind", "images_per_s"}:
            assert mine[name] == pytest.approx(other[name], rel=1e-4), (name, mine["step"])


@pytest.fixture(scope="module")
def alone():
    """One process, the same global batch."""
    with ops.backend("torch"):
        return fit(tiny(), data(), recipe())


# --------------------------------------------------------------------------- who gets what


@pytest.mark.parametrize(("world", "accumulate"), [(2, 1), (2, 2), (4, 2)])
def test_ranks_share_every_batch(world, accumulate):
    plan = recipe(accumulate=accumulate)
    whole = list(TrainBatches(40, recipe(), 0, 1))
    assert len(whole) == 15
    shares = [list(TrainBatches(40, plan, rank, world)) for rank in range(world)]
    for step, batch in enumerate(whole):
        micro = [share[step * accumulate + k] for share in shares for k in range(accumulate)]
        assert len({len(keys) for keys in micro}) == 1
        assert sorted(key for keys in micro for key in keys) == sorted(batch)


def test_an_epoch_has_every_image_once_in_an_order_of_its_own():
    batches = list(TrainBatches(40, recipe(), 0, 1))
    epochs = [[i for batch in batches[5 * e : 5 * e + 5] for i, _ in batch] for e in range(3)]
    assert all(sorted(epoch) == list(range(40)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert len({seed for batch in batches for _, seed in batch}) == 120
    assert list(TrainBatches(40, recipe(), 0, 1, start=7)) == batches[7:]


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_evaluation_counts_every_image_once(world):
    shares = [eval_batches(13, 4, rank, world) for rank in range(world)]
    assert len({tuple(map(len, share)) for share in shares}) == 1  # the same rows for each
    found = [i for share in shares for batch in share for i, _ in batch if i >= 0]
    assert sorted(found) == list(range(13))


# --------------------------------------------------------------------------- two processes


def test_two_ranks_have_the_losses_of_one_process(alone, tmp_path):
    torchrun(RANKS, "same_losses", tmp_path)
    for parallel in ("ddp", "fsdp"):
        assert_close(rows(tmp_path / parallel), alone.history)
        state = load_file(tmp_path / parallel / "model.safetensors")
        assert state.keys() == weights(alone.model).keys()
        for name, value in weights(alone.model).items():  # one of Adam's steps is up to 3e-3
            torch.testing.assert_close(state[name], value, rtol=1e-3, atol=1e-4)
    plain = fit(tiny_timm(), data(), recipe(epochs=1)).history  # not accelerated
    for parallel in ("ddp", "fsdp"):
        assert_close(rows(tmp_path / f"timm-{parallel}"), plain)


@pytest.mark.slow
def test_checkpoints_load_on_another_number_of_ranks(alone, tmp_path):
    class Stop(Exception):
        pass

    def stop(row):
        if row["step"] == 12:
            raise Stop

    for parallel in ("ddp", "fsdp"):
        with pytest.raises(Stop):  # after the checkpoint of step 10
            fit(tiny(), data(), recipe(), out=tmp_path / f"1to{parallel}", report=stop)
    torchrun(RANKS, "resumes", tmp_path)
    for parallel in ("ddp", "fsdp"):
        assert_close(rows(tmp_path / f"1to{parallel}"), alone.history)
        for rank in range(2):  # rank 0 alone had the signal; both stopped after the same step
            assert "SIGTERM after step 10 of 15" in (tmp_path / f"{parallel}.{rank}").read_text()
        result = fit(tiny(), data(), recipe(), out=tmp_path / f"{parallel}to1", resume=True)
        assert_close(result.history, alone.history)


@pytest.mark.slow
def test_a_killed_rank_loses_nothing(tmp_path):
    torchrun("--max-restarts=3", RANKS, "killed", tmp_path)
    restarts, steps = json.loads((tmp_path / "steps.json").read_text())
    assert restarts >= 1
    assert steps > 15 + 15 - 8  # it went on from step 6, and the second run is whole
    killed, whole = (
        load_file(tmp_path / name / "model.safetensors") for name in ("killed", "whole")
    )
    assert_same(killed, whole)
    assert [r["step"] for r in rows(tmp_path / "killed")] == [
        r["step"] for r in rows(tmp_path / "whole")
    ]


@pytest.mark.slow
def test_commands_under_torchrun(tmp_path):
    """train with sharded weights, eval and embed print what one process prints."""
    out, pictures = tmp_path / "run", tmp_path / "pictures"
    pictures.mkdir()
    for i in range(5):
        Image.new("L", (8, 8), 40 * i).save(pictures / f"{i}.png")
    (pictures / "broken.png").write_bytes(b"")
    trained = json.loads(
        torchrun("-m", "fastvit", "train", "--parallel", "fsdp", "--epochs", "1", "--out", out,
                 "--batch-size", "200", "--json")
    )  # fmt: skip
    assert trained["steps"] == 7
    found = json.loads(torchrun("-m", "fastvit", "eval", out, "--json"))
    embed = ("-m", "fastvit", "embed", pictures, "--model", out, "--json", "--skip-broken",
             "--format", "safetensors", "--shard-size", "2", "--out")  # fmt: skip
    ours = json.loads(torchrun(*embed, tmp_path / "two"))
    with ops.backend("torch"):
        alone = CliRunner().invoke(app, ["eval", str(out), "--json"])
        theirs = CliRunner().invoke(app, [*map(str, embed[2:]), str(tmp_path / "one")])
    assert found["images"] == trained["test"]["images"] == 359
    for name in ("loss", "top1", "top5"):
        assert found[name] == pytest.approx(json.loads(alone.stdout)[name], rel=1e-5)
        assert found[name] == pytest.approx(trained["test"][name], rel=1e-4)
    assert (ours["images"], ours["broken"]) == (5, json.loads(theirs.stdout)["broken"])
    (names, values), (others, theirs) = (read_features(tmp_path / n) for n in ("two", "one"))
    assert names == others == [f"{i}.png" for i in range(5)]
    torch.testing.assert_close(values, theirs)
