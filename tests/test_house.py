"""The import law, the rooms of every op, and what `import fastvit` costs."""

import ast
import graphlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastvit.kernels.specs import all_specs

ROOT = Path(__file__).parent.parent
OPS = sorted(path.name for path in (ROOT / "kernels").iterdir() if (path / "op.py").exists())
FOLDERS = {"fastvit", "fastvit.kernels", *(f"fastvit.kernels.{op}" for op in OPS)}


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
            found |= names if node.module in FOLDERS else {node.module}
    return found - {"__future__"}


def own(path: Path) -> set[str]:
    """Those of our own modules."""
    return {name for name in imports(path) if name.split(".")[0] == "fastvit"}


# who may import what, by the room's name: files of `kernels/` and rooms of any op
TRITON = {"_tiles", "_activations"}
ROOMS = {
    "kernel": (TRITON, {"kernel"}),
    "hopper": ({"_hopper_e4m3", *TRITON}, {"kernel", "hopper"}),
    "hopper_plan": (
        {"_backend", "_device", "_hopper", "_launch", "_tuning", *TRITON},
        {"kernel", "hopper", "hopper_plan", "launch"},
    ),
    "launch": (
        {"_backend", "_checks", "_device", "_hopper", "_launch", "_register", "_tuning", *TRITON},
        {"kernel", "launch", "reference", "hopper", "hopper_plan"},
    ),
    "op": (
        {"_backend", "_checks", "_device", "_launch", "_register", "_tuning"},
        {"launch", "op", "reference"},
    ),
    "spec": ({"_hopper_cases", "_spec"}, {"op", "reference", "spec"}),
    "reference": (set(), {"reference"}),
}  # fmt: skip
FORMS = {
    "kernel_backward": "kernel", "launch_backward": "launch", "hopper_long": "hopper",
    "hopper_parts": "hopper", "hopper_rope": "hopper", "hopper_backward": "hopper",
    "hopper_backward_plan": "hopper_plan",
    "hopper_small": "hopper", "hopper_small_launch": "launch",
}  # fmt: skip


def room_of(stem: str) -> str:
    """``launch`` of ``launch_backward``."""
    return FORMS.get(stem, stem)


@pytest.mark.parametrize("op", OPS)
def test_rooms_of_an_op(op):
    folder = ROOT / "kernels" / op
    stems = {path.stem for path in folder.glob("*.py")}
    assert {"launch", "op", "reference", "spec"} <= stems <= {*ROOMS, *FORMS}
    for path in folder.glob("*.py"):
        shared, rooms = ROOMS[room_of(path.stem)]
        for name in own(path):
            owner, _, room = name.removeprefix("fastvit.kernels.").partition(".")
            if owner not in OPS:
                assert owner in shared, f"{path.stem} imports {name}"
            else:
                assert room_of(room) in rooms, f"{path.stem} imports {name}"
                # a kernel may be built of another's parts; its launches are that one's launcher's
                assert owner == op or room_of(room) != "kernel" or path.stem != "op", name
    if "kernel" in stems:
        libraries = {name.split(".")[0] for name in imports(folder / "kernel.py")}
        assert libraries <= {"triton", "typing", "fastvit"}
        if (folder / "tuning").exists():
            assert {path.stem for path in (folder / "tuning").iterdir()} >= {"sm80", "sm90"}
    libraries = {name.split(".")[0] for name in imports(folder / "reference.py")}
    assert libraries <= {"torch", "math", "functools", "collections", "fastvit"}
    assert {spec.op.__module__ for spec in all_specs().values()} >= {f"fastvit.kernels.{op}.op"}


MOST_PARAMETERS = 24


def test_no_kernel_takes_a_list_of_parameters():
    """What belongs together is one NamedTuple."""
    for path in (ROOT / "kernels").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and any(
                ast.unparse(decorator).startswith("triton.jit") for decorator in node.decorator_list
            ):
                count = len(node.args.args) + len(node.args.kwonlyargs)
                assert count <= MOST_PARAMETERS, f"{path}: {node.name}"


def module_files() -> dict[str, Path]:
    """Our own modules by name; `fastvit/kernels` is a link."""
    files = [*(ROOT / "kernels").rglob("*.py")]
    files += [path for path in (ROOT / "fastvit").rglob("*.py") if "kernels" not in path.parts[-4:]]
    names = {}
    for path in files:
        parts = path.relative_to(ROOT).with_suffix("").parts
        parts = ("fastvit", *parts) if parts[0] == "kernels" else parts
        names[".".join(part for part in parts if part != "__init__")] = path
    return names


def run_time_imports(path: Path, known: set[str]) -> set[str]:
    """Modules of `known` that a file imports anywhere but for the type checker only."""
    found = set()
    pending: list[ast.AST] = [ast.parse(path.read_text())]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            whole = {f"{node.module}.{name.name}" for name in node.names}
            found |= (whole & known) or {str(node.module)}
        pending += ast.iter_child_nodes(node)
    return found & known


def test_no_circle_of_imports():
    """Also none that is broken by importing within a function."""
    files = module_files()
    assert len(files) > 100
    graph = {name: run_time_imports(path, {*files}) - {name} for name, path in files.items()}
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter({"a": {"b"}, "b": {"a"}}).prepare()
    graphlib.TopologicalSorter(graph).prepare()


MOST_LINES = 6_000  # of what runs everywhere, forward and backward


def test_kernels_are_said_once():
    files = (path for path in (ROOT / "kernels").rglob("*.py") if "hopper" not in path.stem)
    assert sum(len(path.read_text().splitlines()) for path in files) <= MOST_LINES


def test_kernels_know_no_model():
    """Nor anything else of ours, but how Triton's interpreter is taught bfloat16."""
    for path in (ROOT / "kernels").rglob("*.py"):
        others = {name for name in own(path) if not name.startswith("fastvit.kernels")}
        assert others <= ({"fastvit.interpreter"} if path.stem == "_launch" else set()), path


LAYERS = {
    "ops.py": {"fastvit.kernels"},
    "layers.py": {"fastvit.obstacles", "fastvit.ops", "fastvit.parts"},
    "parts.py": {"fastvit.ops"},
    "obstacles.py": {"fastvit.kernels"},
    "pos_embed.py": set(),
    "_seen.py": set(),
    "timm_methods.py": {"fastvit.layers", "fastvit.pos_embed", "fastvit.variants"},
    "vit.py": {
        "fastvit.layers",
        "fastvit.timm_methods",
        "fastvit.pos_embed",
        "fastvit.variants",
        "fastvit.ops",
        "fastvit._seen",
    },
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
        # a Gluon kernel spells out its roles, barriers and copies
        most = 650 if path.stem in ("hopper", "hopper_long") else 500
        assert len(path.read_text().splitlines()) <= most, path
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


def test_no_weights_are_unpickled():
    """SECURITY.md: what loads a file of others says that it holds data only."""
    safe = {"torch.load": "weights_only=True", "np.load": "allow_pickle=False"}
    found = []
    for path in [*(ROOT / "fastvit").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and (called := ast.unparse(node.func)) in safe:
                found.append(called)
                assert safe[called] in ast.unparse(node), f"{path}:{node.lineno}"
            assert not (isinstance(node, ast.Attribute) and ast.unparse(node) == "pickle.load"), (
                path
            )
    assert set(found) == {*safe}
