"""The ledger: the machine code that a GPU ran is what the source still makes. Kernels are compiled
in processes of their own, since those of this one are interpreted."""

from __future__ import annotations

import functools
import json
import os
from collections import Counter
from types import SimpleNamespace
from typing import Any

import fresh
import pytest
import torch
import triton

from fastvit.check import ledger
from fastvit.check.ledger import entries, fingerprint, label, ledger_path, record, verdict
from fastvit.kernels.specs import all_specs

LINEAR, FP8, ATTENTION = entries("linear"), entries("linear_fp8"), entries("attention")
ENTRIES = LINEAR + FP8 + ATTENTION
# a folder that `pip install --no-deps --target FOLDER triton==3.6.0` has filled
TRITON_3_6 = os.environ.get("FASTVIT_TRITON36", "")
OLDER = pytest.param(
    TRITON_3_6, marks=pytest.mark.skipif(not TRITON_3_6, reason="FASTVIT_TRITON36 names no triton")
)


@functools.cache
def compiled(configurations: str = "", folder: str = "") -> dict[str, Any]:
    """What ``python -m fastvit.check.ledger`` prints, with the triton of `folder` if given."""
    given = [configurations] if configurations else []
    path = os.pathsep.join([folder, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    extra = {"PYTHONPATH": path} if folder else {}
    return json.loads(fresh.python("-m", "fastvit.check.ledger", *given, **extra))


@pytest.mark.parametrize("folder", ["", OLDER])
def test_what_was_proven_has_not_changed(folder):
    found = compiled(folder=folder)
    verdicts = [found["verdicts"][label(entry["configuration"])] for entry in ENTRIES]
    if found["triton"] not in ENTRIES[0]["fingerprints"]:
        pytest.skip(f"no fingerprint for triton {found['triton']}")
    assert not set(verdicts) & {"broken", "unknown"}, verdicts
    if folder:
        assert found["triton"] == "3.6.0"
    assert all(v == "changed" for e, v in zip(ENTRIES, verdicts, strict=True) if e["changed"])
    check([entry["configuration"] for entry in ENTRIES], found)


def test_every_entry_was_right_and_says_where():
    assert len(LINEAR) >= 6
    assert len(FP8) >= 4
    assert len(ATTENTION) >= 10
    for entry in ENTRIES:
        proof = entry["proof"]
        assert proof["card"]
        assert proof["triton"] in entry["fingerprints"]
        assert proof["numerics"]
        assert all(case["passed"] and case["same_bits"] for case in proof["numerics"])
        assert proof["times"] or "not timed" in proof["source"]
    configurations = [json.dumps(entry["configuration"]) for entry in ENTRIES]
    assert len({*configurations}) == len(configurations)


LISTING = """
        code for sm_90a
                Function : {name}
        .headerflags    @"EF_CUDA_TEXMODE_UNIFIED"
        /*0000*/                   {first} ;   /* 0x00000a00ff017b82 */
                                               /* 0x000fe20000000800 */
        /*0010*/              @!P0 BRA 0x20 ;  /* {encoding} */
"""


def test_a_fingerprint_is_of_instructions_only():
    listing = LISTING.format(name="a", first="LDC R1, c[0x0][0x28]", encoding="0x1")
    same = LISTING.format(name="b", first="LDC R1, c[0x0][0x28]", encoding="0x2")
    other = LISTING.format(name="a", first="LDC R1, c[0x0][0x2c]", encoding="0x1")
    assert fingerprint(listing) == fingerprint(same) != fingerprint(other)
    with pytest.raises(ValueError, match="no instruction"):
        fingerprint("code for sm_90a")


def test_verdicts():
    entry: dict[str, Any] = {
        "fingerprints": {"3.6.0": "a", "3.7.1": "b"}, "proof": {"triton": "3.6.0"},
    }  # fmt: skip
    assert verdict(entry, "3.6.0", "a") == "proven"
    assert verdict(entry, "3.7.1", "b") == "same source"
    assert verdict(entry, "3.6.0", "b") == "broken"
    assert verdict({**entry, "changed": "a mask less"}, "3.7.1", "c") == "changed"
    assert verdict(entry, "3.8.0", "a") == "unknown"


STATE = """
from types import SimpleNamespace
from fastvit.check import audit, ledger
first, *rest = ledger.all_entries()
ledger.all_entries = lambda: [first]
print(ledger.state())
print(ledger.state(compiling=True))
print(ledger.state())
audit.compiled_before = lambda launch: SimpleNamespace(fingerprint="another")
print(ledger.state())
print(ledger.verdict_of("another", "3.7.1"))
"""


def test_the_state_in_a_line(tmp_path):
    """What `doctor` and `audit` print: nothing is compiled but where that is asked for."""
    if triton.__version__ not in ENTRIES[0]["fingerprints"]:
        pytest.skip("no fingerprint for this triton")
    printed = fresh.python("-c", STATE, FASTVIT_CACHE=str(tmp_path))
    before, now, after, other, unheard = printed.splitlines()
    assert "1 not compared" in before
    assert now.endswith(("1 proven", "1 same source"))
    assert after == now
    assert other.endswith("1 broken")
    assert unheard == "never proven"
    assert "TRITON_INTERPRET=1" in ledger.state()


PROVABLE = """
import torch
from fastvit.check import audit, ledger
from fastvit.kernels.specs import all_specs
for spec in all_specs().values():
    for case in spec.gpu_cases * (spec.name != "fp8_linear"):
        for dtype in (torch.bfloat16, torch.float16):
            half = dtype == torch.bfloat16 and spec.name.startswith("attention")
            for backward in (False, True)[: 1 + half]:  # the other dtype's differs in nothing
                c = ledger.configuration_of(spec, case, dtype, backward=backward)
                if c is not None:
                    ran = ledger._recorded(spec, case, dtype, "cpu", backward=backward)
                    ran = audit.as_launch(*ran, "sm90")
                    assert ran.key() == audit.as_launch(*ledger.build(c), "sm90").key(), c
                print(spec.name + " gradients" * backward, c and c["variant"])
            if spec.name in ledger.WITH_GRADIENTS:
                for c, ran in ledger.gradients_of(spec, case, dtype):
                    ran = audit.as_launch(*ran, "sm90")
                    assert ran.key() == audit.as_launch(*ledger.build(c), "sm90").key(), c
                    print(spec.name + " gradients", c["variant"], *c["operands"])
"""


def test_a_case_for_a_gpu_has_a_configuration():
    """From which the same machine code comes; only masks have none."""
    found = Counter(fresh.python("-c", PROVABLE, FASTVIT_BACKEND="auto").splitlines())
    assert found["attention None"] == 4  # bool mask, bias
    assert found["linear pingpong"] == 10
    assert found["linear coop"] == 2
    assert found["attention_qkv stay"] == 2
    assert found["attention_qkv gradients whole"] == 4
    assert found["attention gradients whole"] == 2
    assert found["fp8_attention roles"] == 8
    assert found["linear gradients pingpong"] == 10
    assert found["linear gradients pingpong factor"] == 2  # LayerScale in float16
    assert found["norm_mlp gradients coop pre hidden"] == 3
    assert found["norm_mlp gradients pieces sums"] == 2
    assert "linear None" not in found


def test_a_proof_says_what_it_is_of(monkeypatch):
    """What a GPU would run and compile is stood in for here; numerics are real."""
    spec = all_specs()["linear"]
    case = min(spec.gpu_cases, key=lambda case: spec.bytes(case.sizes, 2))
    monkeypatch.setattr(ledger, "compile_offline", lambda *launch: None)
    monkeypatch.setattr(ledger, "read", lambda compiled: {"fingerprint": "of it"})
    monkeypatch.setattr(ledger.audit, "as_launch", lambda *launch: SimpleNamespace(key=str))
    (entry,) = ledger.prove(spec, case, torch.bfloat16, "cpu", seed=3)
    assert label(entry["configuration"]).startswith("linear pingpong 64x128x64 bfloat16")
    (check,) = entry["proof"]["numerics"]
    assert check["passed"]
    assert check["M"] == 1000
    assert 0 < check["max_error"] <= check["eager_max_error"]
    assert [*entry["fingerprints"].values()] == ["of it"]


def test_a_run_on_a_gpu_adds_its_proofs(tmp_path):
    path = tmp_path / "sm90.json"
    path.write_text(ledger_path("linear").read_text())
    first, second = LINEAR[:2]
    tritons = first["proof"]["triton"], "3.7.1"
    again = {**first, "fingerprints": {tritons[0]: first["fingerprints"][tritons[0]]}}
    other = {**second, "fingerprints": {tritons[0]: "another"}, "changed": "no longer"}
    new = {**first, "configuration": {**first["configuration"], "dtype": "float16"}}
    record(tmp_path / "new.json", [new])
    assert json.loads((tmp_path / "new.json").read_text())["entries"] == [{**new, "changed": None}]
    record(path, [again, other, new])
    held = json.loads(path.read_text())["entries"]
    assert len(held) == len(LINEAR) + 1
    assert first in held
    assert {**other, "changed": None} in held
    assert second not in held
    assert new in held


# --------------------------------------------------------------------------- every form


def linear(variant: str, tile: tuple[int, int], activation: str, *operands: str, **other: Any):
    return {
        "op": "linear", "variant": variant, "tile": [*tile, 64], "dtype": "bfloat16",
        "activation": activation, "operands": operands, "N": 768, "K": 768, **other,
    }  # fmt: skip


ALL = ("bias", "scale", "residual")
FORMS = [
    linear("pingpong", (128, 128), "silu", "bias", "pre", dtype="float16"),
    linear("pingpong", (64, 64), "none", *ALL, "row_scale", N=1000, K=200),
    linear("coop", (128, 256), "none", *ALL, N=1000, K=3072),
]
FORMS += [
    linear("pingpong", tile, activation, *operands, dtype=dtype, N=n, K=n)
    for tile in ((128, 128), (64, 128), (64, 64))
    for activation, operands, dtype, n in (
        ("none", (), "bfloat16", 4304),
        ("gelu", ("bias",), "bfloat16", 1000),
        ("gelu_tanh", ("bias", "pre"), "bfloat16", 768),
        ("quick_gelu", (*ALL, "row_scale"), "bfloat16", 1000),
        ("silu", ("bias", "pre", "scale", "row_scale"), "float16", 1000),
        ("relu", ALL, "float16", 768),
    )
] + [
    linear("pingpong", (128, 128), "gelu", "bias", "pre", dtype="float16"),
    linear("coop", (128, 256), "gelu", "bias", K=3072),
    linear("coop", (128, 256), "gelu", "bias", "pre", K=3072, dtype="float16"),
    linear("coop", (128, 256), "gelu", *ALL, K=3072, dtype="float16"),
]


def gradient(variant: str, tile: tuple[int, int], activation: str, *operands: str, **other: Any):
    return linear(variant, tile, activation, *operands, **other) | {"op": "linear_backward"}


SLOPE, HIDDEN = ("pre",), ("pre", "hidden")
FORMS += [
    gradient("coop", (128, 256), "gelu", *HIDDEN, "factor", dtype="float16"),
    gradient("pingpong", (64, 64), "none", "factor", dtype="float16", N=1000, K=200),
    gradient("pieces", (128, 256), "none", "sums", dtype="float16", N=1000, K=200),
]
FORMS += [
    *(
        gradient(*tile, activation, *operands, *factor, dtype=dtype, N=n, K=n)
        for dtype, n, factor in (("bfloat16", 1000, ()), ("float16", 768, ("factor",)))
        for activation in ("gelu", "gelu_tanh", "quick_gelu", "silu", "relu")
        for tile, operands in (
            (("pingpong", (128, 128)), SLOPE), (("pingpong", (64, 128)), SLOPE),
            (("coop", (128, 256)), HIDDEN),
        )
        # erf leaves too few registers, `hopper_backward_plan.input_choice`
        if (activation, dtype, tile[1]) != ("gelu", "float16", (128, 128))
    ),
    *(gradient("pingpong", tile, "none", N=1000, K=1000) for tile in ((64, 64), (64, 128))),
    gradient("pieces", (256, 128), "none", dtype="float16", N=1000, K=200),
]  # fmt: skip


def fp8(variant: str, tile: tuple[int, int], activation: str, *operands: str, **other: Any):
    half = linear(variant, tile, activation, *operands, **other)
    return half | {"op": "linear_fp8", "tile": [*tile, 128]}


E4M3 = "float8_e4m3fn"
FORMS += [fp8("pingpong", (64, 64), "gelu_tanh", "bias", dtype=E4M3, N=1008, K=208)]
FORMS += [
    *(
        fp8("pingpong", tile, activation, *operands, dtype=dtype, N=n, K=n)
        for tile in ((128, 128), (64, 128), (64, 64))
        for activation, operands, dtype, n in (
            ("none", ("bias",), "bfloat16", 4304),
            ("gelu", ALL, "bfloat16", 1008),
            ("gelu", ("bias",), E4M3, 1408),
            ("gelu", ("bias", "scale"), E4M3, 1408),
            ("quick_gelu", ("bias",), E4M3, 1008),
            ("none", ("bias", "residual"), "float16", 768),
        )
    ),
    fp8("coop", (128, 256), "none", *ALL, K=4096, N=1024),
]


def attention(variant: str, n: int, d: int, *operands: str, b: int = 64, **other: Any):
    return {
        "op": "attention", "variant": variant, "dtype": "bfloat16", "operands": operands, "B": b,
        "H": 12, "N": n, "d": d, **other,
    }  # fmt: skip


KEPT = "statistics"
FORMS += [
    attention("roles", 197, 64, KEPT, "separate", dtype="float16"),
    attention("head", 224, 48, KEPT, "separate", b=1),
    attention("stream", 600, 88, KEPT, "separate", M=333),
    attention("stay", 257, 80, KEPT, "bool mask", dtype="float16"),
    attention("whole", 208, 48, "separate", dtype="float16"),
    attention("whole", 50, 64),
    attention("roles", 197, 64, "e4m3", "separate", dtype="float16"),
    attention("stay", 257, 72, "e4m3", "bias"),
]
FORMS += [
    *(attention("roles", n, 64, *kept) for n in (1, 100, 224, 257, 272) for kept in ((), (KEPT,))),
    *(attention("roles", 200, d, KEPT, M=m) for d, m in ((32, 100), (40, 200))),
    *(attention("head", n, 64, KEPT, b=1) for n in (16, 130, 208)),
    *(
        attention("whole", n, 64, *operands, dtype=dtype)
        for n in (16, 80, 128, 144, 192, 208)
        for operands in ((), ("separate",))
        for dtype in ("bfloat16", "float16")
    ),
    attention("whole", 80, 40, "separate", M=256),
    *(
        attention(variant, 577, d, *operands)
        for variant in ("stream", "stay")
        for d in (32, 64, 72, 80)
        for operands in ((KEPT,), (KEPT, "bias"), (KEPT, "bool mask"))
    ),
    *(
        attention("stream", n, d, KEPT, *operands, block=64)
        for n, d in ((1370, 104), (744, 128))
        for operands in ((), ("bias",), ("separate",))
    ),
    attention("stream", 100, 104, KEPT, "separate"),
    attention("stream", 577, 88, KEPT),
    attention("stay", 257, 88, KEPT, "bias"),
    attention("stay", 257, 128, KEPT, block=64),
    attention("stream-turns", 577, 64, KEPT),
    attention("stream-turns", 577, 128, "bias"),
    attention("stay-turns", 256, 72, KEPT, "bias", dtype="float16"),
    *(attention("roles", n, 64, "e4m3") for n in (50, 257, 272)),
    attention("roles", 200, 32, "e4m3", M=100),
    attention("head", 197, 64, "e4m3", b=1),
    *(
        attention(variant, 577, d, "e4m3", *mask)
        for variant in ("stream", "stay")
        for d, mask in ((32, ()), (64, ()), (80, ("bool mask",)))
    ),
    attention("stream", 1370, 104, "e4m3", block=64),
    attention("stream", 744, 128, "e4m3", "bias", block=64),
    attention("stay-turns", 256, 72, "e4m3", "bias", dtype="float16"),
]


def check(configurations: list[dict[str, Any]], found: dict[str, Any]) -> None:
    """A Hopper kernel worth its name: nothing spills, and the tensor cores and the tensor memory
    accelerator are at work; attention's output and pieces of a weight's gradient leave from
    registers."""
    for configuration, facts in zip(configurations, found["facts"], strict=True):
        assert facts["stack"] == facts["loop_spills"] == 0, (label(configuration), facts)
        # of 8 warps a limit of 256 registers a thread, which is none
        assert [w for w in facts["warnings"] if "Too many maxnreg" not in w] == []
        assert facts["shared"] <= 232_448
        assert facts["registers"] * 32 * facts["warps"] <= 65_536
        assert min(facts["GMMA"], facts["UTMALDG"]) > 0
        stored = configuration["op"].startswith("linear") or configuration["variant"] == "whole"
        assert bool(facts["UTMASTG"]) == (stored and configuration["variant"] != "pieces")


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["", OLDER])
def test_every_form_compiles_well(folder):
    check(FORMS, compiled(json.dumps(FORMS), folder))
