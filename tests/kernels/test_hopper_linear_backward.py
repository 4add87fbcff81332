"""Hopper's gradients of a linear without a GPU: their sources on a model of a multiprocessor, the
schedule of pieces, ops' gradients through both, who is given them, what runs where they cannot.
`test_ledger.py` compiles them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import fresh
import gluon_sim as sim
import numpy as np
import pytest
import torch
from seeds import SEED

from fastvit import ops
from fastvit.check.launches import recorded
from fastvit.kernels import _backend, _device, _hopper, _launch
from fastvit.kernels._backend import packed
from fastvit.kernels.linear import hopper_backward_plan as plan
from fastvit.kernels.linear.reference import linear_reference
from fastvit.kernels.mlp.reference import mlp_reference
from fastvit.kernels.norm_linear.reference import norm_linear_reference
from fastvit.kernels.specs import all_specs
from fastvit.numerics import compare

ROOT = Path(__file__).parents[2] / "kernels"
FILES = tuple(
    ROOT / name
    for name in (
        "_activations.py", "attention/hopper_parts.py", "linear/hopper_parts.py",
        "linear/hopper_backward.py",
    )
)  # fmt: skip
SMALLER = 8  # tiles of the simulation of G W: protocols do not depend on their size
TILES = [
    ("pingpong", 128, 128, "plain"), ("pingpong", 64, 128, "plain"), ("pingpong", 64, 64, "plain"),
    ("pingpong", 128, 128, "slope"), ("pingpong", 64, 128, "slope"),
    ("coop", 128, 256, "plain"), ("coop", 128, 256, "slope"), ("coop", 128, 256, "hidden"),
]  # fmt: skip
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def space() -> dict[str, Any]:
    return sim.load(*FILES)


def integers(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).integers(-3, 4, shape).astype(float)


def once(name: str, given: Any) -> None:
    if not (given.writes == 1).all():
        raise sim.Wrong(f"an element of {name} not written exactly once")


def equal(name: str, got: np.ndarray, want: np.ndarray) -> None:
    if not np.array_equal(got, want):
        raise sim.Wrong(f"wrong {name}")


def simulate_input(
    space: dict[str, Any], tile: tuple[str, int, int, str], m: int, n: int, k: int, programs: int,
    seed: int, *, factor: bool = False, smaller: int = SMALLER,
) -> None:  # fmt: skip
    """One launch of small integers, with the slope of relu; raises where anything is wrong."""
    v, form = plan.input_variant_of(*tile), tile[3]
    dtype = torch.bfloat16
    band, block = (v.rows // smaller, v.cols // smaller), plan.BLOCK // smaller
    columns = v.block_n // smaller
    g, weight, pre = integers(seed, m, n), integers(seed, n, k), integers(seed, m, k)
    out, hidden = (sim.Descriptor(np.full((m, k), np.nan), band, dtype) for _ in range(2))
    parts = -(-m * smaller // v.block_m) * (v.block_m // v.rows)
    sums = sim.Pointer(np.full(parts * k, np.nan))
    plain = form == "plain"
    args = (
        sim.Descriptor(g, (band[0], block), dtype), sim.Descriptor(weight, (block, columns), dtype),
        out, None if plain else sim.Descriptor(pre, band, dtype),
        hidden if form == "hidden" else None, None if plain else sums,
        sim.Pointer(np.full(1, 2.0)) if factor else None, m, n, k, "none" if plain else "relu",
        v.name == "pingpong", 2, v.stages, v.bufs, 0, 0,
    )  # fmt: skip
    tiles = -(-m * smaller // v.block_m) * -(-k // columns)
    kernel = space["hopper_input_gradient_kernel"]
    sim.run(kernel, args, warps=4, programs=min(programs, tiles), seed=seed)
    want = (g @ weight) * (1 + factor)
    once("out", out)
    if not plain:
        want = want * (pre > 0)
        once("sums", sums)
        rows = np.zeros((parts * band[0], k))
        rows[:m] = want
        equal("sums", sums.array.reshape(parts, k), rows.reshape(parts, -1, k).sum(1))
    equal("out", out.array, want)
    if form == "hidden":
        once("hidden", hidden)
        equal("hidden", hidden.array, np.maximum(pre, 0))


def input_shapes(tile: tuple[str, int, int, str], seed: int) -> list[tuple[int, ...]]:
    """M, N, K and blocks, of smaller tiles: one row, one tile, tails of all three, an odd and a
    large count of tiles, fewer steps than slots and many more."""
    v = plan.input_variant_of(*tile)
    bm, bk, bn = v.block_m // SMALLER, v.block_n // SMALLER, plan.BLOCK // SMALLER
    draw = random.Random(seed)
    return [
        (1, 3 * bn, 1, 1),
        (bm, bn, bk, 4),
        (2 * bm + 1, (v.stages + 1) * bn + 5, bk - 3, 1),
        (5 * bm - 1, 3 * bn + 1, 2 * bk + 1, 3),
        (bm * draw.randint(5, 9), draw.randint(1, 99), bk + draw.randint(1, bk), 2),
    ]


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_the_protocol_of_the_input_gradient_holds(space, tile):
    for seed, shape in enumerate(input_shapes(tile, SEED)):
        simulate_input(space, tile, *shape, seed=seed, factor=seed == 3)


@pytest.mark.slow
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_the_protocol_of_the_input_gradient_holds_at_length(space, tile):
    for seed in range(3, 27):
        for shape in input_shapes(tile, seed):
            simulate_input(space, tile, *shape, seed=seed)
    simulate_input(space, tile, 391, 456, 520, 3, seed=5, smaller=1)


def simulate_weight(
    space: dict[str, Any], choice: plan.Pieces, m: int, n: int, k: int, programs: int, seed: int,
    *, sums: bool,
) -> None:  # fmt: skip
    """One launch of small integers, on real tiles."""
    g, x = integers(seed, m, n), integers(seed, m, k)
    tiles_n, tiles_k = -(-n // choice.block_n), -(-k // choice.block_k)
    work = plan.schedule(tiles_n, tiles_k, -(-m // plan.BLOCK), programs)
    table = plan.tabulate(work, tiles_n, tiles_k, -(-m // plan.BLOCK))
    width = 1 + max(map(len, table.rows))
    numbers = np.zeros((programs, width), int)
    for row, pieces in zip(numbers, table.rows, strict=True):
        row[: 1 + len(pieces)] = [len(pieces) // plan.PIECE, *pieces]
    slots = table.starts[-1]
    pieces = sim.Pointer(np.full(slots * choice.block_n * choice.block_k, np.nan))
    of_pieces = sim.Pointer(np.full(slots * choice.block_n, np.nan)) if sums else None
    args = (
        sim.Descriptor(g, (plan.BLOCK, choice.rows), torch.bfloat16),
        sim.Descriptor(x, (plan.BLOCK, choice.block_k), torch.bfloat16),
        pieces, of_pieces, sim.Pointer(numbers.reshape(-1)), width, plan.PIECE_STAGES, 0, 0,
    )  # fmt: skip
    kernel = space["hopper_weight_product_kernel"]
    sim.run(kernel, args, warps=4, programs=programs, seed=seed)
    once("pieces", pieces)
    parts = pieces.array.reshape(slots, *choice)
    for tile in range(tiles_n * tiles_k):
        row, col = (i * size for i, size in zip(divmod(tile, tiles_k), choice, strict=True))
        total = parts[table.starts[tile] : table.starts[tile + 1]].sum(0)
        want = g[:, row : row + choice.block_n].T @ x[:, col : col + choice.block_k]
        equal("tile", total[: want.shape[0], : want.shape[1]], want)
    if of_pieces is not None:
        once("sums", of_pieces)
        by_slot = of_pieces.array.reshape(slots, -1)
        found = [
            by_slot[table.starts[i * tiles_k] : table.starts[(i + 1) * tiles_k]].sum(0)
            for i in range(tiles_n)
        ]
        equal("sums", np.concatenate(found)[:n], g.sum(0))


PIECES = [plan.Pieces(*tile) for tile in plan.PIECE_TILES]
# M, N, K and blocks: one row, fewer steps than slots, one tile, more tiles than blocks, an odd
# count of pieces, tails
WEIGHT_SHAPES = [
    (1, 8, 8, 1), (60, 256, 256, 3), (1000, 384, 512, 4), (1500, 128, 768, 7), (777, 200, 328, 6),
]  # fmt: skip
MORE_SHAPES = [(64, 128, 256, 1), (900, 640, 256, 3), (1700, 256, 768, 5), (3000, 104, 520, 9)]


@pytest.mark.parametrize("sums", [False, True])
@pytest.mark.parametrize("choice", PIECES, ids=str)
def test_the_protocol_of_the_weight_gradient_holds(space, choice, sums):
    for seed, shape in enumerate(WEIGHT_SHAPES):
        simulate_weight(space, choice, *shape, seed=seed, sums=sums)


@pytest.mark.slow
@pytest.mark.parametrize("sums", [False, True])
@pytest.mark.parametrize("choice", PIECES, ids=str)
def test_the_protocol_of_the_weight_gradient_holds_at_length(space, choice, sums):
    for seed in range(9):
        for shape in WEIGHT_SHAPES + MORE_SHAPES:
            simulate_weight(space, choice, *shape, seed=seed, sums=sums)


PINGPONG, COOP = ("pingpong", 128, 128), ("coop", 128, 256)
WAIT = "    acc = warpgroup_mma_wait(1, deps=(acc,))\n    mbarrier.arrive(empty"
FAULTS = {
    "slot given back while its product runs": (
        (*COOP, "plain"), WAIT, WAIT.replace("wait(1", "wait(2"),
    ),
    "slots given back by one consumer only": (
        (*COOP, "plain"), "init(empty.index(i), count=SHARE)", "init(empty.index(i), count=1)",
    ),
    "consumers not in turns": (
        (*PINGPONG, "plain"), "    if PINGPONG:\n        if CONSUMER",
        "    if False:\n        if CONSUMER",
    ),
    "buffer of out reused too early": (
        (*COOP, "plain"), "tma.store_wait(BUFS - 1)", "tma.store_wait(BUFS)",
    ),
    "pre's buffer given back too early": (
        (*PINGPONG, "slope"), "                tma.store_wait(STORES)\n", "",
    ),
    "hidden's buffer reused too early": (
        (*COOP, "hidden"), "  tma.store_wait(1)\n", "  tma.store_wait(2)\n",
    ),
    "one store of a band counted twice": (
        (*COOP, "hidden"), "STORES: gl.constexpr = 2 if", "STORES: gl.constexpr = 4 if",
    ),
    "sums not waited for": (
        (*PINGPONG, "slope"), "                total = warpgroup_mma_wait(0, deps=(total,))\n", "",
    ),
    "no fence": ((*PINGPONG, "slope"), "            fence_async_shared()\n", ""),
    "pre of the wrong turn": (
        (*COOP, "slope"), "(turn * USES + chunk // BUFS) & 1", "turn & 1",
    ),
    "W in boxes of the other order": (
        (*COOP, "plain"), "weight, [k * BLOCK_K, tile_n * BLOCK_N]",
        "weight, [tile_n * BLOCK_N, k * BLOCK_K]",
    ),
    "sums past the last column": ((*PINGPONG, "slope"), "total, K - col", "total, K - col + 1"),
    "sums of the other consumer": (
        (*COOP, "slope"), "sums + (part * K + col)", "sums + (tile_m * K + col)",
    ),
    "dW: ones without a fence": (
        True, "count=CONSUMERS)\n    fence_async_shared()\n", "count=CONSUMERS)\n",
    ),
    "dW: two products too few waited for": (
        True, "wait(2, deps=(acc, total))", "wait(4, deps=(acc, total))",
    ),
    "dW: sums of the first step always taken": (
        True, "total *= (sum_first == first).to(gl.float32)", "pass",
    ),
    "dW: a step's sums taken twice": (
        True, "gl.maximum(sum_last, first + 1), last", "gl.maximum(sum_first, first + 1), last",
    ),
    "dW: ring not advanced between pieces": (
        False, "(empty.index(stage))\n        stage, phase = advance(stage, phase, STAGES)\n",
        "(empty.index(stage))\n",
    ),
    "dW: too many bytes": (False, "BLOCK_K) * BLOCK_M * 2", "BLOCK_K) * BLOCK_M * 2 + 16"),
    "dW: slot of another piece": (False, "gl.load(piece + 4)", "gl.load(piece + 4) // 2"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(fault):
    where, old, new = FAULTS[fault]
    broken = sim.load(*FILES, edits=[(old, new)])

    def try_orders() -> None:
        for seed in range(12):
            if isinstance(where, tuple):
                simulate_input(broken, where, 83, 100, 73, 2, seed)
            else:
                simulate_weight(broken, PIECES[0], 1700, 256, 768, 5, seed, sums=where)

    with pytest.raises(sim.Wrong):
        try_orders()


# --------------------------------------------------------------------------- schedule

VIT_B = [(768, 768), (2304, 768), (3072, 768), (768, 3072)]
VIT_L_H_TI = [(4096, 1024), (1280, 5120), (192, 192), (4304, 1152)]


@pytest.mark.parametrize("choice", PIECES, ids=str)
@pytest.mark.parametrize("m", [1, 197, 1000, 25_216, 50_432])
@pytest.mark.parametrize("programs", [132, 114, 7])
def test_every_step_and_its_sums_are_dealt_once(choice, m, programs):
    for n, k in VIT_B + VIT_L_H_TI:
        tiles_n, tiles_k = -(-n // choice.block_n), -(-k // choice.block_k)
        steps = -(-m // plan.BLOCK)
        table = plan.tabulate(
            plan.schedule(tiles_n, tiles_k, steps, programs), tiles_n, tiles_k, steps
        )
        products = np.zeros((tiles_n, tiles_k, steps), int)
        summed = np.zeros((tiles_n, steps), int)
        slots = []
        for numbers in table.rows:
            for tile_n, tile_k, first, last, slot, *sums in zip(*[iter(numbers)] * 7, strict=True):
                products[tile_n, tile_k, first:last] += 1
                summed[tile_n, sums[0] : sums[1]] += 1
                slots.append(slot)
                assert table.starts[tile_n * tiles_k + tile_k] <= slot
                assert slot < table.starts[tile_n * tiles_k + tile_k + 1]
                assert first <= sums[0] <= sums[1] <= last
        assert (products == 1).all()
        assert (summed == 1).all()
        assert sorted(slots) == list(range(table.starts[-1]))


@pytest.mark.parametrize(("m", "most"), [(25_216, 1.07), (50_432, 1.01)])
def test_all_multiprocessors_have_as_much_to_do(m, most):
    """ViT-B at batch 128, where pieces for all would be too small for proj, and 256."""
    for n, k in VIT_B:
        steps, tiles = -(-m // plan.BLOCK), (n // 128, k // 256)
        work = plan.schedule(*tiles, steps, 132)
        busiest = max(sum(last - first for *_, first, last in pieces) for pieces in work)
        assert busiest <= most * tiles[0] * tiles[1] * steps / 132


# --------------------------------------------------------------------------- gradients of ops


def run_on_model(space: dict[str, Any], prepared: Any, tensors: tuple[Any, ...]) -> None:
    """A launch of `prepared` as `_launch.run` makes it."""
    given = prepared.arguments(*tensors)
    arguments, outputs = list(given), []
    for i, tensor in enumerate(given):
        if not isinstance(tensor, torch.Tensor):
            continue
        array = tensor.numpy() if tensor.dtype == torch.int32 else tensor.float().numpy().copy()
        arguments[i] = sim.Pointer(array.reshape(-1))
        if i < len(prepared.boxes):
            block = prepared.boxes[i].make(tensor).block_shape
            arguments[i] = sim.Descriptor(array, tuple(block), tensor.dtype)
        outputs.append((tensor, arguments[i], array))
    kernel, programs = space[prepared.kernel.fn.__name__], prepared.programs
    with sim.rounded():
        sim.run(kernel, arguments, warps=prepared.tile.num_warps, programs=programs, seed=0)
    for tensor, argument, array in outputs:
        if argument.writes.any():
            once("an output", argument)
            tensor.copy_(torch.from_numpy(array))


@pytest.fixture
def on_the_model(monkeypatch, space, triton_path):
    """Hopper's gradients run on the model of three multiprocessors, all else in the interpreter;
    gives the names of what ran."""
    ran: list[str] = []
    launch = _launch.run

    def run(prepared: Any, *tensors: Any) -> None:
        name = prepared.kernel.fn.__name__
        ran.append(name)
        if name in space and name.startswith("hopper"):
            run_on_model(space, prepared, tensors)
        else:
            launch(prepared, *tensors)

    monkeypatch.setattr(_launch, "run", run)
    monkeypatch.setattr(plan, "hopper_problem", lambda device: None)
    monkeypatch.setattr(plan, "wants_hopper", lambda tile: True)
    monkeypatch.setattr(plan, "multiprocessors", lambda device: 3)
    _device.forget()
    yield ran
    monkeypatch.undo()
    _device.forget()


def draw(*shape: int, std: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(SEED + sum(shape))
    return torch.randn(shape, generator=generator) * std


M, K, F = 70, 72, 136
LINEAR = {"x": draw(M, K), "weight": draw(F, K, std=K**-0.5), "bias": draw(F)}
MLP = {
    "x": draw(M, K), "w1": draw(F, K, std=K**-0.5), "b1": draw(F),
    "w2": draw(K, F, std=F**-0.5), "b2": draw(K),
}  # fmt: skip
NORM = {"norm_weight": draw(K), "norm_bias": draw(K + 1)[1:]}
OPS = {
    "linear": (ops.linear, linear_reference, LINEAR),
    "linear, gelu, scale": (
        ops.linear, linear_reference, {**LINEAR, "scale": draw(F), "activation": "gelu"}
    ),
    "linear, scale": (ops.linear, linear_reference, {**LINEAR, "scale": draw(F, std=0.1)}),
    "norm_linear": (ops.norm_linear, norm_linear_reference, {**LINEAR, **NORM}),
    "mlp": (ops.mlp, mlp_reference, {**MLP, "activation": "gelu"}),
    "mlp, scale": (
        ops.mlp, mlp_reference,
        {**MLP, **NORM, "scale": draw(K, std=0.1), "residual": draw(M, K), "activation": "silu"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", OPS)
def test_gradients_pass_the_policy(on_the_model, name, dtype):
    op, reference, given = OPS[name]
    inputs = {k: v.to(dtype) if isinstance(v, torch.Tensor) else v for k, v in given.items()}
    report = compare(op, reference, inputs, backward=True)
    assert len(report.rows) > 3
    assert report.passed, f"seed {SEED}\n{report}"
    products = 1 + name.startswith("mlp")
    assert on_the_model.count("hopper_weight_product_kernel") == products
    assert on_the_model.count("hopper_input_gradient_kernel") == products


def test_a_frozen_second_layer_wants_no_hidden_layer(on_the_model):
    def frozen(run: Any) -> Any:
        return lambda **given: run(**given, w2=MLP["w2"].to(given["x"].dtype), b2=None)

    inputs = {k: MLP[k].bfloat16() for k in ("x", "w1", "b1")}
    report = compare(frozen(ops.mlp), frozen(mlp_reference), inputs, backward=True)
    assert report.passed, f"seed {SEED}\n{report}"
    assert on_the_model.count("hopper_weight_product_kernel") == 1
    assert on_the_model.count("hopper_input_gradient_kernel") == 2


def test_what_does_not_compile_gives_way_to_the_portable_kernel(on_the_model, monkeypatch):
    """With one warning, and right gradients."""
    launch = _launch.run

    def run(prepared: Any, *tensors: Any) -> None:
        if prepared.kernel.fn.__name__.startswith("hopper"):
            prepared = prepared.spare(RuntimeError("no registers"))
        launch(prepared, *tensors)

    monkeypatch.setattr(_hopper, "_refused", None)
    monkeypatch.setattr(_launch, "run", run)
    monkeypatch.setattr(plan, "hopper_problem", lambda device: _hopper._refused)
    _backend.warn_once.cache_clear()  # another test may have been told
    op, reference, given = OPS["mlp"]
    inputs = {k: v.bfloat16() for k, v in given.items() if isinstance(v, torch.Tensor)}
    with pytest.warns(RuntimeWarning, match="portable kernels on this Hopper GPU") as told:
        report = compare(op, reference, inputs, backward=True)
    assert len(told) == 1
    assert report.passed, f"seed {SEED}\n{report}"
    assert not [name for name in on_the_model if name.startswith("hopper")]
    assert "weight_product_kernel" in on_the_model


# --------------------------------------------------------------------------- choice


def metas(*shapes: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> Any:
    return [packed(dtype, shape, CPU) for shape in shapes]


@pytest.mark.parametrize("batch", [128, 256])
def test_a_training_step_of_vit_b_takes_them(batch):
    """Every product of its backward, as a dry run for sm_90 records it."""

    def tensors(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
        return [torch.empty(shape, dtype=torch.bfloat16).requires_grad_() for shape in shapes]

    m, d, f = 197 * batch, 768, 3072
    steps = (
        (ops.norm_linear, ((m, d), (d,), (d,), (3 * d, d), (3 * d,))),
        (lambda x, w, b, r: ops.linear(x, w, b, residual=r), ((m, d), (d, d), (d,), (m, d))),
        (
            lambda x, n, o, w1, b1, w2, b2: ops.mlp(
                x, w1, b1, w2, b2, norm_weight=n, norm_bias=o, residual=x
            ),
            ((m, d), (d,), (d,), (f, d), (f,), (d, f), (d,)),
        ),
    )  # fmt: skip
    with _device.emulate("sm90"), recorded() as launches:
        for step, shapes in steps:
            leaves = tensors(*shapes)
            torch.autograd.grad(y := step(*leaves), leaves, torch.empty_like(y))
    products = [
        (prepared.tile.backend, prepared.programs)
        for prepared, _ in launches
        if prepared.kernel.fn.__module__.endswith("hopper_backward")
        and prepared.kernel.fn.__name__ != "sum_pieces_kernel"
    ]
    pieces, turns, shared = (("pieces", 132), ("pingpong", 132), ("coop", 132))
    assert products == [turns, pieces, turns, pieces, shared, pieces, turns, pieces]
    portable = {"linear_kernel", "weight_product_kernel", "pre_gradient_kernel"}
    assert not portable & {prepared.kernel.fn.__name__ for prepared, _ in launches}


def test_cases_for_a_gpu_take_them():
    """The certificate and the audit read these: every form but the slope alone."""
    forms = set()
    for name in ("linear", "norm_mlp"):
        spec = all_specs()[name]
        for case in spec.gpu_cases:
            inputs = spec.inputs(case, torch.bfloat16, seed=None)
            leaves = [t.requires_grad_() for t in inputs.values() if isinstance(t, torch.Tensor)]
            with _device.emulate("sm90"), recorded() as launches:
                torch.autograd.grad(y := spec.op(**inputs), leaves, torch.empty_like(y))
            for launch, arguments in launches:
                if launch.kernel.fn.__name__ == "hopper_input_gradient_kernel":
                    given = tuple(x is not None for x in arguments[3:6])
                    forms.add((launch.tile.backend, launch.tile.BLOCK_M, *given))
                elif launch.kernel.fn.__name__ == "hopper_weight_product_kernel":
                    forms.add((launch.tile.backend, arguments[3] is not None))
    assert forms >= {
        ("pingpong", 128, False, False, False), ("pingpong", 64, False, False, False),
        ("coop", 128, True, True, True), ("pieces", True), ("pieces", False),
    }  # fmt: skip


def test_which_tiles_are_chosen():
    def chosen(m: int, n: int, k: int, **options: Any) -> Any:
        g, weight, pre = metas((m, n), (n, k), (m, k))
        activation = options.pop("activation", None)
        form = (pre, activation) if activation else (None, "none")
        found = plan.input_choice(g, weight, *form, **options)
        return found if isinstance(found, str) else found[:3]

    assert chosen(50_432, 768, 768) == ("pingpong", 128, 128)
    assert chosen(1000, 768, 768) == ("pingpong", 64, 128)
    assert chosen(197, 768, 768) == ("pingpong", 64, 64)
    assert chosen(197, 768, 768, activation="relu") == ("pingpong", 64, 128)
    assert chosen(50_432, 768, 3072, activation="silu", hidden=True) == ("coop", 128, 256)
    assert chosen(50_432, 768, 3072, activation="gelu_polynomial") == ("pingpong", 128, 128)
    assert chosen(50_432, 768, 3072, activation="gelu") == ("pingpong", 64, 128)
    assert "no activation" in chosen(50_432, 768, 3072, activation="none")
    assert plan.weight_choice(*metas((1, 768), (1, 3072))) == (128, 256)
    assert plan.weight_choice(*metas((1, 256), (1, 128))) == (256, 128)


@pytest.mark.parametrize(
    ("size", "most", "programs"), [(64, 64, 64), (192, 64, 128), (768, 8, 132)]
)
def test_a_tile_has_so_many_pieces_that_one_program_can_load_them(size, most, programs):
    g, x = metas((50_432, size), (50_432, size))
    launches = plan.prepare_weight_product(plan.Pieces(128, 256), g, x)
    assert launches.product.programs == programs
    assert launches.total.arguments(*[None] * 4)[7] == most


def test_what_they_cannot_take_has_a_reason():
    g, weight, pre = metas((64, 64), (64, 64), (64, 64))
    single = metas((64, 64), dtype=torch.float32)[0]
    of_input: tuple[tuple[Any, str], ...] = (
        ((single, single, None), "operands are torch.float32"),
        ((g, single, None), "several dtypes"),
        ((*metas((64, 65), (65, 64)), None), "N=65"),
        ((*metas((64, 64), (64, 588)), None), "K=588"),
        ((g._replace(strides=(0, 1)), weight, None), "rows of G"),
        ((g, weight._replace(strides=(1, 64)), None), "rows of weight"),
        ((g, weight, pre._replace(aligned=False)), "rows of pre"),
    )
    for given, reason in of_input:
        found = plan.input_choice(given[0], given[1], given[2], "relu")
        assert isinstance(found, str)
        assert reason in found
    for given, reason in (
        ((single, single), "operands are torch.float32"),
        (metas((64, 64), (64, 588)), "K=588"),
        ((g, pre._replace(aligned=False)), "rows of x"),
        (metas((0, 64), (0, 64)), "rows of G and x"),
    ):
        found = plan.weight_choice(*given)
        assert isinstance(found, str)
        assert reason in found


def test_nobody_imports_gluon_before_a_hopper_gpu_asks():
    code = (
        "import sys, torch, fastvit\n"
        "from fastvit import ops\n"
        "from fastvit.kernels import _device\n"
        "from fastvit.check.launches import recorded\n"
        "with _device.emulate('sm100'), recorded() as found:\n"
        "    x, w = (torch.empty(2048, 768).bfloat16().requires_grad_() for _ in range(2))\n"
        "    y = ops.linear(x, w)\n"
        "    torch.autograd.grad(y, (x, w), torch.empty_like(y))\n"
        "print(len(found), [n for n in sys.modules if n.startswith('triton.experimental')])\n"
    )
    assert fresh.python("-c", code).split() == ["4", "[]"]
