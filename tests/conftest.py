"""Every test process interprets Triton kernels; tests choose the path with the fixtures below."""

import os

os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["FASTVIT_CACHE"] = os.devnull  # what `fastvit tune` found here decides no test

import pytest
import seeds
import torch

from fastvit._compat import import_timm
from fastvit.kernels import _backend, _launch

torch.set_num_threads(1)
import_timm()


def pytest_terminal_summary(terminalreporter):
    """Last, also with -q and where nothing failed."""
    terminalreporter.write_line(f"FASTVIT_TEST_SEED={seeds.SEED}")


def pytest_pycollect_makemodule(module_path):
    """What a file draws while it is imported depends on the file alone."""
    seeds.start(module_path.name)


@pytest.fixture(autouse=True)
def seeded(request):
    """Seeds that depend on the test alone, wherever its file stands."""
    _, _, name = request.node.nodeid.partition("::")
    seeds.start(f"tests/{request.path.name}::{name}")


@pytest.fixture(autouse=True)
def plain_path():
    """Tests run plain PyTorch unless they ask for `triton_path`."""
    with _backend.backend("torch"):
        yield


@pytest.fixture
def triton_path(plain_path):
    """Kernels in the interpreter, with uninitialised memory filled with NaN."""
    torch.use_deterministic_algorithms(True)
    with _backend.backend("triton"):
        yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def launched(monkeypatch):
    """Every `_launch.Prepared` that runs, in order: the interpreter keeps none as compiled."""
    ran = []
    run_first = _launch._run_first

    def record(prepared, tensors):
        ran.append(prepared)
        run_first(prepared, tensors)

    monkeypatch.setattr(_launch, "_run_first", record)
    return ran
