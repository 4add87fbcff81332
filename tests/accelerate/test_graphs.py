"""CUDA graphs in `accelerate`, on a CPU with `fake_cuda.Cuda` in torch.cuda's place."""

import copy
import gc
import pickle
import threading
import weakref
from typing import Any

import pytest
import torch
from fake_cuda import Cuda, Tape
from timm.models.vision_transformer import Block
from timm_models import TOLERANCE, error, images, small
from torch import Tensor, nn

import fastvit
from fastvit.accelerate import accelerate, explain, graphs, restore
from fastvit.accelerate.graphs import GRAPHS, MAX_GRAPHS


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    return Cuda(monkeypatch)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def graphed(**options: Any) -> Any:
    return accelerate(small(depth=1, **options), cuda_graphs=True)


def plain(model: Any, *args: Any, **kwargs: Any) -> Tensor:
    """The model's output without graphs."""
    kept = model.__dict__.pop(GRAPHS)
    try:
        return model(*args, **kwargs)
    finally:
        setattr(model, GRAPHS, kept)


# --------------------------------------------------------------------------- replays


def test_a_shape_is_captured_once_and_results_are_new(cuda: Cuda):
    model = graphed()
    first, second = images(model), images(model)
    ours = model(first)
    kept = ours.clone()
    assert torch.equal(model(second), plain(model, second))
    assert torch.equal(ours, kept)
    assert torch.equal(ours, plain(model, first))
    assert cuda.captures == 1


def test_each_shape_has_its_graph_and_the_oldest_goes(cuda: Cuda):
    model = graphed()
    inputs = [images(model, batch) for batch in range(1, MAX_GRAPHS + 1)]
    for x in [*inputs, *inputs]:
        assert torch.equal(model(x), plain(model, x))
    assert cuda.captures == MAX_GRAPHS
    assert cuda.pools == 1
    model(inputs[0])
    model(images(model, MAX_GRAPHS + 1))  # takes the place of inputs[1]
    model(inputs[0])
    assert cuda.captures == MAX_GRAPHS + 1
    model(inputs[1])
    assert cuda.captures == MAX_GRAPHS + 2


def test_settings_have_graphs_of_their_own(cuda: Cuda):
    model = graphed()
    x = images(model)
    exact = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(x)
        assert rounded.dtype == torch.bfloat16
        assert torch.equal(rounded, plain(model, x))
    with torch.autocast("cpu", torch.float16):
        assert model(x).dtype == torch.float16
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        model(x)
    finally:
        torch.set_float32_matmul_precision(before)
    assert cuda.captures == 4
    assert torch.equal(model(x), exact)
    assert cuda.captures == 4


def test_a_graph_of_inference_mode_serves_outside_of_it(cuda: Cuda):
    model = graphed()
    x = images(model)
    with torch.inference_mode():
        ours = model(images(model))
    assert torch.equal(model(x), plain(model, x))
    assert ours.is_inference()
    assert cuda.captures == 1


def test_inputs_of_any_strides(cuda: Cuda):
    model = graphed()
    x = images(model, 4)
    model(x)
    for view in (x.to(memory_format=torch.channels_last), x.flip(0), x[:1].expand(4, -1, -1, -1)):
        assert torch.equal(model(view), plain(model, view.contiguous()))
    assert cuda.captures == 1


def test_a_replay_waits_for_the_one_before_on_any_stream(cuda: Cuda):
    model = graphed()
    model(images(model))
    captured = ["wait_stream", "wait_event", "wait_stream", "capture"]
    assert cuda.log == [*captured, "wait_event", "replay", "record"]


def test_threads_do_not_mix_their_inputs(cuda: Cuda):
    model = graphed()
    inputs = [images(model) for _ in range(4)]
    expected = [plain(model, x) for x in inputs]
    wrong: list[int] = []

    def work(i: int) -> None:
        with torch.no_grad():
            for _ in range(25):
                if not torch.equal(model(inputs[i]), expected[i]):
                    wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert cuda.captures == 1


# --------------------------------------------------------------------------- refresh


@pytest.mark.parametrize("precision", ["keep", "bf16"])
def test_new_values_of_weights_show_without_a_capture(cuda: Cuda, precision: str):
    model = accelerate(small(depth=1), cuda_graphs=True, precision=precision)
    x = images(model)
    # the cast weights that this block caches are of the old values
    with torch.autocast("cpu", torch.bfloat16, enabled=precision != "keep"):
        before = model(x)
        for parameter in model.parameters():
            parameter.mul_(1.5)
        after = model(x)
    assert not torch.equal(before, after)
    assert torch.equal(after, plain(model, x))
    assert cuda.captures == 1


def move(model: Any) -> None:
    model.pos_embed.data = model.pos_embed.data * 2


def replace(model: Any) -> None:
    model.blocks[0].mlp.fc1.bias = nn.Parameter(model.blocks[0].mlp.fc1.bias * 2)


def transpose(model: Any) -> None:
    weight = model.blocks[0].attn.proj.weight
    weight.data = weight.data.t()


def assign(model: Any) -> None:
    state = {name: value * 1.5 for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def new_head(model: Any) -> None:
    model.reset_classifier(7)


def pooling(model: Any) -> None:
    model.global_pool = "avg"


def epsilon(model: Any) -> None:
    model.blocks[0].norm1.eps = 10.0


def scale(model: Any) -> None:
    model.blocks[0].attn.fused_attn = False
    model.blocks[0].attn.scale *= 2


def own_forward(model: Any) -> None:
    model.head.forward = lambda x: x


def taller_positions(model: Any) -> None:
    model.to(torch.float64).to(torch.float32)
    model.pos_embed.mul_(2)


CHANGES = [move, replace, transpose, assign, new_head, pooling, epsilon, scale, own_forward,
           taller_positions]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_noticed(cuda: Cuda, change: Any):
    model = graphed()
    x = images(model)
    before = model(x)
    change(model)
    after = model(x)
    assert not (before.shape == after.shape and torch.equal(before, after))
    assert torch.equal(after, plain(model, x))
    assert torch.equal(model(x), after)
    assert cuda.captures == (1 if change is own_forward else 2)


@pytest.mark.parametrize("method", ["forward", "_pos_embed", "forward_head"])
def test_a_method_replaced_after_the_capture_is_noticed(
    cuda: Cuda, monkeypatch: pytest.MonkeyPatch, method: str
):
    model = graphed()
    x = images(model)
    before = model(x)
    kind = type(model.blocks[0].attn) if method == "forward" else type(model).fastvit_original
    original = getattr(kind, method)
    monkeypatch.setattr(kind, method, lambda *args, **kwargs: 2 * original(*args, **kwargs))
    ours = model(x)
    assert error(ours, plain(model, x)) <= TOLERANCE
    assert error(ours, before) > 0.01
    monkeypatch.undo()
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("change", [c for c in CHANGES if c is not taller_positions])
def test_what_is_not_noticed_would_be_stale(
    cuda: Cuda, change: Any, monkeypatch: pytest.MonkeyPatch
):
    """The stand-in for torch.cuda forgives nothing: without the check, old outputs come out."""
    model = graphed()
    x = images(model)
    before = model(x)
    change(model)
    monkeypatch.setattr(graphs.Snapshot, "holds", lambda self, model: True)
    assert torch.equal(model(x), before)


def test_moving_a_model_drops_its_graphs(cuda: Cuda):
    model = graphed()
    model(images(model))
    nn.Sequential(model).to(torch.float64)
    assert not getattr(model, GRAPHS)._replays


def test_dropout_in_training_inside_a_model_in_eval_mode(cuda: Cuda):
    """As for Monte Carlo dropout: noticed, and as random as without graphs."""
    model = accelerate(small(depth=1, drop_rate=0.5), cuda_graphs=True)
    x = images(model)
    model(x)
    model.head_drop.train()
    assert not torch.equal(model(x), model(x))
    assert cuda.captures == 2


def test_modules_may_set_attributes_in_their_forward(cuda: Cuda):
    class Remembers(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            self.last = x
            return x

    model = graphed()
    model.fc_norm = Remembers()
    x = images(model)
    for _ in range(3):
        model(x)
    assert cuda.captures == 1


# --------------------------------------------------------------------------- no graph


def with_grad(model: Any, x: Tensor) -> Tensor:
    with torch.enable_grad():
        y = model(x)
    assert y.requires_grad
    return y.detach()


def in_training(model: Any, x: Tensor) -> Tensor:
    return model.train()(x)


def with_a_mask(model: Any, x: Tensor) -> Tensor:
    tokens = model.num_prefix_tokens + model.patch_embed.num_patches
    return model(x, attn_mask=torch.ones(tokens, tokens, dtype=torch.bool).tril())


def with_a_hook(model: Any, x: Tensor) -> Tensor:
    seen: list[Tensor] = []
    handle = model.blocks[0].register_forward_hook(lambda m, args, y: seen.append(y))
    y = model(x)
    handle.remove()
    assert len(seen) == 1
    return y


def with_a_hook_on_all(model: Any, x: Tensor) -> Tensor:
    seen: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, args, y: seen.append(m))
    y = model(x)
    handle.remove()
    assert len(seen) > 5
    return y


def compiled(model: Any, x: Tensor) -> Tensor:
    torch._dynamo.reset()
    return torch.compile(model, fullgraph=True, backend="eager")(x)


def exported(model: Any, x: Tensor) -> Tensor:
    return torch.export.export(model, (x,), strict=False).module()(x)


def counted(model: Any, x: Tensor) -> Tensor:
    with Tape() as tape:  # as FLOP counters and profilers do
        y = model(x)
    assert len(tape.steps) > 10
    return y


def traced(model: Any, x: Tensor) -> Tensor:
    trace: Any = torch.jit.trace(model, x, check_trace=False)
    return trace(x)


def mapped(model: Any, x: Tensor) -> Tensor:
    return torch.func.vmap(model, randomness="error")(x[:, None])[:, 0]


WAYS = [with_grad, in_training, with_a_mask, with_a_hook, with_a_hook_on_all,
        compiled, exported, counted, traced, mapped]  # fmt: skip


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:There is a performance")
@pytest.mark.parametrize("way", WAYS)
def test_runs_without_a_graph(cuda: Cuda, way: Any):
    model = graphed()
    x = images(model)
    model(x)
    replays = cuda.log.count("replay")
    y = way(model, x)
    assert cuda.captures == 1
    # a hook is seen after a replay, the rest before
    assert cuda.log.count("replay") - replays == (way is with_a_hook)
    mine = accelerate(copy.deepcopy(restore(model)))
    assert error(y, way(mine, x)) <= TOLERANCE


def test_a_graph_outlives_a_hook(cuda: Cuda):
    model = graphed()
    x = images(model)
    expected = model(x)
    with_a_hook(model, x)
    assert torch.equal(model(x), expected)
    assert cuda.captures == 1


def test_empty_batches(cuda: Cuda):
    model = graphed()
    assert model(images(model, 0)).shape == (0, 1000)
    assert cuda.captures == 0


def test_a_capture_that_fails_is_not_tried_again(cuda: Cuda):
    model = graphed()
    x, other = images(model), images(model, 3)
    cuda.fail = RuntimeError("operation not permitted\nwhen stream is capturing")
    with pytest.warns(RuntimeWarning, match=r"no CUDA graph for an input of \[2, .*not permitted"):
        ours = model(x)
    cuda.fail = None
    assert torch.equal(ours, plain(model, x))
    assert torch.equal(model(x), ours)
    assert cuda.captures == 1
    assert torch.equal(model(other), plain(model, other))
    assert cuda.captures == cuda.pools == 2


def test_an_output_that_is_no_tensor_is_left_alone(cuda: Cuda):
    model = graphed()
    model.head = Pair()
    with pytest.warns(RuntimeWarning, match="gives a tuple, not one tensor"):
        first, second = model(images(model))
    assert torch.equal(first, second)


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


def test_errors_of_the_model_come_through(cuda: Cuda):
    model = graphed()
    for _ in range(2):
        with pytest.raises(AssertionError, match="Input height"):
            model(torch.randn(1, 3, 5, 5))
    assert cuda.captures == 0


# --------------------------------------------------------------------------- the model


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_have_no_graphs_yet(cuda: Cuda, copied: Any):
    model = graphed()
    x = images(model)
    expected = model(x)
    twin = copied(model)
    assert getattr(twin, GRAPHS) is not getattr(model, GRAPHS)
    assert not getattr(twin, GRAPHS)._replays
    for parameter in twin.parameters():
        parameter.zero_()
    assert not torch.equal(twin(x), expected)
    assert torch.equal(model(x), expected)
    assert cuda.captures == 2


def test_a_deleted_model_is_freed_at_once(cuda: Cuda):
    model = graphed()
    model(images(model))
    alive = weakref.ref(model)
    weight = weakref.ref(model.head.weight)
    gc.disable()
    try:
        del model
        assert alive() is weight() is None
    finally:
        gc.enable()


def test_shallow_copies_are_told_apart(cuda: Cuda):
    model = graphed()
    x = images(model)
    expected = model(x)
    twin = copy.copy(model)
    twin._modules = model._modules | {"head": copy.deepcopy(model.head)}
    twin.head.weight.mul_(2)
    assert torch.equal(twin(x), plain(twin, x))
    assert torch.equal(model(x), expected)


def test_replicas_of_data_parallel_run_without_graphs(cuda: Cuda):
    model = graphed()
    x = images(model)
    expected = model(x)
    replica = model._replicate_for_data_parallel()
    replica._parameters = {name: p * 2 for name, p in model._parameters.items()}
    assert not torch.equal(replica(x), expected)
    assert cuda.captures == 1


def test_state_dict_and_restore(cuda: Cuda):
    model = small(depth=1)
    names, attributes = list(model.state_dict()), set(model.__dict__)
    x = images(model)
    theirs = model(x)
    accelerate(model, cuda_graphs=True)
    assert error(model(x), theirs) <= TOLERANCE
    assert list(model.state_dict()) == names
    restore(model)
    assert set(model.__dict__) == attributes
    assert torch.equal(model(x), theirs)
    assert cuda.captures == 1


def test_accelerate_again_turns_graphs_off(cuda: Cuda):
    model = accelerate(graphed())
    model(images(model))
    assert cuda.captures == 0


def test_own_models(cuda: Cuda):
    model: Any = fastvit.create_model("vit_tiny_patch16_224", img_size=32, depth=2).eval()
    kind = type(model)
    x = torch.randn(2, 3, 32, 32)
    expected = model(x)
    accelerate(model, cuda_graphs=True)
    assert torch.equal(model(x), expected)
    assert torch.equal(model(x), expected)
    assert cuda.captures == 1
    model(x, is_causal=True)
    assert cuda.captures == 1
    assert type(restore(model)) is kind
    assert GRAPHS not in model.__dict__


def test_on_a_cpu_it_runs_and_explain_says_why(capsys: pytest.CaptureFixture[str]):
    model = graphed()
    x = images(model)
    assert torch.equal(model(x), plain(model, x))
    plan = explain(model)
    assert plan.graphs == "none, they need a GPU and the model is on cpu"
    assert "CUDA graphs: none, they need a GPU" in capsys.readouterr().out
    assert explain(restore(model)).graphs is None
    with pytest.raises(RuntimeError, match="CUDA graphs: they need a GPU and the model is on cpu"):
        accelerate(model, cuda_graphs=True, strict=True)
    assert GRAPHS not in model.__dict__


def test_graphs_need_a_vit():
    with pytest.raises(ValueError, match="cuda_graphs=True needs a ViT"):
        accelerate(Block(32, 2), cuda_graphs=True)
