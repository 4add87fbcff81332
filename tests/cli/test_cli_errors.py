"""Wrong names, missing files and broken images: one line each, in every command that takes them."""

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fastvit.cli.main import app
from fastvit.samples import photo


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Broken input of every kind."""
    root = tmp_path_factory.mktemp("bad")
    for name in ("cut", "text", "empty", "run"):
        (root / name).mkdir()
    photo("rocket").save(root / "whole.jpg")
    content = (root / "whole.jpg").read_bytes()
    (root / "cut" / "cut.jpg").write_bytes(content[: len(content) // 2])
    (root / "text" / "text.jpg").write_text("not an image")
    (root / "run" / "config.json").write_text('{"model": ')
    (root / "weights.pt").write_bytes(content)
    return root


UNKNOWN = "unknown model 'vit_bas_patch16_224'; nearest: "
NAME = "vit_bas_patch16_224"
CUT, TEXT = "cut/cut.jpg' as an image: image file is truncated", "text.jpg' as an image: cannot"
TINY = "vit_tiny_patch16_224"
EMBED = ("--format", "safetensors", "--model", "demo", "--img-size", "28")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["explain", NAME], UNKNOWN),
        (["explain", f"{TINY}.tag"], "unknown tag 'tag' of vit_tiny_patch16_224; there are: "),
        (["explain", "{root}/nothing"], "is neither a file or folder nor a model's name"),
        (["explain", "{root}/empty"], "config.json is not there"),
        (["explain", "{root}/run"], "config.json is damaged"),
        (["explain", "{root}/weights.pt"], "weights.pt is damaged"),
        (["predict", "coffee", "--model", NAME], UNKNOWN),
        (["predict", "coffee", "--model", "demo"], "demo has no classifier: `fastvit embed`"),
        (["predict", "coffee", "--model", TINY], "are not on this machine and cannot be fetched"),
        (["predict", "coffee", "--model", "{root}/run"], "config.json is damaged"),
        (["predict", "coffee", "--model", TINY, "--checkpoint", "{root}/no.pt"], "no.pt'"),
        (["predict", "{root}/no.jpg", "--model", TINY], "no.jpg' as an image: [Errno 2]"),
        (["predict", "coffee", "{root}/cut/cut.jpg", "--model", TINY], CUT),
        (["predict", "{root}/text/text.jpg", "--model", TINY], TEXT),
        (["embed", "{root}/nothing", *EMBED], "nothing is not a folder"),
        (["embed", "{root}/empty", *EMBED], "empty has neither images"),
        (["embed", "{root}/cut", *EMBED], CUT),
        (["embed", "{root}/text", *EMBED], TEXT),
        (["embed", "{root}/cut", "--model", NAME, "--format", "safetensors"], UNKNOWN),
        (["attention-map", "{root}/no.jpg"], "no.jpg' as an image: [Errno 2]"),
        (["attention-map", "{root}/cut/cut.jpg"], CUT),
        (["attention-map", "{root}/text/text.jpg"], TEXT),
        (["attention-map", "coffee", "--model", NAME], UNKNOWN),
        (["demo", "--image", "{root}/cut/cut.jpg"], CUT),
        (["demo", "--image", "{root}/text/text.jpg"], TEXT),
        (["demo", "--photo", "cafe"], "no photograph named 'cafe'; available: "),
        (["eval", NAME, "--data", "digits"], UNKNOWN),
        (["eval", "{root}/run"], "config.json is damaged"),
        (["eval", TINY, "--data", "digits"], "are not on this machine and cannot be fetched"),
        (["export", NAME], UNKNOWN),
        (["export", TINY, "--checkpoint", "{root}/weights.pt"], "weights.pt is damaged"),
        (["finetune", NAME], UNKNOWN),
        (["train", "--data", "{root}/nothing"], "is neither digits, mnist5k nor a folder"),
        (["train", "--model", NAME], UNKNOWN),
        (["pretrain", "--data", "{root}/nothing"], "is neither digits, mnist5k nor a folder"),
        (["report", "{root}/nothing"], "nothing"),
        (["coverage", NAME], NAME),
    ],
    ids=str,
)
def test_bad_input_gets_one_line(root, tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)  # where commands write
    given = [argument.replace("{root}", str(root)) for argument in arguments]
    done: Any = CliRunner().invoke(app, given)
    assert done.exit_code == 1, done.output
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"fastvit {given[0]}: ")
    assert said in line
    assert done.stdout == ""
