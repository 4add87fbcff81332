"""sdist and wheel carry the kernels and their tuning tables, and an installed wheel works."""

import os
import re
import shutil
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
    assert inside | {"fastvit/py.typed"} <= wheel
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


@pytest.mark.parametrize("link", ["../kernels", None], ids=["a text file", "nothing"])
def test_a_checkout_without_symbolic_links_says_what_to_do(tmp_path, link):
    """As Windows and some archivers leave it."""
    shutil.copytree(ROOT / "fastvit", tmp_path / "fastvit", ignore=lambda *_: {"kernels"})
    if link is not None:
        (tmp_path / "fastvit/kernels").write_text(link)
    # an editable install of ours would find kernels in its own checkout
    code = (
        "import sys\n"
        "sys.meta_path = [f for f in sys.meta_path if '__editable__' not in repr(f)]\n"
        "import fastvit"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(tmp_path)},
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: fastvit/kernels is not the link to kernels/")
    assert "git config core.symlinks true" in last
    assert "During handling" not in done.stderr


def test_one_version_everywhere():
    (version,) = re.findall(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.M)
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    (newest, *_) = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert newest in (version, "Unreleased")
