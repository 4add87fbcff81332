"""Everything that needs a GPU, in one command, within a time budget, the most valuable first.

    PYTHONPATH=. python3 benchmarks/gpu.py --minutes 5

The order, and why:

1. ``environment``: hardware, versions, clocks, and the roof that every share of it refers to.
2. Correctness, since no speed of a wrong kernel means anything: the certificate of every op, whole
   models beside timm's, and proofs of Hopper's kernels for the ledger. These time nothing and spend
   most of their time in Triton's compiler, so they share the GPU, a process each.
3. ``latency``: the kernels that CUDA graphs capture for few tokens, which no GPU had run when they
   were written: their numerics, then batch 1 to 8 with and without them, and without programmatic
   dependent launch. ``models``: ViT-B/16 at batch 256 and at batch 1, the two figures the project
   is judged by, beside the peers that are ready in seconds. ``ops``: where the models' time goes,
   op by op, at ViT-B's shapes.
4. ``tune``: other tiles than the tables', for two minutes; what wins is in the record.
5. ``first_call``, ``training``, ``models_more``: what a newcomer waits for, with empty compiler
   caches; one step; max-autotune, which takes minutes; transformers and torchvision, other sizes
   and batches.

Each step is a process of its own, killed when it takes too long, and consists of items. This
process alone writes: after every item the record that the step belongs to, `RECORDS` files under
``--out``, beside them ``gpu.log`` and the ledger's proofs, ``proven_<op>.json`` in the form of
`kernels/<op>/proven/`: nine files. Running the command again goes on where it stopped: items that
have a result are not run again (delete the record to do so), those that failed are tried once more.

Needs torch, triton and timm; transformers and torchvision are timed where they are installed. An
archive without .git is told its commit by ``--commit``.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_steps import (
    ROOT,
    Item,
    Settings,
    device_works,
    environment_items,
    first_call_items,
    gpu_state,
    latency_items,
    load,
    measured_roof,
    model_items,
    numerics_items,
    op_items,
    parity_items,
    proof_items,
    shrink,
    tune_items,
)

RESULTS = ROOT / "benchmarks" / "results"
DEVICE_LOST = 3  # exit status of a step whose GPU context is beyond use
MARGIN = 8.0  # seconds kept for the last table
NEWS = "@gpu.py "  # before what a step tells this process on its standard output


@dataclass(frozen=True)
class Step:
    """One process. `items` are made inside it, by name."""

    name: str
    items: Callable[[Settings], dict[str, Item]]
    record: str  # the file that its results go to
    limit: float = 180.0  # seconds for all of it
    stall: float = 90.0  # seconds for one item
    together: bool = False  # runs at the same time as its neighbours
    fresh: bool = False  # with empty compiler caches
    strict: bool = False  # a kernel that does not compile is an error, not plain PyTorch


# --------------------------------------------------------------------------- steps

B16, S16, L16 = (f"vit_{size}_patch16_224" for size in ("base", "small", "large"))
MORE = (
    ("model", B16, 256, "timm"),
    ("model", B16, 1, "timm"),
    ("model", B16, 256, "all"),
    ("model", B16, 32, "timm"),
    ("model", B16, 8, "timm"),
    ("model", B16, 128, "few"),
    ("model", L16, 128, "few"),
    ("model", S16, 256, "few"),
    ("model", "vit_base_patch16_384", 64, "few"),
    ("model", "vit_so400m_patch14_siglip_gap_224", 64, "few"),
    ("train", B16, 256, "timm"),
    ("model", L16, 1, "few"),
    ("model", S16, 1, "few"),
)


def _correct(name: str, items: Callable[[Settings], dict[str, Item]]) -> Step:
    return Step(name, items, "numerics", together=True, strict=True)


def _numerics(*ops: str) -> Step:
    return _correct(f"numerics_{ops[0]}", functools.partial(numerics_items, names=ops))


def _models(name: str, *runs: tuple[str, str, int, str]) -> Step:
    # max-autotune of one model alone takes minutes
    items = functools.partial(model_items, runs=runs)
    return Step(name, items, "models", limit=1500, stall=400)


STEPS = (
    Step("environment", environment_items, "environment", limit=60),
    _numerics("attention_qkv"),
    _numerics("attention"),
    _numerics("linear"),
    _correct("parity", parity_items),
    _numerics("mlp", "norm_mlp"),
    _numerics("norm_linear", "attention_packed"),
    _numerics("patch_embed", "layer_norm", "rms_norm"),
    _numerics("fp8_linear", "fp8_layer_norm", "fp8_attention", "fp8_quantize"),
    _correct("proofs", proof_items),
    Step("latency", latency_items, "latency", limit=100, stall=60, strict=True),
    _models("models", ("model", B16, 256, "few"), ("model", B16, 1, "few")),
    Step("ops", op_items, "ops", limit=420),
    Step("tune", tune_items, "tune", limit=200, stall=120),
    Step("first_call", first_call_items, "models", limit=120, fresh=True),
    _models("training", ("train", B16, 256, "few")),
    _models("models_more", *MORE),
)


def run_step(step: Step, settings: Settings, done: set[str]) -> int:
    """Inside the step's process: every item that is not `done`, each told at once."""
    import torch

    from fastvit.check.environment import environment

    if settings.dry_run:
        shrink()

    def tell(**news: Any) -> None:
        print(f"\n{NEWS}{json.dumps(news)}", flush=True)

    header = {
        "dry_run": settings.dry_run,
        "environment": environment(),
        "device": settings.device,
        "dtype": "float32" if settings.dry_run else "bfloat16",
        "seed": settings.seed,
        "quick": False,
        "notes": [],
    }
    if step.name != "environment":
        header["roof"] = measured_roof(settings)
    tell(header=header)
    for name, item in step.items(settings).items():
        if name in done:
            continue
        tell(running=name)
        try:
            tell(result={"step": step.name, "item": name, **item()})
        except Exception as error:
            tell(failed=" ".join(f"{type(error).__name__}: {error}".split())[:500])
        if not device_works(settings.device):
            return DEVICE_LOST
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    tell(gpu_after=gpu_state())
    return 0


# --------------------------------------------------------------------------- files


class Record:
    """A file of results, which steps may share."""

    def __init__(self, path: Path) -> None:
        self.path, self.lock = path, threading.Lock()
        self.values = {"results": [], "failed": {}, "complete": [], **load(path)}

    def of(self, step: str) -> list[dict[str, Any]]:
        """A step's results."""
        return [result for result in self.values["results"] if result["step"] == step]

    def save(self) -> None:
        """In one go, so that who is killed leaves a whole file; NaN and infinity become null."""
        plain = json.loads(json.dumps(self.values), parse_constant=lambda name: None)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(plain, indent=1) + "\n")
        temporary.replace(self.path)


def folder_name() -> str:
    """``nvidia-h200_202611_torch2.11.0``: what the results of this machine are kept under."""
    import torch

    gpu = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    return f"{gpu}_{time.strftime('%Y%m')}_torch{torch.__version__.split('+')[0]}"


# --------------------------------------------------------------------------- processes


class Child:
    """A step's process, started again after a failure for the items that are left."""

    def __init__(self, step: Step, settings: Settings, record: Record, deadline: float) -> None:
        self.step, self.settings, self.record = step, settings, record
        self.deadline = min(deadline, time.monotonic() + step.limit)
        self.caches = tempfile.mkdtemp()
        self.log = (settings.out / "gpu.log").open("a")
        self.running: str | None = None
        self.failed = record.values["failed"][step.name] = {}
        self.start()

    def start(self) -> None:
        environment = {
            **os.environ,
            "PYTHONUNBUFFERED": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
            "FASTVIT_CACHE": self.caches,  # of tuned tiles, which nobody else is to use
        }
        for name in ("TRITON_INTERPRET", "FASTVIT_BACKEND"):
            environment.pop(name, None)
        if self.settings.dry_run:
            environment["TRITON_INTERPRET"] = "1"
        if self.step.strict:
            environment["FASTVIT_BACKEND"] = "triton"
        if self.step.fresh:
            for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
                environment[name] = f"{self.caches}/{name}"
        done = {*self.failed, *(result["item"] for result in self.record.of(self.step.name))}
        command = [sys.executable, sys.argv[0], "--step", self.step.name]
        command += ["--out", str(self.settings.out), "--seed", str(self.settings.seed)]
        command += ["--done", json.dumps([*done])]
        command += ["--dry-run"] * self.settings.dry_run
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=self.log, text=True, env=environment,
            start_new_session=True,
        )  # fmt: skip
        self.heard = time.monotonic()
        self.listener = threading.Thread(target=self.listen, daemon=True)
        self.listener.start()

    def listen(self) -> None:
        """Until the process ends."""
        for line in self.process.stdout or ():
            if not line.startswith(NEWS):
                self.log.write(line)
                continue
            self.heard = time.monotonic()
            ((kind, news),) = json.loads(line.removeprefix(NEWS)).items()
            with self.record.lock:
                if kind == "header":
                    self.record.values = {**news, **self.record.values}
                elif kind == "result":
                    self.record.values["results"].append(news)
                elif kind == "failed":
                    self.failed[str(self.running)] = news
                elif kind == "gpu_after":
                    self.record.values[kind] = news
                    self.record.values["complete"] += [self.step.name] * (not self.failed)
                self.running = news if kind == "running" else None
                self.record.save()

    def check(self) -> str | None:
        """None while it runs, then how it ended."""
        status = self.process.poll()
        if status is None:
            if time.monotonic() > self.deadline:
                self.stop()
                return self.close("out of time")
            if time.monotonic() - self.heard < self.step.stall:
                return None
            self.stop()
            status = f"took longer than {self.step.stall:.0f} s"
        else:
            self.listener.join()
            if status == 0:
                return self.close("items failed" if self.failed else "done")
            status = f"ended with status {status}"
        if self.running:
            with self.record.lock:
                self.failed[self.running], self.running = status, None
                self.record.save()
        elif status != f"ended with status {DEVICE_LOST}":
            return self.close(f"failed: {status}, see {self.log.name}")
        if time.monotonic() > self.deadline:
            return self.close("out of time")
        self.start()
        return None

    def stop(self) -> None:
        """The process and what it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.listener.join(5)

    def close(self, outcome: str) -> str:
        self.log.close()
        shutil.rmtree(self.caches, ignore_errors=True)
        return outcome


def run_all(
    steps: list[Step], settings: Settings, records: dict[str, Record], deadline: float
) -> dict[str, str]:
    """Every step for as long as there is time; outcomes by name."""
    outcomes: dict[str, str] = {}
    waiting, active = list(steps), list[Child]()
    try:
        while waiting or active:
            while waiting and _may_start(waiting[0], active):
                step = waiting.pop(0)
                if step.name in records[step.record].values["complete"]:
                    outcomes[step.name] = "done before"
                elif time.monotonic() > deadline:
                    outcomes[step.name] = "not started: no time left"
                else:
                    print(f"{step.name} ...", flush=True)
                    active.append(Child(step, settings, records[step.record], deadline))
            time.sleep(0.1)
            for child in list(active):
                outcome = child.check()
                if outcome is not None:
                    outcomes[child.step.name] = outcome
                    active.remove(child)
    finally:
        for child in active:
            child.stop()
            child.close("stopped")
    return outcomes


def _may_start(step: Step, active: list[Child]) -> bool:
    """Alone, or together with others that time nothing, one for each core."""
    if not active:
        return True
    several = len(active) < (os.cpu_count() or 1)
    return several and all(other.together for other in (step, *(child.step for child in active)))


# --------------------------------------------------------------------------- the last table


def summary(
    steps: tuple[Step, ...], records: dict[str, Record], outcomes: dict[str, str]
) -> tuple[str, bool]:
    """A short table, and whether all that ran is right."""
    lines, right = [], True
    for step in steps:
        record = records[step.record]
        results, failed = record.of(step.name), record.values["failed"].get(step.name, {})
        wrong = [result["item"] for result in results if verdict(result) is False]
        right = right and not wrong and not failed and not outcomes[step.name].startswith("failed")
        verdicts = [verdict(result) for result in results]
        checked = len(results) - verdicts.count(None)
        passed = f", {verdicts.count(True)} of {checked} pass the numerics" if checked else ""
        lines.append(f"{step.name:22} {outcomes[step.name]}; {len(results)} items{passed}")
        lines += [f"  FAIL {item}" for item in wrong]
        lines += [f"  {item}: {why[:110]}" for item, why in failed.items()]
        lines += [f"  {text}" for text in map(speed, results) if text]
    return "\n".join(lines), right


def verdict(result: dict[str, Any]) -> bool | None:
    """Whether its numerics passed; None where there were none."""
    return result.get("numerics", result).get("passed")


def speed(result: dict[str, Any]) -> str | None:
    """One line of a timed result."""
    if "roof" in result:
        roof = result["roof"]
        rates = roof["matmul_flops_per_s"] / 1e12, roof["copy_bytes_per_s"] / 1e12
        return f"roof {rates[0]:.4g} TFLOP/s, {rates[1]:.3g} TB/s"
    if "first_call_s" in result:
        return f"{result['item']:42} first call {result['first_call_s']:.2f} s"
    if "modes" in result:
        times = result["times"]["gpu"].items()
        words = ", ".join(f"{mode} {time['median'] * 1e6:.0f}" for mode, time in times)
        return f"{result['item']:42} us on the GPU: {words}"
    if "tuned" in result or "skipped" in result:
        return skipped_or_tuned(result)
    if not result.get("contenders") or "fastvit" not in result["contenders"]:
        return None
    ours = min(
        # fp8 gives other numbers than its peers, so it is not what they are compared with
        (n for n in result["contenders"] if n.split()[0] == "fastvit" and "fp8" not in n),
        key=lambda name: result["contenders"][name]["median"],
    )
    fastest = result["contenders"][ours]
    ratio = f"{fastest['speedup']:.2f}x {result['fastest_peer']}" if fastest["speedup"] else ""
    return (
        f"{result['item']:42} {fastest['median'] * 1e6:10.1f} us {fastest['share_of_roof']:5.0%} "
        f"of roof {ratio} ({ours})"
    )


def skipped_or_tuned(result: dict[str, Any]) -> str:
    """The line of a search, or of what was left out."""
    if "skipped" in result:
        return f"skipped: {result['skipped']}"
    gains = [tuned["gain"] for tuned in result["tuned"] if tuned.get("gain")]
    best = f", at best {max(gains):.2f}x" if gains else ""
    return f"{result['item']:42} {len(result['tuned'])} cases tuned{best}"


# --------------------------------------------------------------------------- the command


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=5.0, help="for all of it")
    parser.add_argument("--out", type=Path, help=f"folder of the records; below {RESULTS}")
    parser.add_argument("--seed", type=int, help="of inputs and weights; fresh by default")
    parser.add_argument("--commit", help="what this is an archive of, where there is no .git")
    parser.add_argument(
        "--dry-run", action="store_true", help="toy sizes in Triton's interpreter, without a GPU"
    )
    parser.add_argument("--step", help=argparse.SUPPRESS)  # inside a step's process
    parser.add_argument("--done", type=json.loads, default=[], help=argparse.SUPPRESS)
    args = parser.parse_args()
    deadline = time.monotonic() + 60 * args.minutes - MARGIN
    sys.path.insert(0, str(ROOT))
    if args.commit:
        os.environ["FASTVIT_COMMIT"] = args.commit
    if args.out is None:
        import torch

        if not args.dry_run and not torch.cuda.is_available():
            parser.error("PyTorch finds no GPU here; --dry-run does without")
        args.out = Path(tempfile.mkdtemp()) if args.dry_run else RESULTS / folder_name()
    args.out.mkdir(parents=True, exist_ok=True)
    seed = random.SystemRandom().randrange(2**31) if args.seed is None else args.seed
    settings = Settings(args.out, seed, args.dry_run)
    if args.step:
        step = next(step for step in STEPS if step.name == args.step)
        return run_step(step, settings, set(args.done))

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that no step outlives this
    records = {step.record: Record(args.out / f"{step.record}.json") for step in STEPS}
    first, *rest = STEPS
    if args.dry_run:  # nothing is timed in earnest, so all may run at once
        rest = [dataclasses.replace(step, together=True) for step in rest]
    outcomes = run_all([first], settings, records, deadline)
    if "roof" not in next(iter(records["environment"].values["results"]), {}):
        print(f"no roof, so nothing to go by: see {args.out / 'gpu.log'}")
        return 1
    outcomes |= run_all(rest, settings, records, deadline)
    text, right = summary(STEPS, records, outcomes)
    print(f"\n{text}\nrecords: {args.out}; run again to go on")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
