"""`fit`: the training loop, the same for one process and many, and for any loss."""

from __future__ import annotations

import dataclasses
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastvit.check.environment import environment
from fastvit.train import distributed, state
from fastvit.train.curves import draw_curves
from fastvit.train.data import Batch, Data, TrainBatches, eval_batches, make_loader
from fastvit.train.objectives import (
    EvalFn,
    LossFn,
    classification_loss,
    classification_metrics,
    loss_metrics,
)
from fastvit.train.recipe import (
    Recipe,
    class_differences,
    differences,
    make_optimizer,
    read_config,
    stable_seed,
)

Row = dict[str, Any]


class Interrupted(RuntimeError):
    """A signal stopped the training after a step; `signum` is its number."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signum = signum


@dataclass
class Result:
    """Result of a training.

    Args:
        model: the one passed in, trained; without DDP around it.
        history: rows of metrics.jsonl: ``kind`` is ``train`` or ``test``.
        test: the last evaluation; with EMA, also ``ema_...``.
        broken: image files that could not be read.
        seconds: of this process.
    """

    model: nn.Module
    history: list[Row]
    test: Row
    broken: list[str]
    seconds: float


def fit(
    model: nn.Module,
    data: Data,
    recipe: Recipe,
    *,
    out: Path | None = None,
    resume: bool = False,
    loss: LossFn | None = None,
    evaluate: EvalFn | None = None,
    config: dict[str, Any] | None = None,
    device: str = "auto",
    parallel: str = "none",
    workers: int = 0,
    report: Callable[[Row], None] | None = None,
) -> Result:
    """Train a model.

    Seeds torch, Python and numpy. On one machine, the same arguments give the same weights, bit
    for bit on a CPU, whether or not the training was interrupted and resumed.

    Args:
        model: trained in place, on `device`.
        data: what to train and evaluate on.
        recipe: how.
        out: a new folder for metrics.jsonl, config.json, checkpoints, and in the end
            model.safetensors, ema.safetensors and curves.png; None to write nothing.
        resume: go on from the last checkpoint in `out`, with the same recipe.
        loss: (module, batch) to (mean loss, means to log); None: `classification_loss`.
        evaluate: (module, batches) to numbers; None: `classification_metrics`, or the mean of a
            `loss` that was given.
        config: more for config.json, so that others can rebuild model and data.
        device: ``auto``, ``cpu`` or ``cuda``.
        parallel: ``none``, ``ddp`` or ``fsdp``, within `distributed.process_group`.
        workers: processes that load images, for each rank.
        report: called on rank 0 with every row of metrics.jsonl.

    Returns:
        The trained model and what was measured.

    Raises:
        ValueError: options that do not fit, `out` is not new, or `resume` of another recipe.
        FloatingPointError: a loss or gradient that is not finite.
        Interrupted: SIGTERM or SIGINT; with `out`, a checkpoint has been written.
    """
    with _stop_signals() as stop:
        run = _Run(
            model, data, recipe, out, resume, loss, evaluate, config or {}, device, parallel,
            workers, report, stop,
        )  # fmt: skip
        return run.go()


@dataclass
class _Stop:
    """The signal that asked to stop, or 0."""

    signum: int = 0


@contextmanager
def _stop_signals() -> Iterator[_Stop]:
    """SIGTERM and SIGINT are noted; a second one acts as it would have without us."""
    stop = _Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread may handle signals
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def note(number: int, frame: Any) -> None:
        stop.signum = number
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, note)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Run:
    """One call of `fit`."""

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        recipe: Recipe,
        out: Path | None,
        resume: bool,
        loss: LossFn | None,
        evaluate: EvalFn | None,
        config: dict[str, Any],
        device: str,
        parallel: str,
        workers: int,
        report: Callable[[Row], None] | None,
        stop: _Stop,
    ) -> None:
        self.data, self.recipe, self.out, self.workers = data, recipe, out, workers
        self.report, self.stop = report, stop
        self.loss = loss or classification_loss(recipe, len(data.classes))
        self.evaluate = evaluate or (loss_metrics(loss) if loss else classification_metrics)
        self.device = distributed.pick_device(device)
        self.rank, self.world = distributed.rank(), distributed.world()
        TrainBatches(len(data.train), recipe, self.rank, self.world)  # refuses what does not fit
        self.steps_per_epoch = len(data.train) // recipe.batch_size
        self.steps = recipe.epochs * self.steps_per_epoch
        self.started = time.monotonic()
        self.step = 0
        self.history: list[Row] = []
        self.pending: list[Row] = []  # of steps since the last log row, on the device
        self.broken: set[str] = set()
        self.agreed = False  # that all ranks stop
        self.marked = self.started  # since when images are counted

        self._open(resume, config)
        state.seed_everything(stable_seed(recipe.seed, self.rank))
        self.model = model.to(self.device).train()
        self.module = distributed.wrap(self.model, parallel, self.device)
        self.optimizer = make_optimizer(self.model, recipe)
        self.ema = state.Ema(self.model, recipe.ema) if recipe.ema else None
        checkpoint = state.latest(out / "checkpoints") if out and resume else None
        if checkpoint is not None:
            self.step = state.load(checkpoint, self.model, self.optimizer, self.ema, self.device)
        self._keep_rows()

    # ------------------------------------------------------------------ the run folder

    def _open(self, resume: bool, config: dict[str, Any]) -> None:
        """Make the run folder, or check that it holds the same recipe."""
        if self.out is None:
            if resume:
                raise ValueError("resume needs the folder of the run")
            return
        file, plan = self.out / "config.json", dataclasses.asdict(self.recipe)
        if resume:
            if not file.exists():
                raise ValueError(f"nothing to resume in {self.out}: it has no config.json")
            stored = read_config(file)
            changed = differences(stored.get("recipe", {}), plan)
            if "classes" in stored and "classes" in config:
                changed += class_differences(stored["classes"], config["classes"])
            if "images" in stored and "images" in config:
                changed += [f"images, {line}" for line in differences(
                    stored["images"], config["images"]
                )]  # fmt: skip
            if changed:
                raise ValueError(f"{self.out} was started otherwise: {'; '.join(changed)}")
            return
        if self.out.exists() and any(self.out.iterdir()):
            raise ValueError(f"{self.out} exists and is not empty: resume it or choose another")
        state.barrier()  # every rank has looked
        if self.rank == 0:
            self.out.mkdir(parents=True, exist_ok=True)
            content = {**config, "recipe": plan, "environment": environment()}
            state.write_text(file, json.dumps(content, indent=2) + "\n")

    def _keep_rows(self) -> None:
        """Drop the rows of steps that will be done again."""
        if self.out is None:
            return
        file = self.out / "metrics.jsonl"
        if file.exists():
            rows = (json.loads(line) for line in file.read_text().splitlines())
            self.history = [row for row in rows if row["step"] <= self.step]
        state.barrier()
        if self.rank == 0:
            state.write_text(file, "".join(json.dumps(row) + "\n" for row in self.history))

    def _add(self, row: Row) -> None:
        self.history.append(row)
        if self.rank == 0:
            if self.out is not None:
                with open(self.out / "metrics.jsonl", "a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
            if self.report is not None:
                self.report(row)

    def _save(self) -> None:
        if self.out is not None:
            folder = self.out / "checkpoints"
            state.save(folder, self.step, self.model, self.optimizer, self.ema, self.device)

    # ------------------------------------------------------------------ the loop

    def go(self) -> Result:
        """All that is left to do."""
        recipe = self.recipe
        batches = TrainBatches(len(self.data.train), recipe, self.rank, self.world, self.step)
        loader = iter(
            make_loader(
                self.data.train, batches, workers=self.workers, pin=self.device.type == "cuda"
            )
        )
        self.marked = time.monotonic()
        while self.step < self.steps:
            self._step(loader)
            epoch_ends = self.step % self.steps_per_epoch == 0
            alone = self.world == 1 and self.stop.signum != 0
            if self.step % recipe.log_every == 0 or epoch_ends or alone:
                self._log()
            epoch = self.step // self.steps_per_epoch
            if epoch_ends and (epoch % recipe.eval_every == 0 or self.step == self.steps):
                self._test()
            due = recipe.save_every and self.step % recipe.save_every == 0
            if epoch_ends or due:
                self._log()  # a loss that is not finite is found before it is saved
                self._save()
            self._maybe_stop()
        return self._finish()

    def _step(self, loader: Iterator[Batch]) -> None:
        recipe = self.recipe
        rate = recipe.lr_at(self.step, self.steps_per_epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        sums: Row = {}
        for k in range(recipe.accumulate):
            batch = self.data.to_model(next(loader), self.device)
            self.broken.update(batch.broken)
            with distributed.gradient_sync(self.module, k == recipe.accumulate - 1):
                with self._autocast():
                    loss, others = self.loss(self.module, batch)
                (loss / recipe.accumulate).backward()
            for name, value in {"loss": loss, **others}.items():
                sums[name] = sums.get(name, 0) + value.detach() / recipe.accumulate
        if recipe.clip:
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip)
            sums["grad_norm"] = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # pyright: ignore
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.update(self.step)
        self.step += 1
        self.pending.append(sums)

    def _autocast(self) -> Any:
        if self.recipe.amp:
            return torch.autocast(self.device.type, torch.bfloat16)
        return nullcontext()

    def _log(self) -> None:
        """One row for the steps since the last, averaged over steps and ranks."""
        if not self.pending:
            return
        names = list(self.pending[0])
        rows = [torch.stack([row[name].double() for name in names]) for row in self.pending]
        stop = torch.tensor([float(self.stop.signum > 0)], device=self.device).double()
        *values, stops = distributed.all_sum(torch.cat([*rows, stop])).tolist()
        if stops and not self.stop.signum:
            self.stop.signum = int(signal.SIGTERM)  # another rank was told to stop
        self.agreed = stops > 0
        table = torch.tensor(values).view(len(rows), len(names)) / self.world  # (steps, names)
        first = self.step - len(rows)
        bad = (~table.isfinite()).nonzero().tolist()
        if bad:
            step, name = bad[0]
            raise FloatingPointError(
                f"{names[name]} is {table[step, name]} at step {first + step + 1} of {self.steps}: "
                f"a smaller lr (now {self.recipe.lr:g}), a longer warm-up or clipping may help"
                + (f"; checkpoints are in {self.out}" if self.out else "")
            )
        now = time.monotonic()
        self._add(
            {
                "kind": "train",
                "step": self.step,
                "epoch": round(self.step / self.steps_per_epoch, 4),
                **{n: v for n, v in zip(names, table.mean(0).tolist(), strict=True)},
                "lr": self.recipe.lr_at(self.step - 1, self.steps_per_epoch),
                "images_per_s": len(rows) * self.recipe.batch_size / (now - self.marked),
            }
        )
        self.pending, self.marked = [], now

    def _test(self) -> None:
        row: Row = {"kind": "test", "step": self.step, "epoch": self.step // self.steps_per_epoch}
        row |= self._measure()
        if self.ema is not None:
            with self.ema.applied():
                row |= {f"ema_{name}": value for name, value in self._measure().items()}
        self._add(row)
        self.marked = time.monotonic()

    def _measure(self) -> dict[str, Any]:
        """The evaluation of the weights as they are."""
        self.module.eval()
        with torch.no_grad(), self._autocast():
            found = self.evaluate(self.module, self._eval_batches())
        self.module.train()
        return {name: value for name, value in found.items() if name != "per_class"}

    def _eval_batches(self) -> Iterator[Batch]:
        size = len(self.data.test)
        keys = eval_batches(size, self.recipe.batch_size, self.rank, self.world)
        pin = self.device.type == "cuda"
        for batch in make_loader(self.data.test, keys, workers=self.workers, pin=pin):
            self.broken.update(batch.broken)
            yield self.data.to_model(batch, self.device)

    def _maybe_stop(self) -> None:
        if not (self.agreed if self.world > 1 else self.stop.signum) or self.step == self.steps:
            return
        name = signal.Signals(self.stop.signum).name
        message = f"{name} after step {self.step} of {self.steps}"
        if self.out is None:
            raise Interrupted(self.stop.signum, f"{message}; nothing was saved")
        self._save()
        raise Interrupted(
            self.stop.signum, f"{message}; resume goes on from the checkpoint in {self.out}"
        )

    def _finish(self) -> Result:
        broken = distributed.gather_names(self.broken)
        if self.out is not None:
            state.write_weights(self.out / "model.safetensors", self.model)
            if self.ema is not None:
                with self.ema.applied():
                    state.write_weights(self.out / "ema.safetensors", self.model)
            if self.rank == 0:
                draw_curves(self.history, self.out / "curves.png")
        tests = [row for row in self.history if row["kind"] == "test"]
        seconds = time.monotonic() - self.started
        return Result(self.model, self.history, tests[-1], broken, seconds)
