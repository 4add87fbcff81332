"""The pictures of the README and of these pages, drawn anew: ``python docs/pictures.py``.

`demo.jpg` is the upper part of `fastvit demo`'s picture, `models.png` the bars of `fastvit report`
for the H200's record, without what the package no longer has.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image

from fastvit.bench import report

ROOT = Path(__file__).parent.parent
RECORD = ROOT / "benchmarks/results/nvidia-h200_202611_torch2.11.0/models.json"
GONE = "folded norms"  # measured slower and removed since
OUT = ROOT / "docs/images"


def contenders() -> dict[str, Any]:
    """The record of the models, by contenders that are still there."""
    record = json.loads(RECORD.read_text())
    for result in record["results"]:
        kept = {name: t for name, t in result["contenders"].items() if GONE not in name}
        result["contenders"] = kept
    return record | {"notes": [f"commit {record['environment']['git_commit']}"]}


def demo(path: Path) -> None:
    """The demo's three panels, 1,200 pixels wide, without the caption and its times."""
    from fastvit.cli.demo import demo as run

    with tempfile.TemporaryDirectory() as folder:
        run(out=Path(folder), seconds=0)
        with Image.open(Path(folder) / "demo.png") as picture:
            panels = picture.convert("RGB").crop((0, 0, picture.width, 680))
    panels.resize((1200, 1200 * panels.height // panels.width)).save(path, quality=82)


if __name__ == "__main__":
    report.draw(contenders(), OUT / "models.png")
    demo(OUT / "demo.jpg")
