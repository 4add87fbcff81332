"""A process of its own, for what compiles kernels: those of a test's process are interpreted."""

import os
import subprocess
import sys


def python(*arguments: object, **extra: str) -> str:
    """What ``python *arguments`` prints, its environment without ``TRITON_INTERPRET`` and with
    `extra`; it may not fail."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | extra
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout
