"""CUDA graphs in `accelerate`. On a CPU, torch.cuda's part is played by a recorder of operations
that reads and writes fixed memory as a graph does, so that stale graphs show; the last tests need a
GPU."""

import contextlib
import copy
import gc
import inspect
import os
import pickle
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import Block
from timm_models import TOLERANCE, error, images, small
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import fastvit
from fastvit.accelerate import accelerate, explain, graphs, restore
from fastvit.accelerate.graphs import GRAPHS, MAX_GRAPHS

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


class Tape(TorchDispatchMode):
    """Runs operations and keeps them, with the memory that each reads and writes."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is not torch.ops.aten.empty_like.default:  # which does nothing on the GPU
            # aliases: a graph knows addresses, and nothing of what a parameter is given later
            self.steps.append(tree_map_only(Tensor, Tensor.detach, (func, args, kwargs or {}, out)))
        return out

    def replay(self) -> None:
        for func, args, kwargs, out in self.steps:
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                views = old.untyped_storage().data_ptr() == new.untyped_storage().data_ptr()
                if not views:
                    old.copy_(new)


class Cuda:
    """In the place of torch.cuda's streams, events and graphs. `log` has what was asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        log = self.log = []
        self.captures = 0
        self.pools = 0
        self.fail: Exception | None = None  # of the next capture
        cuda = self
        real_graph = inspect.signature(torch.cuda.graph)

        class Stream:
            def __init__(self, device: torch.device | None = None) -> None: ...

            def wait_stream(self, other: "Stream") -> None:
                log.append("wait_stream")

            def wait_event(self, event: "Event") -> None:
                log.append("wait_event")

        class Event:
            def record(self, stream: Stream) -> None:
                log.append("record")

        class CUDAGraph:
            def __init__(self) -> None:
                self.tape = Tape()

            def replay(self) -> None:
                log.append("replay")
                self.tape.replay()

        @contextlib.contextmanager
        def graph(*args: Any, **kwargs: Any):
            given = real_graph.bind(*args, **kwargs).arguments
            assert given["capture_error_mode"] == "thread_local"
            assert isinstance(given["stream"], Stream)
            assert given["pool"] == cuda.pools
            assert torch.is_inference_mode_enabled() is torch.is_grad_enabled() is False
            log.append("capture")
            with given["cuda_graph"].tape:
                yield
            cuda.captures += 1
            if cuda.fail is not None:
                raise cuda.fail

        def graph_pool_handle() -> int:
            self.pools += 1
            return self.pools

        main = Stream()
        for name, value in {
            "Stream": Stream, "Event": Event, "CUDAGraph": CUDAGraph, "graph": graph,
            "current_stream": lambda device: main, "graph_pool_handle": graph_pool_handle,
            "stream": contextlib.nullcontext, "device": contextlib.nullcontext,
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None, raising=False)
        monkeypatch.setattr(graphs.Recorder, "serves", lambda x: True)


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


@pytest.mark.parametrize("change", set(CHANGES) - {taller_positions})
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


# --------------------------------------------------------------------------- on a GPU


def on_gpu(**options: Any) -> Any:
    return accelerate(small(**options).cuda(), cuda_graphs=True, strict=True)


KERNELS = """
import torch
from test_graphs import GRAPHS, accelerate, error, fastvit, images, plain, replace, small

torch.set_grad_enabled(False)
fastvit.ops.set_backend("triton")
for dtype in (torch.bfloat16, torch.float16, torch.float32):
    model = accelerate(small().cuda().to(dtype), cuda_graphs=True, strict=True)
    for batch in (1, 3, 1, 3):
        x = images(model, batch).cuda().to(dtype)
        print(error(model(x).float(), plain(model, x).float()))
        replace(model)
    assert all(getattr(model, GRAPHS)._replays.values())
"""


@needs_gpu
def test_gpu_kernels_in_graphs():
    """In a process of its own, because this one interprets kernels. The same kernels run with and
    without a graph, so that even bfloat16 gives the same numbers."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
    code += "from fastvit._compat import import_timm; import_timm()\n" + KERNELS
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    errors = [float(line) for line in done.stdout.splitlines() if not line.startswith("torch.")]
    assert len(errors) == 12
    assert max(errors) <= TOLERANCE


@needs_gpu
@pytest.mark.parametrize("precision", ["keep", "bf16", "fp16"])
def test_gpu_replays_equal_plain_forwards(precision: str):
    model = accelerate(small().cuda(), cuda_graphs=True, precision=precision)
    for batch in (1, 3, 1, 3):
        x = images(model, batch).cuda()
        assert error(model(x), plain(model, x)) <= TOLERANCE
    assert len(getattr(model, GRAPHS)._replays) == 2


@needs_gpu
@pytest.mark.parametrize("change", [move, replace, assign, new_head, pooling, taller_positions])
def test_gpu_changes_are_noticed(change: Any):
    model = on_gpu()
    x = images(model).cuda()
    before = model(x)
    model.blocks[0].mlp.fc2.weight.mul_(1.5)
    assert error(model(x), plain(model, x)) <= TOLERANCE
    assert error(model(x), before) > TOLERANCE
    change(model)
    torch.cuda.empty_cache()
    assert error(model(x), plain(model, x)) <= TOLERANCE


@needs_gpu
def test_gpu_streams_and_threads_do_not_mix():
    model = on_gpu()
    inputs = [images(model).cuda() for _ in range(4)]
    expected = [plain(model, x) for x in inputs]
    torch.cuda.synchronize()
    results: list[list[Tensor]] = [[] for _ in inputs]

    def work(i: int) -> None:
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
            results[i] = [model(inputs[i]) for _ in range(50)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.cuda.synchronize()
    for outputs, wanted in zip(results, expected, strict=True):
        assert len(outputs) == 50
        assert max(error(y, wanted) for y in outputs) <= TOLERANCE


@needs_gpu
def test_gpu_a_forward_that_waits_runs_without_a_graph():
    class Waits(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * x.abs().max().item()

    model = on_gpu()
    model.fc_norm = Waits()
    x = images(model).cuda()
    with pytest.warns(RuntimeWarning, match="no CUDA graph for an input of"):
        ours = model(x)
    assert error(ours, plain(model, x)) <= TOLERANCE
    model.fc_norm = nn.Identity()
    assert error(model(x), plain(model, x)) <= TOLERANCE
    assert all(getattr(model, GRAPHS)._replays.values())
