"""Seeds of what tests draw: the same in every run, so that a tree has one verdict; fresh ones, with
a number that brings them back, under FASTVIT_TEST_SEED=fresh, as in `make test-slow`."""

import os
import random

if os.environ.setdefault("FASTVIT_TEST_SEED", "0") == "fresh":
    # in the environment, where the processes of pytest-xdist find the same one
    os.environ["FASTVIT_TEST_SEED"] = str(random.SystemRandom().randrange(2**31))
SEED = int(os.environ["FASTVIT_TEST_SEED"])

_stream = random.Random(SEED)


def start(test: str) -> None:
    """What a test draws depends on `SEED` and its name, not on what ran before it."""
    _stream.seed(f"{SEED} {test}")


def draw() -> int:
    """The next seed of this test."""
    return _stream.randrange(2**31)
