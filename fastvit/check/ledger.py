"""What a GPU has proven, held by the machine code that it ran.

`kernels/<op>/proven/<arch>.json` has an entry for each configuration of a kernel that was checked
and timed on a GPU: the configuration, the fingerprint of its machine code, and the proof (card,
triton, numerics, times). A fingerprint is the sha256 of the kernel's instructions as
``cuobjdump -sass`` prints them, one a line, without addresses, encodings and headers: so names,
line numbers and comments may change, and the code that runs may not. Compiled again offline, a
configuration is

proven        its machine code is what the GPU ran;
same source   it was compiled by another triton than the proof's, to what that one makes of the
              source that was proven: a fingerprint for each triton is recorded from that source, so
              that the ledger holds where only a newer triton is installed;
changed       it is not, and the entry's ``changed`` says why;
broken        it is not, and nobody said why. A test fails;
unknown       no fingerprint is recorded for this triton.

``python -m fastvit.check.ledger [CONFIGURATIONS]`` prints as JSON what the offline compiler makes
of them, by default of every entry's and then with verdicts, for sm_90. Needs a process without
``TRITON_INTERPRET=1``. A run on a GPU adds its proofs by `record`.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from fastvit import numerics
from fastvit.check import audit
from fastvit.check.audit import fingerprint
from fastvit.check.environment import environment
from fastvit.check.launches import recorded
from fastvit.kernels import _device
from fastvit.kernels._backend import describe, packed
from fastvit.kernels._launch import Prepared
from fastvit.kernels._spec import Case, OpSpec
from fastvit.kernels._tuning import TileConfig
from fastvit.kernels.attention.hopper_plan import LONG

ROWS = 1024  # of the matrices that stand for any number of them: no kernel is specialised on it

Configuration = Mapping[str, Any]


def ledger_path(op: str, arch: str = "sm90") -> Path:
    """Where one op's ledger lies."""
    return Path(_device.__file__).parent / op / "proven" / f"{arch}.json"


def entries(op: str, arch: str = "sm90") -> list[dict[str, Any]]:
    """Of one op's ledger."""
    path = ledger_path(op, arch)
    return json.loads(path.read_text())["entries"] if path.exists() else []


def all_entries() -> list[dict[str, Any]]:
    """Of every op's."""
    return [entry for op in _BUILDERS for entry in entries(op)]


def label(configuration: Configuration) -> str:
    """``linear pingpong 128x128x64 bfloat16 gelu bias``, ``attention head 1x12x197x64 float16``."""
    c = configuration
    sizes = c.get("tile") or [c[name] for name in "BHNMd" if name in c]
    words = (c["op"], c["variant"], "x".join(map(str, sizes)), c["dtype"], c.get("activation"))
    return " ".join(word for word in (*words, *c["operands"]) if word not in (None, "none"))


def record(path: Path, proven: Sequence[Mapping[str, Any]]) -> None:
    """Put entries into a ledger, perhaps a new one, each in the place of the one of the same
    configuration. A proof of the machine code that is recorded already keeps the other tritons'
    fingerprints; one of other machine code drops them, and ``changed``.

    Args:
        proven: each with ``configuration``, ``fingerprints`` and ``proof``.
    """
    held = json.loads(path.read_text()) if path.exists() else {"entries": []}
    for new in proven:
        old = next((e for e in held["entries"] if e["configuration"] == new["configuration"]), None)
        entry = {**new, "changed": None}
        if old is not None:
            held["entries"].remove(old)
            if new["fingerprints"].items() <= old["fingerprints"].items():
                entry["fingerprints"] = old["fingerprints"]
        held["entries"].append(entry)
    path.write_text(json.dumps(held, indent=1) + "\n")


def verdict(entry: Mapping[str, Any], triton: str, fingerprint: str) -> str:
    """One of the words of the module's docstring.

    Args:
        triton: version that made the machine code with `fingerprint`.
    """
    recorded = entry["fingerprints"].get(triton)
    if recorded is None:
        return "unknown"
    if recorded == fingerprint:
        return "proven" if triton == entry["proof"]["triton"] else "same source"
    return "changed" if entry.get("changed") else "broken"


def verdict_of(fingerprint: str, triton: str) -> str:
    """Of machine code that some kernel has: the verdict of an entry that it proves, else
    ``never proven``."""
    for entry in all_entries():
        if entry["fingerprints"].get(triton) == fingerprint:
            return verdict(entry, triton, fingerprint)
    return "never proven"


def state(*, compiling: bool = False) -> str:
    """The verdicts of all entries in a line.

    Args:
        compiling: entries that this machine has not compiled, by an audit or so, are now.
    """
    held = all_entries()
    proof = held[0]["proof"]
    line = f"{len(held)} configurations of Hopper's kernels were proven on {proof['card']}"
    line += f", triton {proof['triton']}; "
    if os.environ.get("TRITON_INTERPRET") == "1":
        return line + "TRITON_INTERPRET=1 compiles none"
    try:
        import triton
    except ImportError:
        return line + "triton is not installed"
    counts = Counter()
    for entry in held:
        with _offline():
            launch = audit.as_launch(*build(entry["configuration"]), "sm90")
            found = (audit.compile_launch if compiling else audit.compiled_before)(launch)
        known = found is not None and found.fingerprint
        word = verdict(entry, triton.__version__, known) if known else "not compared"
        counts[word] += 1
    verdicts = ", ".join(f"{count} {word}" for word, count in counts.items())
    hint = "; `fastvit audit --arch sm90` compares them" if counts["not compared"] else ""
    return f"{line}as triton {triton.__version__} compiles them now: {verdicts}{hint}"


# --------------------------------------------------------------------------- offline compile


def compile_offline(prepared: Prepared, arguments: Sequence[Any]) -> Any:
    """Triton's compiled kernel for sm_90, Gluon or not; no GPU is asked.

    Args:
        arguments: as `launches.recorded` gives them with `prepared`.
    """
    tile = prepared.tile
    with _offline():
        audit.use_target("sm90")
        return prepared.kernel.warmup(
            *arguments, grid=(1,), num_warps=tile.num_warps, num_stages=tile.num_stages
        )


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """A GPU's own driver comes back."""
    from triton.runtime import driver

    with mock.patch.object(driver, "_active", None):
        yield


def read(compiled: Any) -> dict[str, Any]:
    """Facts of a kernel's machine code: the fingerprint, warps, registers a thread, bytes of stack
    and of shared memory, spills inside loops, how often the opcodes of a Hopper kernel occur, and
    what ptxas warns of."""
    sass, usage = audit._disassemble(compiled.asm["cubin"])
    products, spills = audit.count_in_sass(sass, "[HQ]GMMA")
    found: dict[str, Any] = {
        "fingerprint": fingerprint(sass),
        "warps": compiled.metadata.num_warps,
        "registers": int(audit._find(r"REG:(\d+)", usage)),
        "stack": int(audit._find(r"STACK:(\d+)", usage)),
        "shared": compiled.metadata.shared,
        "loop_spills": spills,
        "GMMA": products,
        "warnings": _warnings(compiled.asm["ptx"]),
    }
    for opcode in ("UTMALDG", "UTMASTG"):
        found[opcode] = len(re.findall(rf"\b{opcode}\b", sass))
    return found


def _warnings(ptx: str) -> list[str]:
    """Among them that wgmma instructions are serialised (C7510)."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "kernel.ptx").write_text(ptx)
        done = subprocess.run(
            [tool, "-v", "--gpu-name=sm_90a", "kernel.ptx", "-o", "kernel.cubin"],
            cwd=folder, check=True, capture_output=True, text=True,
        )  # fmt: skip
    lines = (done.stdout + done.stderr).splitlines()
    return [line for line in lines if re.search(r"warning|C75\d\d|serializ", line, re.IGNORECASE)]


# --------------------------------------------------------------------------- configurations


def build(configuration: Configuration) -> tuple[Prepared, tuple[Any, ...]]:
    """The launch and stand-in arguments of a configuration, for `compile_offline`."""
    return _BUILDERS[configuration["op"]](configuration)


def _linear(configuration: Configuration) -> tuple[Prepared, tuple[Any, ...]]:
    """Of ``linear``, or of ``linear_fp8``, whose ``dtype`` is y's."""
    from fastvit.kernels.linear.hopper_plan import (
        E4M3,
        Variant,
        e4m3_activation,
        hopper_choice,
        prepare_hopper,
    )
    from fastvit.kernels.linear.launch import exact_activation

    dtype: torch.dtype = getattr(torch, configuration["dtype"])
    n, k = configuration["N"], configuration["K"]
    device, fp8 = torch.device("meta"), configuration["op"] == "linear_fp8"
    # in the order of the launch's tensors
    shapes: dict[str, tuple[int, ...]] = {"x": (ROWS, k), "weight": (n, k)}
    shapes |= {"factor": (n,)} if fp8 else {}
    shapes |= {"bias": (n,), "scale": (n,), "residual": (ROWS, n)}
    shapes |= {"y": (ROWS, n)} if fp8 else {"row_scale": (ROWS,), "y": (ROWS, n), "pre": (ROWS, n)}
    kinds: dict[str, torch.dtype] = {}
    kinds |= {"x": E4M3, "weight": E4M3, "factor": torch.float32} if fp8 else {}
    kinds |= {"bias": torch.bfloat16, "scale": torch.bfloat16} if fp8 else {}
    there = {"x", "weight", "factor", "y", *configuration["operands"]}
    metas, tensors = {}, {}
    for name, shape in shapes.items():
        kind = kinds.get(name) or dtype
        metas[name] = packed(kind, shape, device) if name in there else None
        tensors[name] = torch.empty(shape, dtype=kind, device=device) if name in there else None
    keep = "pre" in there
    tile = TileConfig(*configuration["tile"], backend=configuration["variant"])
    sides = metas["x"], metas["weight"], metas["residual"]
    choice = hopper_choice(*sides, metas.get("row_scale"), dtype, keep=keep, tile=tile)
    if not isinstance(choice, Variant) or choice.name != configuration["variant"]:
        raise ValueError(f"no such kernel: {configuration}: {choice}")
    inverse = 100.0 if dtype == E4M3 else None
    activation = exact_activation(configuration["activation"], dtype)
    activation = e4m3_activation(activation, metas["scale"], inverse)
    prepared = prepare_hopper(choice, *sides, activation, keep=keep, dtype=dtype, inverse=inverse)
    return prepared, prepared.for_triton(*tensors.values())


def _linear_backward(configuration: Configuration) -> tuple[Prepared, tuple[Any, ...]]:
    """Of G W, whose ``operands`` are "pre", "hidden" and "factor", or of G^T x, variant ``pieces``,
    perhaps with "sums"."""
    from fastvit.kernels.linear import hopper_backward_plan as plan
    from fastvit.kernels.linear.launch import exact_activation

    dtype: torch.dtype = getattr(torch, configuration["dtype"])
    n, k, there = configuration["N"], configuration["K"], configuration["operands"]
    name, tile = configuration["variant"], configuration["tile"][:2]

    def new(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    g, wide = new(ROWS, n), torch.float32
    if name == "pieces":
        x, choice = new(ROWS, k), plan.Pieces(*tile)
        of_g, of_x = describe(g, x)
        launches = plan.prepare_weight_product(choice, of_g, of_x)
        pieces = new(launches.slots, *choice, dtype=wide)
        sums = new(launches.slots, choice.block_n, dtype=wide) if "sums" in there else None
        return launches.product, launches.product.for_triton(g, x, pieces, sums)
    pre, hidden = (new(ROWS, k) if matrix in there else None for matrix in ("pre", "hidden"))
    form = plan.FORMS[len({"pre", "hidden"} & {*there})]
    choice = plan.input_variant_of(name, tile[0], tile[1], form)
    activation = exact_activation(configuration["activation"], dtype)
    of_g, of_weight, of_pre = describe(g, new(n, k), pre)
    prepared = plan.prepare_input_gradient(
        choice, of_g, of_weight, of_pre, activation, hidden=hidden is not None
    )
    sums = None if pre is None else new(plan.sum_parts(choice, ROWS), k, dtype=wide)
    factor = new(1, dtype=wide) if "factor" in there else None
    tensors = (g, new(n, k), pre, factor, new(ROWS, k), hidden, sums)
    return prepared, prepared.for_triton(*tensors)


def _attention(configuration: Configuration) -> tuple[Prepared, tuple[Any, ...]]:
    """Of packed qkv, or where ``operands`` has "separate" of q, k and v, with "e4m3" to that; M is
    N if it is not given. Variant ``whole`` is their gradients."""
    from fastvit.kernels.attention import hopper_plan as plan
    from fastvit.kernels.attention.launch import Options, problem_of

    dtype, operands = getattr(torch, configuration["dtype"]), configuration["operands"]
    b, h, n, d = (configuration[name] for name in "BHNd")
    m = configuration.get("M", n)
    shapes: dict[str, tuple[int, ...]] = {"q": (b, n, 3 * h * d), "out": (b, n, h, d)}
    if "separate" in operands:
        shapes |= {"q": (b, h, n, d), "k": (b, h, m, d), "v": (b, h, m, d)}
    shapes |= {"mask": (1, h, n, m)} if {"bias", "bool mask"} & {*operands} else {}
    name = configuration["variant"]
    gradients = {f"d{x}": shapes.get(x, shapes["q"]) for x in "qkv"} if name == "whole" else {}
    shapes |= {"kept": (2, b, h, n)} if gradients or "statistics" in operands else {}
    shapes |= {"grad": shapes["out"]} | gradients if gradients else {}
    kinds = {"mask": torch.bool if "bool mask" in operands else torch.float32}
    kinds["kept"] = torch.float32
    kinds |= {"out": torch.float8_e4m3fn} if "e4m3" in operands else {}
    device = torch.device("meta")
    tensors = {
        x: torch.empty(s, dtype=kinds.get(x, dtype), device=device) for x, s in shapes.items()
    }
    order = ("q", "k", "v", "mask", "cos", "sin", "cu_seqlens")
    metas = describe(*(tensors.get(x) for x in order))
    q, k, v, mask, *_ = metas
    assert q is not None
    options = Options(h, 0, d**-0.5, half=False, out_scale=0.01 if "e4m3" in operands else None)
    problem = problem_of(metas, options, "highest")
    tile = TileConfig(64, configuration.get("block", 128), backend=name)
    grad, out = describe(tensors.get("grad"), tensors["out"])
    if gradients:
        choice = plan.backward_choice(problem, metas, grad, out, (True,) * 3)
        order = (*order, "grad", "out", "kept", *gradients)
    else:
        choice = plan.hopper_choice(problem, q, k, v, mask, tile)
        order = (*order, "out", "kept")
    if isinstance(choice, str) or choice.name != name:
        raise ValueError(f"no such kernel: {configuration}: {choice}")
    prepared = (
        plan.prepare_whole(choice, problem, k, grad) if isinstance(choice, plan.Whole)
        else plan.prepare_hopper(choice, problem, k, mask, keep="kept" in shapes)
    )  # fmt: skip
    return prepared, prepared.for_triton(*(tensors.get(x) for x in order))


# those of ``linear_backward`` stand among linear's own
_BUILDERS = {
    "linear": _linear, "linear_backward": _linear_backward, "linear_fp8": _linear,
    "attention": _attention,
}  # fmt: skip


# --------------------------------------------------------------------------- proofs

WITH_GRADIENTS = ("linear", "norm_mlp")  # ops whose gradients are several kernels


def configuration_of(
    spec: OpSpec, case: Case, dtype: torch.dtype, device: str = "cpu", *, backward: bool = False
) -> dict[str, Any] | None:
    """Of the kernel that `case` of ``linear`` or an attention launches, or its gradients; None if
    that is not one of Hopper's alone, or has a mask, whose strides and dtype no configuration
    holds."""
    launch = _recorded(spec, case, dtype, device, backward=backward)
    tile = None if launch is None else launch[0].tile
    inputs, sizes = spec.inputs(case, dtype, device, seed=None), case.sizes
    if tile is None or not tile.backend or inputs.get("attn_mask") is not None:
        return None
    common = {"op": spec.name, "variant": tile.backend, "dtype": str(dtype).removeprefix("torch.")}
    if spec.name == "linear":
        operands = [n for n in ("bias", "scale", "residual") if inputs.get(n) is not None]
        return common | {
            "tile": [tile.BLOCK_M, tile.BLOCK_N, tile.BLOCK_K], "operands": operands,
            "activation": inputs["activation"] or "none", "N": sizes["N"], "K": sizes["K"],
        }  # fmt: skip
    more = {"M": sizes["M"]} if sizes["M"] != sizes["N"] else {}
    if tile.backend in LONG and tile.BLOCK_N != 128:
        more["block"] = tile.BLOCK_N
    return common | {
        "op": "attention", "operands": ["separate"] * ("k" in inputs) + ["e4m3"] * spec.fp8,
        **{name: sizes[name] for name in "BHNd"}, **more,
    }  # fmt: skip


def _recorded(
    spec: OpSpec, case: Case, dtype: torch.dtype, device: str, *, backward: bool
) -> tuple[Prepared, tuple[Any, ...]] | None:
    with recorded() as found:
        _results(spec, spec.inputs(case, dtype, device, seed=None), backward=backward)
    wanted = found[int(backward) :]  # after the forward
    return wanted[0] if len(wanted) == 1 else None


def _results(spec: OpSpec, inputs: dict[str, Any], *, backward: bool) -> tuple[Tensor, ...]:
    """The output, or the gradients of all tensors."""
    with torch.set_grad_enabled(backward):
        tensors = [x for x in inputs.values() if isinstance(x, Tensor) and x.is_floating_point()]
        leaves = [x.requires_grad_() for x in tensors if backward]
        y = spec.op(**inputs)
        return torch.autograd.grad(y, leaves, y.detach()) if backward else (y,)


def gradients_of(
    spec: OpSpec, case: Case, dtype: torch.dtype, device: str = "cpu"
) -> list[tuple[Configuration, tuple[Prepared, tuple[Any, ...]]]]:
    """Of Hopper's kernels among those that the gradients of ``linear`` or an MLP launch."""
    with recorded() as found:
        _results(spec, spec.inputs(case, dtype, device, seed=None), backward=True)
    of: dict[str, Any] = {}
    for prepared, arguments in found:
        name, tile, grad = prepared.kernel.fn.__name__, prepared.tile, arguments[0]
        if name == "hopper_weight_product_kernel":
            operands = ["sums"] * (arguments[3] is not None)
            n, k, activation = grad.shape[1], arguments[1].shape[1], "none"
        elif name == "hopper_input_gradient_kernel":
            pairs = zip(("pre", "hidden", "factor"), (*arguments[3:5], arguments[6]), strict=True)
            operands = [operand for operand, given in pairs if given is not None]
            n, k, activation = arguments[8:11]
        else:
            continue
        configuration = {
            "op": "linear_backward", "variant": tile.backend,
            "tile": [tile.BLOCK_M, tile.BLOCK_N, tile.BLOCK_K],
            "dtype": str(dtype).removeprefix("torch."), "operands": operands,
            "activation": activation.removesuffix("_polynomial"), "N": n, "K": k,
        }  # fmt: skip
        of.setdefault(json.dumps(configuration), (configuration, (prepared, arguments)))
    return list(of.values())


def prove(
    spec: OpSpec, case: Case, dtype: torch.dtype, device: str = "cuda", seed: int = 0, *,
    backward: bool = False,
) -> list[dict[str, Any]]:  # fmt: skip
    """Entries for the ledger, from this machine's GPU: one, as `configuration_of`, or one for each
    of `gradients_of`.

    Raises:
        ValueError: a configuration does not give the machine code that ran.
    """
    if backward and spec.name in WITH_GRADIENTS:
        held = gradients_of(spec, case, dtype, device)
    else:
        configuration = configuration_of(spec, case, dtype, device, backward=backward)
        launch = _recorded(spec, case, dtype, device, backward=backward)
        held = [] if configuration is None or launch is None else [(configuration, launch)]
    if not held:
        return []
    for configuration, launch in held:
        with _offline():
            ran, rebuilt = (
                audit.as_launch(*x, "sm90").key() for x in (launch, build(configuration))
            )
        if ran != rebuilt:
            raise ValueError(f"{label(configuration)} is not all there is to know of it")
    report = numerics.compare_case(spec, case, dtype, backward=backward, device=device, seed=seed)
    inputs = spec.inputs(case, dtype, device, seed)
    one, other = (_results(spec, inputs, backward=backward) for _ in range(2))
    same = all(map(torch.equal, one, other))
    facts = environment()
    checks = [
        {
            **case.sizes, "of": row.name, "inputs": "random", "truth": "float64", "seed": seed,
            **{name: value for name, value in vars(row).items() if name.endswith("error")},
            "same_bits": same, "passed": row.passed and same,
        }
        for row in report.rows[int(backward) :]
    ]  # fmt: skip
    proof = {
        "card": facts["gpu"], "date": facts["date"][:10], "torch": facts["torch"],
        "triton": facts["triton"], "commit": facts["git_commit"], "numerics": checks,
        "source": "the product's kernel, by benchmarks/gpu.py; not timed there", "times": [],
    }  # fmt: skip
    prints = [read(compile_offline(*launch))["fingerprint"] for _, launch in held]
    return [
        {"configuration": c, "fingerprints": {facts["triton"]: found}, "proof": proof}
        for (c, _), found in zip(held, prints, strict=True)
    ]


def main(arguments: Sequence[str]) -> None:
    """Print, as JSON, what this process's triton makes of the configurations in `arguments` (a JSON
    list), or of all entries and whether each is as proven."""
    import triton

    held = [] if arguments else all_entries()
    configurations = json.loads(arguments[0]) if arguments else [e["configuration"] for e in held]
    facts = [read(compile_offline(*build(c))) for c in configurations]
    verdicts = {
        label(entry["configuration"]): verdict(entry, triton.__version__, found["fingerprint"])
        for entry, found in zip(held, facts, strict=bool(held))
    }
    print(json.dumps({"triton": triton.__version__, "verdicts": verdicts, "facts": facts}))


if __name__ == "__main__":
    main(sys.argv[1:])
