"""The import law, the rooms of every op, and what `import fastvit` costs."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastvit.kernels._spec import all_specs

ROOT = Path(__file__).parent.parent
OPS = sorted(path.name for path in (ROOT / "kernels").iterdir() if (path / "op.py").exists())


def imports(path: Path) -> set[str]:
    """Every module that a file imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = {f"{node.module}.{name.name}" for name in node.names}
            # `from fastvit import ops` imports fastvit.ops
            found |= names if node.module in ("fastvit", "fastvit.kernels") else {node.module}
    return found - {"__future__"}


def own(path: Path) -> set[str]:
    """Those of our own modules."""
    return {name for name in imports(path) if name.split(".")[0] == "fastvit"}


def kernel_files(op: str) -> dict[str, Path]:
    """``kernel.py`` and, where one file would be long, ``kernel_<form>.py``, by module name."""
    paths = (ROOT / "kernels" / op).glob("kernel*.py")
    return {f"fastvit.kernels.{op}.{path.stem}": path for path in paths}


def allowed_in_op(op: str) -> set[str]:
    seam = {f"fastvit.kernels.{name}" for name in ("_tuning", "_device", "_library", "_checks")}
    mine = {f"fastvit.kernels.{op}.reference", *kernel_files(op)}
    siblings = {f"fastvit.kernels.{other}.op" for other in OPS}
    rooms = {f"fastvit.kernels.{op}.{room}" for room in ("forward", "backward")}
    return seam | mine | siblings | rooms


def allowed_in_backward(op: str) -> set[str]:
    gradients = {f"fastvit.kernels.{other}.backward" for other in OPS}
    return allowed_in_op(op) | gradients | {f"fastvit.kernels.{op}.backward_kernel"}


@pytest.mark.parametrize("op", OPS)
def test_rooms_of_an_op(op):
    folder = ROOT / "kernels" / op
    kernels = kernel_files(op)
    shared = {"triton", "triton.language", "fastvit.kernels._epilogue"}
    for kernel in kernels.values():
        assert imports(kernel) <= shared | {*kernels}
    if (kernel := folder / "backward_kernel.py").exists():
        assert imports(kernel) <= shared | {*kernels}
    if (room := folder / "backward.py").exists():
        assert own(room) <= allowed_in_backward(op)
    if kernels:
        assert {path.stem for path in (folder / "tuning").iterdir()} >= {"sm80", "sm90"}
    references = {f"fastvit.kernels.{other}.reference" for other in OPS}
    assert own(folder / "reference.py") <= references
    assert {name.split(".")[0] for name in imports(folder / "reference.py")} <= {
        "torch", "math", "functools", "collections", "fastvit",
    }  # fmt: skip
    assert own(folder / "op.py") <= allowed_in_op(op)
    assert {spec.op.__module__ for spec in all_specs().values()} >= {f"fastvit.kernels.{op}.op"}


def test_kernels_know_no_model():
    for path in (ROOT / "kernels").rglob("*.py"):
        assert all(name.startswith("fastvit.kernels") for name in own(path)), path


LAYERS = {
    "ops.py": {"fastvit.kernels"},
    "layers.py": {"fastvit.ops"},
    "pos_embed.py": set(),
    "vit.py": {"fastvit.layers", "fastvit.pos_embed", "fastvit.variants", "fastvit.ops"},
}


@pytest.mark.parametrize("file", LAYERS)
def test_model_imports_downwards_only(file):
    for name in own(ROOT / "fastvit" / file):
        assert any(name == low or name.startswith(low + ".") for low in LAYERS[file]), name


def test_nothing_imports_tests_or_benchmarks():
    files = [*(ROOT / "fastvit").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
    for path in files:
        assert not {name.split(".")[0] for name in imports(path)} & {"tests", "benchmarks"}, path


def test_file_sizes():
    """One room a file: under 500 lines, the model under 400."""
    for path in [*ROOT.glob("kernels/**/*.py"), *ROOT.glob("fastvit/**/*.py")]:
        assert len(path.read_text().splitlines()) <= 500, path
    assert len((ROOT / "fastvit/vit.py").read_text().splitlines()) <= 400


def in_fresh_process(code: str, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **env},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


def test_import_is_light_and_touches_no_device():
    printed = in_fresh_process(
        "import sys, time, torch\n"
        "import torch.utils.flop_counter  # imports triton, which is not our time\n"
        "start = time.process_time()\n"
        "import fastvit\n"
        "print(time.process_time() - start)\n"
        "heavy = {'timm', 'transformers', 'torchvision', 'matplotlib', 'typer', 'rich', 'onnx'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
        "print([name for name in sys.modules if name.endswith('.kernel')])\n"
        "print(torch.cuda.is_initialized())\n"
    ).splitlines()
    assert float(printed[0]) < 0.25
    assert printed[1:] == ["[]", "[]", "False"]


def test_works_without_triton(tmp_path):
    """A finder that refuses triton stands for a machine without it."""
    printed = in_fresh_process(
        "import sys\n"
        "class Refuse:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'triton':\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Refuse())\n"
        "import torch, fastvit\n"
        "model = fastvit.create_model('vit_tiny_patch16_224', depth=1)\n"
        "print(tuple(model(torch.randn(1, 3, 224, 224)).shape))\n",
        TRITON_INTERPRET="0",
    )
    assert printed == "(1, 1000)"
