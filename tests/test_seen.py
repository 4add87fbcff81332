"""What was found out about a module is looked up again exactly when something below it changed."""

import collections
import copy
import pickle

import pytest
import torch
from timm.models.vision_transformer import Block
from torch import nn

from fastvit import _seen, accelerate, restore


class Counter:
    """How often a module was looked at."""

    def __init__(self):
        self.looks = 0

    def __call__(self, module):
        self.looks += 1
        return self.looks


class Quantised(nn.Parameter):
    """A class of its own, as quantisers give parameters."""


@pytest.fixture
def block():
    return Block(32, 2)


def hook(*args):
    return None


def replaced_dict(block):
    block.attn.qkv._forward_hooks = collections.OrderedDict({0: hook})


def other_hook(block):
    handle = block.attn.qkv.register_forward_hook(hook)
    assert _seen.keep(block, Counter()) == 1  # kept with that hook
    handle.remove()
    block.attn.qkv.register_forward_hook(hook)


CHANGES = {
    "hook": lambda b: b.attn.qkv.register_forward_hook(hook),
    "hook of a block in a block": lambda b: b.mlp.register_forward_pre_hook(hook),
    "backward hook": lambda b: b.norm1.register_full_backward_hook(hook),
    "hook on an identity": lambda b: b.attn.q_norm.register_forward_hook(hook),
    "other hook, as many as before": other_hook,
    "hooks in another dict": replaced_dict,
    "layer": lambda b: setattr(b.mlp, "fc1", nn.Linear(32, 128)),
    "layer more": lambda b: b.mlp.add_module("extra", nn.Linear(2, 2)),
    "class": lambda b: setattr(b.norm1, "__class__", nn.Identity),
    "forward": lambda b: setattr(b.mlp, "forward", lambda x: x),
    "parameter's class": lambda b: setattr(b.mlp.fc1, "weight", Quantised(b.mlp.fc1.weight.data)),
    "no bias": lambda b: setattr(b.mlp.fc1, "bias", None),
    "method of its own": lambda b: setattr(b, "_drop", hook),
    "option": lambda b: setattr(b.attn, "scale", 1.0),
    "option gone": lambda b: delattr(b.attn, "fused_attn"),
    "parameter more": lambda b: b.mlp.act.register_parameter("p", nn.Parameter(torch.ones(1))),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_is_noticed(block, change):
    look = Counter()
    assert [_seen.keep(block, look), _seen.keep(block, look)] == [1, 1]
    change(block)
    assert _seen.keep(block, look) > 1
    assert look.looks == _seen.keep(block, look)  # and kept again


def test_what_changes_nothing_costs_no_look(block):
    look = Counter()
    _seen.keep(block, look)
    block.eval().train()
    block.to(torch.float64)
    block.load_state_dict(block.state_dict(), assign=True)
    block(torch.zeros(1, 3, 32, dtype=torch.float64)).sum().backward()
    torch.optim.SGD(block.parameters(), lr=0.1).step()
    assert _seen.keep(block, look) == 1


def test_a_hook_on_every_module_is_noticed(block):
    look = Counter()
    _seen.keep(block, look)
    handle = nn.modules.module.register_module_forward_hook(hook)
    try:
        assert _seen.keep(block, look) == 2
        assert _seen.keep(block, look) == 3  # nothing is kept then
    finally:
        handle.remove()
    assert _seen.keep(block, look) == 1


def test_more_may_be_watched(block):
    config = {"attention": "sdpa"}
    look, watched = Counter(), lambda module: [(config, ("attention",))]
    assert _seen.keep(block, look, watched) == 1
    config["attention"] = "eager"
    assert _seen.keep(block, look, watched) == 2


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda b: pickle.loads(pickle.dumps(b))], ids=["deepcopy", "pickle"]
)
def test_a_copy_has_seen_nothing(block, copied):
    _seen.keep(block, Counter())
    twin = copied(block)
    twin.mlp.fc1.register_forward_hook(hook)
    look = Counter()
    assert _seen.keep(twin, look) == 1
    assert look.looks == 1
    assert _seen.keep(block, Counter()) == 1


def test_a_replica_looks_for_itself(block):
    """DataParallel's replicas share the attributes of the module, but not its dict of children."""
    _seen.keep(block, Counter())
    replica = block._replicate_for_data_parallel()
    look = Counter()
    assert _seen.keep(replica, look) == 1
    assert look.looks == 1


def test_compilers_look_every_time(block, monkeypatch):
    look = Counter()
    monkeypatch.setattr(torch.compiler, "_is_compiling_flag", True)
    assert [_seen.keep(block, look), _seen.keep(block, look)] == [1, 2]
    assert _seen.SEEN not in block.__dict__


def test_a_block_is_freed_with_its_last_name(block):
    """A cycle would keep its weights until the garbage collector comes."""
    import gc
    import weakref

    _seen.keep(block, Counter())
    gone = weakref.ref(block.mlp)
    gc.disable()
    try:
        del block.mlp
        _seen.keep(block, Counter())
        assert gone() is None
    finally:
        gc.enable()


def test_restore_leaves_nothing():
    model = nn.Sequential(Block(32, 2))
    before = set(model[0].__dict__)
    accelerate(model)(torch.zeros(1, 3, 32))
    assert _seen.SEEN in model[0].__dict__
    assert set(restore(model)[0].__dict__) == before
