"""`fastvit embed`: rows once each whatever stops it, folders and tar shards, broken input."""

import json
import os
import signal
import socket
import subprocess
import sys
import tarfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from fastvit.cli.main import app
from fastvit.samples import load_image
from fastvit.train import DataConfig
from fastvit.train import embed as embedding
from fastvit.train.data import transform
from fastvit.train.models import ModelConfig, build_model, load_source

ROOT = Path(__file__).parents[2]
COUNT = 30
NAMES = sorted(f"{'even' if i % 2 == 0 else 'odd'}/{i:02}.png" for i in range(COUNT))
no_pyarrow = pytest.mark.skipif(find_spec("pyarrow") is None, reason="needs pyarrow")
FORMATS = ["safetensors", pytest.param("parquet", marks=no_pyarrow)]


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def run_json(*arguments: Any) -> Any:
    done = run(*arguments, "--json")
    assert done.exit_code == 0, done.output + str(done.exception)
    return json.loads(done.stdout)


def refused(*arguments: Any) -> str:
    """The one line that a command ends with."""
    done = run(*arguments)
    assert done.exit_code == 1
    (line,) = done.stderr.splitlines()
    return line


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A run folder of a small model with random weights."""
    folder = tmp_path_factory.mktemp("embed") / "run"
    write_run(folder, 0)
    return folder


def write_run(folder: Path, seed: int) -> None:
    torch.manual_seed(seed)
    config = {"name": "vit_digits", "options": {"depth": 1}}
    folder.mkdir(exist_ok=True)
    save_file(build_model(ModelConfig(**config)).state_dict(), folder / "model.safetensors")
    data = {"mean": 0.4, "std": 0.3, "crop_pct": 1.0}
    (folder / "config.json").write_text(json.dumps({"model": config, "data": data}))


@pytest.fixture
def pictures(tmp_path) -> Path:
    """Noise in files of two folders, and a file that is no image."""
    folder = tmp_path / "pictures"
    generator = np.random.default_rng(0)
    for name in NAMES:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (9, 11, 3), dtype=np.uint8)).save(file)
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.fixture
def shards(pictures, tmp_path) -> Path:
    """The same pictures in three tars, as webdataset has them, beside their labels."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for number in range(3):
        with tarfile.open(folder / f"{number}.tar", "w") as tar:
            for name in NAMES[10 * number : 10 * number + 10]:
                tar.add(pictures / name, name)
                tar.add(pictures / "notes.txt", Path(name).with_suffix(".cls").as_posix())
    return folder


def truncate(file: Path) -> Path:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    return file


@pytest.mark.parametrize("kind", FORMATS)
def test_rows_of_a_folder(model, pictures, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(embedding, "ROW_GROUP", 4)
    out = tmp_path / "out"
    record = run_json("embed", pictures, "--model", model, "--out", out, "--format", kind,
                      "--shard-size", "12", "--batch-size", "5")  # fmt: skip
    assert (record["images"], record["width"], record["reused"]) == (COUNT, 96, 0)
    assert [Path(file).suffix for file in record["files"]] == [f".{kind}"] * 3
    names, values = embedding.read_features(out)
    assert names == NAMES
    config = DataConfig("", 8, in_chans=1)
    pixels = [transform(config, train=False)(load_image(pictures / name)) for name in NAMES]
    with torch.no_grad():
        vit = load_source(str(model)).model.eval()
        tokens = vit.forward_features((torch.stack(pixels) / 255 - 0.4) / 0.3)
        truth = vit.forward_head(tokens, pre_logits=True)
    torch.testing.assert_close(values, truth, rtol=1e-4, atol=1e-5)  # other batches
    about = json.loads((out / "embed.json").read_text())
    assert about["files"] == {Path(f).name: n for f, n in zip(record["files"], (12, 12, 6))}  # noqa: B905
    if kind == "parquet":
        from pyarrow import parquet  # pyright: ignore[reportMissingImports]

        assert parquet.read_metadata(record["files"][0]).num_row_groups == 3


def test_tar_shards_give_the_rows_of_their_files(model, pictures, shards, tmp_path):
    arguments = ("--model", model, "--format", "safetensors", "--out")
    run_json("embed", pictures, *arguments, tmp_path / "folder")
    whole = run_json("embed", shards, *arguments, tmp_path / "tars")
    assert (whole["images"], len(whole["files"])) == (COUNT, 3)
    names, values = embedding.read_features(tmp_path / "tars")
    assert names == [f"{i // 10}.tar/{name}" for i, name in enumerate(NAMES)]
    truth = embedding.read_features(tmp_path / "folder")[1]
    torch.testing.assert_close(values, truth, rtol=1e-4, atol=1e-5)  # other batches
    alone = run_json("embed", shards / "1.tar", *arguments, tmp_path / "one")
    assert alone["images"] == 10


def test_images_are_decoded_in_workers(model, pictures, tmp_path, monkeypatch):
    def spy(path, *rest):
        (tmp_path / f"pid-{os.getpid()}").touch()
        return load_image(path, *rest)

    monkeypatch.setattr(embedding, "load_image", spy)
    run_json("embed", pictures, "--model", model, "--format", "safetensors", "--workers", "2",
             "--batch-size", "4", "--out", tmp_path / "out")  # fmt: skip
    decoding = {path.name for path in tmp_path.glob("pid-*")}
    assert len(decoding) == 2
    assert f"pid-{os.getpid()}" not in decoding


@pytest.mark.parametrize("kind", FORMATS)
def test_broken_images_stop_it_or_are_listed(model, pictures, tmp_path, kind):
    broken = {truncate(pictures / "even/04.png").name, "05.png"}
    (pictures / "odd/05.png").write_text("no image")
    arguments = ("embed", pictures, "--model", model, "--format", kind, "--shard-size", "4")
    out = ("--out", tmp_path / "out")
    line = refused(*arguments, *out)
    assert any(name in line for name in broken)
    assert "--skip-broken" in line
    record = run_json(*arguments, *out, "--resume", "--skip-broken")
    again = run_json(*arguments, *out, "--resume", "--skip-broken")
    assert again == {**record, "reused": 8}
    assert embedding.read_features(tmp_path / "out")[0] == [
        name for name in NAMES if Path(name).name not in broken
    ]
    assert all(name in text for name, text in zip(sorted(broken), record["broken"], strict=True))


def test_a_broken_tar_stops_it_or_is_listed(model, shards, tmp_path):
    (shards / "empty.tar").write_bytes(b"\0" * 1024)
    tar = truncate(shards / "1.tar")
    arguments = ("embed", shards, "--model", model, "--format", "safetensors", "--out",
                 tmp_path / "tars")  # fmt: skip
    assert f"cannot read {tar} as a tar" in refused(*arguments)
    record = run_json(*arguments, "--resume", "--skip-broken")
    assert (record["images"], len(record["files"])) == (20, 4)
    assert [str(tar) in line for line in record["broken"]] == [True]


def gone(pictures, model):
    (pictures / "odd/05.png").unlink()
    return "1 gone: odd/05.png"


def new(pictures, model):
    for i in range(5):
        Image.new("L", (9, 9)).save(pictures / f"later{i}.png")
    return "5 new: later0.png, later1.png, later2.png, ..."


def changed(pictures, model):
    Image.new("L", (9, 9)).save(pictures / "odd/05.png")
    return "1 changed: odd/05.png"


def trained(pictures, model):
    write_run(model, 1)
    return "weights changed"


@pytest.mark.parametrize("change", [gone, new, changed, trained])
def test_resume_of_something_else_is_refused(pictures, tmp_path, change):
    write_run(tmp_path / "run", 0)
    arguments = ("embed", pictures, "--model", tmp_path / "run", "--format", "safetensors",
                 "--out", tmp_path / "out")  # fmt: skip
    run_json(*arguments)
    assert "is not empty" in refused(*arguments)
    assert run_json(*arguments, "--resume")["reused"] == 1
    said = change(pictures, tmp_path / "run")
    assert refused(*arguments, "--resume").endswith(f"was made otherwise: {said}")
    assert "img_size changed" in refused(*arguments, "--resume", "--img-size", "16")


def start(arguments: tuple[Any, ...], ranks: int) -> list[subprocess.Popen[str]]:
    """The command in `ranks` processes, as torchrun starts them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = {
        **os.environ, "OMP_NUM_THREADS": "1", "FASTVIT_BACKEND": "torch", "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }  # fmt: skip
    command = [sys.executable, "-m", "fastvit", *map(str, arguments)]
    return [
        subprocess.Popen(
            command, env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for rank in range(ranks)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("ranks", "then"), [(1, 1), pytest.param(2, 2, marks=pytest.mark.slow)], ids=str
)
def test_killed_and_resumed_it_has_every_row_once(model, pictures, tmp_path, ranks, then):
    for i in range(120):  # enough to be in the middle of
        Image.new("L", (9, 9), i % 256).save(pictures / f"more{i:03}.png")
    out = tmp_path / "out"
    arguments = ("embed", pictures, "--model", model, "--out", out, "--format", "safetensors",
                 "--shard-size", "3", "--batch-size", "3")  # fmt: skip
    children = start(arguments, ranks)
    try:
        while len(list(out.glob("*.safetensors"))) < 3:
            time.sleep(0.01)
            assert all(child.poll() is None for child in children)
        for child in children:
            child.send_signal(signal.SIGKILL)
    finally:
        for child in children:
            child.kill()
            child.communicate()
    done = len(list(out.glob("*.safetensors")))
    parts = -(-(COUNT + 120) // 3)
    assert 3 <= done < parts
    if then == 1:
        record = run_json(*arguments, "--resume")
    else:
        printed = [child.communicate() for child in start((*arguments, "--resume", "--json"), then)]
        record = json.loads(printed[0][0])
        assert printed[1][0] == ""
    assert record["reused"] == done
    names, values = embedding.read_features(out)
    assert names == [*NAMES[:15], *(f"more{i:03}.png" for i in range(120)), *NAMES[15:]]
    assert len(names) == len(set(names)) == len(values) == COUNT + 120
    assert not list(out.glob("*.tmp"))
