"""`benchmarks/bench_ops.py` under pytest-benchmark."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_times_both_paths(tmp_path):
    # pytest-benchmark times nothing in what it takes for a worker of pytest-xdist.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    record = tmp_path / "ops.json"
    done = subprocess.run(
        [
            sys.executable, "-m", "pytest", ROOT / "benchmarks" / "bench_ops.py", "-q",
            "-p", "no:xdist", "-p", "no:cacheprovider", "-k", "layer_norm and batch and 1",
            f"--benchmark-json={record}",
        ],
        env={**environment, "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:]
    entries = json.loads(record.read_text())["benchmarks"]
    paths = {entry["params"]["path"] for entry in entries}
    assert paths == {"fastvit", "eager"}
    assert all(entry["stats"]["median"] > 0 for entry in entries)
