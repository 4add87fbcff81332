"""Tile choice: pure, total, and within the card."""

import itertools
import json
import threading
from pathlib import Path

import pytest
import torch

from fastvit.kernels import _tuning
from fastvit.kernels._device import architecture, emulate
from fastvit.kernels._tuning import TileConfig, load_table, lookup, nearest_table, table_folder
from fastvit.kernels.attention.launch import split_head_dim, tail_of

OPS = ("linear", "patch_embed", "attention", "attention_backward", "layer_norm")
SHAPES = {
    "linear": [{"M": m, "N": 768, "K": 768} for m in (1, 197, 1024, 1025, 50432)],
    "patch_embed": [{"M": m, "N": 768, "K": 588} for m in (1, 50432)],
    "attention": [
        {"N": n, "M": n, "D": d, "ROPE": rope}
        for n in (1, 197, 4096)
        for d in (16, 64, 88, 256)
        for rope in (0, 1)
    ],
    "attention_backward": [
        {"N": n, "M": n, "D": d, "ROPE": rope, "PHASE": phase}
        for n in (1, 197)
        for d in (64, 256)
        for rope in (0, 1)
        for phase in (1, 2, 3)
    ],
    "layer_norm": [{"M": 197, "D_POW2": 2**i} for i in range(15)],
}
ALL = [
    (op, arch, dtype, shape)
    for op in OPS
    for arch, dtype in itertools.product(
        ("sm80", "sm86", "sm90", "sm120", "gfx942"), (torch.bfloat16, torch.float32)
    )
    for shape in SHAPES[op]
]


@pytest.mark.parametrize(("op", "arch", "dtype", "shape"), ALL)
def test_every_shape_gets_tiles(op, arch, dtype, shape):
    assert lookup(op, arch, dtype, **shape) == lookup(op, arch, dtype, **shape)


@pytest.mark.parametrize("op", OPS)
def test_tables_hold_known_fields_only(op):
    paths = sorted(table_folder(op).glob("*.json"))
    assert paths
    for path in paths:
        assert set(json.loads(path.read_text())) == {"source", "rows"}
        for row in load_table(op, path.stem):
            assert set(row) <= {"dtype", "when", "tile"}
            assert TileConfig(**row["tile"])
            known = set().union(*SHAPES[op])
            assert set(row.get("when", {})) <= known


def test_unknown_cards_take_the_nearest_older_table():
    assert nearest_table("linear", "sm90") == "sm90"
    assert nearest_table("linear", "sm89") == "sm80"
    assert nearest_table("linear", "sm120") == "sm100"
    assert nearest_table("linear", "sm75") is None
    assert nearest_table("linear", "gfx90a") is None


def test_rows_apply_in_order(tmp_path, monkeypatch):
    table = {
        "source": "planted",
        "rows": [
            {"dtype": ["float16"], "when": {"M": [0, 64]}, "tile": {"BLOCK_M": 16, "BLOCK_N": 16}},
            {"dtype": ["float16"], "tile": {"BLOCK_M": 32, "BLOCK_N": 32}},
        ],
    }
    (tmp_path / "sm77.json").write_text(json.dumps(table))
    monkeypatch.setattr(_tuning, "table_folder", lambda op: Path(tmp_path))
    _tuning.reload()
    assert lookup("linear", "sm77", torch.float16, M=64, N=1, K=1).BLOCK_M == 16
    assert lookup("linear", "sm77", torch.float16, M=65, N=1, K=1).BLOCK_M == 32
    assert lookup("linear", "sm77", torch.float32, M=65, N=1, K=1).BLOCK_M == 64  # heuristic
    _tuning.reload()


# --------------------------------------------------------------------------- this machine's cache


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Writes the cache of one op for sm90."""

    def write(op: str, text: str) -> None:
        path = _tuning.cache_path(op, "sm90")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        _tuning.reload()

    monkeypatch.setenv("FASTVIT_CACHE", str(tmp_path))
    _tuning.reload()
    yield write
    _tuning.reload()


def half_lookup(m: int, n: int = 768) -> TileConfig:
    return lookup("linear", "sm90", torch.float16, M=m, N=n, K=768)


def test_the_cache_comes_before_the_table(cache):
    before = half_lookup(197), half_lookup(50432)
    row = {"dtype": ["float16"], "when": {"M": [49, 788]}, "tile": {"BLOCK_M": 16, "BLOCK_N": 16}}
    cache("linear", json.dumps({"source": "measured", "rows": [row]}))
    assert half_lookup(197) == TileConfig(16, 16) != before[0]
    assert half_lookup(50432) == before[1]
    bfloat16 = lookup("linear", "sm90", torch.bfloat16, M=197, N=768, K=768)
    assert bfloat16 == before[0]


def test_the_cache_is_read_once(cache):
    half_lookup(197)
    path = _tuning.cache_path("linear", "sm90")
    path.parent.mkdir(parents=True)
    path.write_text("broken")  # would give a warning, which is an error here
    half_lookup(198)


def test_cache_folder(monkeypatch):
    monkeypatch.delenv("FASTVIT_CACHE")
    monkeypatch.setenv("HOME", "/somewhere")
    expected = Path("/somewhere/.cache/fastvit/tuning/linear/sm90.json")
    assert _tuning.cache_path("linear", "sm90") == expected


GOOD = {"dtype": ["float16"], "tile": {"BLOCK_M": 16, "BLOCK_N": 16}}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"rows": 3}',
        '{"rows": ["x"]}',
        json.dumps({"rows": [GOOD, {}]}),
        json.dumps({"rows": [GOOD | {"dtype": "float16"}]}),
        json.dumps({"rows": [GOOD | {"tile": {"BLOCK_M": 16}}]}),
        json.dumps({"rows": [GOOD | {"tile": {"BLOCK_M": 48, "BLOCK_N": 16}}]}),
        json.dumps({"rows": [GOOD | {"tile": {"BLOCK_M": 0, "BLOCK_N": 16}}]}),
        json.dumps({"rows": [GOOD | {"tile": {"BLOCK_M": 16, "BLOCK_N": 16, "lanes": 3}}]}),
        json.dumps({"rows": [GOOD | {"when": {"M": [9, 1]}}]}),
        json.dumps({"rows": [GOOD | {"when": {"M": 9}}]}),
        json.dumps({"rows": [GOOD | {"when": ["M"]}]}),
    ],
)
def test_a_broken_cache_gives_one_warning_and_is_ignored(cache, text):
    before = half_lookup(197)
    cache("linear", text)
    with pytest.warns(RuntimeWarning, match=r"fastvit ignores .*linear/sm90.json: ") as seen:
        answers = [half_lookup(tokens) for tokens in (197, 198)]
    assert answers[0] == before
    assert len(seen) == 1


def test_a_cache_that_names_an_unknown_size_says_nothing(cache):
    before = half_lookup(197)
    cache("linear", json.dumps({"rows": [GOOD | {"when": {"Z": [0, 9]}}]}))
    assert half_lookup(197) == before


# --------------------------------------------------------------------------- for tuning


def test_a_forced_tile_is_for_its_op_and_its_thread():
    tile = TileConfig(16, 32)
    before, seen = half_lookup(197), []
    with _tuning.forced("linear", tile):
        assert half_lookup(197) == tile
        assert lookup("attention", "sm90", torch.float16, N=9, M=9, D=64) != tile
        thread = threading.Thread(target=lambda: seen.append(half_lookup(197)))
        thread.start()
        thread.join()
    assert seen == [before]
    assert half_lookup(197) == before


def test_observed_lookups():
    with _tuning.observed() as queries:
        tile = half_lookup(197)
    half_lookup(198)
    assert queries == [
        _tuning.Query("linear", "sm90", "float16", (("K", 768), ("M", 197), ("N", 768)))
    ]
    assert tile == half_lookup(197)


def test_blocks_are_powers_of_two():
    with pytest.raises(ValueError, match="BLOCK_N must be a power of two; got 48"):
        TileConfig(64, 48)


def test_emulated_architecture():
    cpu = torch.device("cpu")
    assert architecture(cpu) == "sm90"
    with emulate("sm80"):
        assert architecture(cpu) == "sm80"
    assert architecture(cpu) == "sm90"


@pytest.mark.parametrize("widest", [32, 512])
@pytest.mark.parametrize("d", range(1, 257))
def test_head_dim_parts_cover_with_least_padding(d, widest):
    parts = split_head_dim(d, widest)
    covered, padded = sum(parts), max(16, 1 << (d - 1).bit_length())
    assert d <= covered <= padded
    assert all(16 <= part <= widest and part & (part - 1) == 0 for part in parts)
    # every part but the last lies wholly inside d: the kernel masks the last one only
    assert covered - parts[-1] < d


def test_head_dims_of_known_models_are_split():
    split = {64: [64], 72: [64, 16], 80: [64, 16], 88: [64, 32], 104: [64, 32, 16]}
    assert {d: split_head_dim(d) for d in split} == split
    assert split_head_dim(104, 32) == [32, 32, 32, 16]  # exact float32 products


@pytest.mark.parametrize("keys", [1, 15, 16, 17, 63, 64, 65, 80, 81, 197, 256, 577])
def test_tail_covers_what_is_left(keys):
    tail = tail_of(keys, 64)
    rest = keys % 64
    assert (tail == 0) == (rest == 0)
    assert rest <= tail <= 64
    assert tail in (0, 16, 32, 64)
