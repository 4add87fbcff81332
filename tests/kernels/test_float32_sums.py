"""Float32 products by the order in which a GPU adds them up, here in numpy.

One chain of multiply-adds over all of K, which a plain loop over blocks compiles to, was up to 3.4
times as wrong as cuBLAS on an H200 (`benchmarks/results/nvidia-h200_202611_torch2.11.0`). Sums of
blocks that are then added pass the policy even beside a pairwise sum, the best of all orders.
"""

import json
import re

import fresh
import numpy as np
import pytest

BLOCK = 32  # of the sum that `_tiles.multiply` and attention's parts take at a time
SEEDS = range(3)


def rounded(x):
    return x.astype(np.float32)


def chain(a, b):
    """a [M, K] times b [N, K] as one multiply-add after another, each rounded once."""
    a, b = a.astype(np.float64), b.astype(np.float64)  # in which a product of float32 is exact
    acc = np.zeros((len(a), len(b)), np.float32)
    for k in range(a.shape[1]):
        acc = rounded(acc + a[:, k, None] * b[None, :, k])
    return acc


def two_levels(a, b):
    """Chains over blocks of K, added up in their order."""
    acc = np.zeros((len(a), len(b)), np.float32)
    for k in range(0, a.shape[1], BLOCK):
        acc = acc + chain(a[:, k : k + BLOCK], b[:, k : k + BLOCK])
    return acc


def pairwise(a, b):
    """A tree of additions over rounded products."""
    terms = a[:, None, :] * b[None, :, :]
    while terms.shape[-1] > 1:
        if terms.shape[-1] % 2:
            terms = np.concatenate([terms, np.zeros_like(terms[..., :1])], axis=-1)
        terms = terms[..., ::2] + terms[..., 1::2]
    return terms[..., 0]


def exact(a, b):
    return a.astype(np.float64) @ b.astype(np.float64).T


def normal(generator, *shape, std=1.0):
    return rounded(generator.standard_normal(shape) * std)


def linear(generator):
    x = normal(generator, 130, 384)
    x[:, ::96] *= 100  # outlier channels
    weight = normal(generator, 192, 384, std=384**-0.5)
    return lambda product, wide: product(x, weight)


def mlp(generator):
    """Without an activation, which is the same for all."""
    x, w1 = normal(generator, 130, 96), normal(generator, 384, 96, std=96**-0.5)
    w2 = normal(generator, 96, 384, std=384**-0.5)
    return lambda product, wide: product(product(x, w1), w2)


def attention(queries, keys, d):
    def make(generator):
        q, k, v = (normal(generator, n, d) for n in (queries, keys, keys))

        def run(product, wide):
            scores = product(q, k) * wide(d**-0.5)
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            weights /= weights.sum(axis=1, keepdims=True)  # numpy's sum is pairwise
            return product(weights, np.ascontiguousarray(v.T))

        return run

    return make


CASES = {
    "linear, outlier channels": linear,
    "mlp": mlp,
    "attention, d=256": attention(64, 70, 256),
    "attention, 197 keys": attention(16, 197, 64),
}


def ratios(make, product):
    """Of the largest and of the root mean square errors to those of pairwise sums, the median over
    `SEEDS`."""
    found = []
    for seed in SEEDS:
        run = make(np.random.default_rng(seed))
        truth = run(exact, np.float64)
        ours, best = (run(p, np.float32) - truth for p in (product, pairwise))
        found.append([
            np.abs(ours).max() / np.abs(best).max(),
            np.sqrt((ours**2).mean() / (best**2).mean()),
        ])  # fmt: skip
    return np.median(found, axis=0)


@pytest.mark.parametrize("make", CASES.values(), ids=CASES)
def test_sums_in_two_levels_pass_the_policy(make):
    assert ratios(make, two_levels).max() <= 2


@pytest.mark.parametrize("make", CASES.values(), ids=CASES)
def test_one_chain_does_not(make):
    assert ratios(make, chain).max() > 2


COMPILED = """
import json, sys
import torch
from fastvit.check import audit
from fastvit.kernels.specs import all_specs
texts = {}
for name, case in (("linear", "outlier channels"), ("attention", "d=256")):
    spec = all_specs()[name]
    case = next(c for c in spec.cases if c.name == case)
    (launch,) = audit.record_launches(spec, case, torch.float32, "sm90")
    audit.use_target("sm90")
    kernel = launch.kernel.run(*launch.arguments, grid=(1,), warmup=True, **launch.options)
    texts[name] = kernel.asm["ttgir"]
print(json.dumps(texts))
"""


def test_the_compiler_keeps_the_levels_apart():
    """Every float32 product starts from zero; an optimiser that passed it the sum so far would
    make one chain of all."""
    for name, text in json.loads(fresh.python("-c", COMPILED)).items():
        starts = re.findall(r"tt\.dot %\w+, %\w+, (%\w+)", text)
        assert starts, name
        zeros = set(re.findall(r"(%\w+) = arith\.constant dense<0\.0+e\+00> : tensor<\S+f32", text))
        assert {*starts} <= zeros, name
        assert text.count("arith.addf") >= len(starts), name
