"""`fastvit bench host`: what a forward costs the host."""

import json

import fresh
from typer.testing import CliRunner

from fastvit.bench.host import count_calls
from fastvit.cli.main import app

NAME = "vit_tiny_patch16_224"


def measured(*options):
    """In a process whose kernels are not interpreted."""
    return fresh.python("-m", "fastvit.cli.main", "bench", "host", *options)


def test_ours_costs_the_host_no_more_calls_than_timms():
    found = json.loads(measured(NAME, "--json"))
    ours, theirs = found["ours"], found["theirs"]
    assert 0 < ours["calls"] <= theirs["calls"]
    # each block's norms, linears and attention; patch embedding and its prefix, last norm, head
    assert ours["launches"] == 12 * 7 + 4
    assert ours["launches"] < theirs["launches"]
    assert ours["us"] > 0
    assert theirs["us"] > 0


def test_the_table_has_a_row_for_each():
    out = measured(NAME, "--batch", "2")
    assert f"{NAME}, 2" in out
    assert "fastvit" in out
    assert "timm" in out


def test_calls_are_counted():
    def leaf():
        return 1

    def three():
        return leaf() + leaf()

    assert count_calls(three) == 2
    assert count_calls(lambda: len([1])) == 0  # a call in C is none of Python's


def test_interpreted_kernels_and_wrong_names_are_refused():
    result = CliRunner().invoke(app, ["bench", "host", NAME])
    assert result.exit_code == 2
    assert "TRITON_INTERPRET" in result.output
