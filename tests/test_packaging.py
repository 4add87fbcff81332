"""sdist and wheel carry the kernels and their tuning tables, and an installed wheel works."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(
    str(path.relative_to(ROOT))
    for pattern in ("kernels/**/*.py", "kernels/**/*.json")
    for path in ROOT.glob(pattern)
)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder with a wheel built from the sdist."""
    out = tmp_path_factory.mktemp("dist")
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-1000:]
    return out


def test_sdist_and_wheel_carry_kernels_and_tables(built):
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        sdist = {name.partition("/")[2] for name in archive.getnames()}
    with zipfile.ZipFile(next(built.glob("*.whl"))) as archive:
        wheel = set(archive.namelist())
    assert any(name.endswith("sm90.json") for name in FILES)
    inside = {f"fastvit/{name}" for name in FILES}
    assert inside <= wheel
    assert inside <= sdist
    assert not {name for name in wheel if name.startswith(("kernels/", "tests/", "benchmarks/"))}


def test_installed_wheel_runs(built, tmp_path):
    with zipfile.ZipFile(next(built.glob("*.whl"))) as archive:
        archive.extractall(tmp_path)
    code = (
        "import fastvit, torch\n"
        "from fastvit.kernels._tuning import load_table\n"
        "assert load_table('linear', 'sm90')\n"
        "x = fastvit.ops.linear(torch.ones(2, 4), torch.ones(3, 4))\n"
        "print(fastvit.__file__, x.shape)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=tmp_path,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert str(tmp_path) in done.stdout
