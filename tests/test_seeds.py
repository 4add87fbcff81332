"""Seeds of the tests themselves: fixed unless fresh ones are asked for."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import seeds


def seed_under(value: str | None) -> int:
    """`seeds.SEED` of a process with that setting."""
    environment = {name: text for name, text in os.environ.items() if name != "FASTVIT_TEST_SEED"}
    if value is not None:
        environment["FASTVIT_TEST_SEED"] = value
    done = subprocess.run(
        [sys.executable, "-c", "import seeds; print(seeds.SEED)"],
        cwd=Path(__file__).parent / "helpers",
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return int(done.stdout)


def test_one_seed_unless_fresh_ones_are_asked_for():
    assert seed_under(None) == seed_under(None) == 0
    assert seed_under("17") == 17
    assert seed_under("fresh") != seed_under("fresh")


def test_what_a_test_draws_depends_on_its_name_alone(request: pytest.FixtureRequest):
    own = seeds.draw(), seeds.draw()
    assert own[0] != own[1]
    seeds.start("another")
    other = seeds.draw(), seeds.draw()
    assert not {*own} & {*other}
    seeds.start(request.node.nodeid)
    assert (seeds.draw(), seeds.draw()) == own
