"""Every test process interprets Triton kernels; tests choose the path with the fixtures below."""

import os

os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["FASTVIT_CACHE"] = os.devnull  # what `fastvit tune` found here decides no test

import pytest
import torch

from fastvit._compat import import_timm
from fastvit.kernels import _library

torch.set_num_threads(1)
import_timm()


@pytest.fixture(autouse=True)
def plain_path():
    """Tests run plain PyTorch unless they ask for `triton_path`."""
    with _library.backend("torch"):
        yield


@pytest.fixture
def triton_path(plain_path):
    """Kernels in the interpreter, with uninitialised memory filled with NaN."""
    torch.use_deterministic_algorithms(True)
    with _library.backend("triton"):
        yield
    torch.use_deterministic_algorithms(False)
