"""Everything that needs a GPU, in one command, within a time budget, the most valuable first.

    PYTHONPATH=. python3 benchmarks/gpu.py --minutes 9

The order, and why:

1. ``environment``: hardware, versions, clocks, and the roof that every share of it refers to.
2. ``numerics_*`` and ``parity``, at the same time: they time nothing, and spend most of their time
   in Triton's compiler. No speed of a wrong kernel means anything, so this comes before any.
3. ``tune``: tiles change every number below, so a table measured before it would be out of date.
   It is held to two minutes, so that one run reaches the models too. Its tiles are kept in --out,
   where only this script finds them; steps below check the numerics of what they time by
   themselves, and so check the tuned tiles.
4. ``models``: ViT-B/16 at batch 256 and at batch 1, the two figures the project is judged by; at
   first beside the peers that are ready in seconds, then beside max-autotune too, which may take
   more time than is left.
5. ``ops``: where the models' time goes, op by op, at ViT-B's shapes.
6. ``first_call``: what a newcomer waits for, with empty compiler caches.
7. ``training``: one step.
8. ``models_more``: transformers and torchvision, other sizes and batches.

Each step is a process of its own, killed when it takes too long, and each consists of items. Its
JSON under ``--out`` is written after every item. Running the command again goes on where it
stopped: a finished step is not run again (delete its JSON to do so), an unfinished one keeps the
items that it has and tries those that failed once more.

Needs torch, triton and timm; transformers and torchvision are timed where they are installed.
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
    load,
    measured_roof,
    model_items,
    numerics_items,
    op_items,
    parity_items,
    shrink,
    tune_items,
)

RESULTS = ROOT / "benchmarks" / "results"
DEVICE_LOST = 3  # exit status of a step whose GPU context is beyond use
MARGIN = 8.0  # seconds kept for the last table


@dataclass(frozen=True)
class Step:
    """One process. `items` are made inside it, by name."""

    name: str
    items: Callable[[Settings], dict[str, Item]]
    limit: float  # seconds for all of it
    stall: float = 90.0  # seconds for one item
    together: bool = False  # runs at the same time as its neighbours
    fresh: bool = False  # with empty compiler caches
    strict: bool = False  # a kernel that does not compile is an error, not plain PyTorch


# --------------------------------------------------------------------------- steps

B16, S16, L16 = (f"vit_{size}_patch16_224" for size in ("base", "small", "large"))
MORE = (
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


def _numerics(name: str, *ops: str) -> Step:
    items = functools.partial(numerics_items, names=ops)
    return Step(f"numerics_{name}", items, limit=180, together=True, strict=True)


def _models(name: str, *runs: tuple[str, str, int, str]) -> Step:
    # max-autotune of one model alone takes minutes
    return Step(name, functools.partial(model_items, runs=runs), limit=1500, stall=400)


STEPS = (
    Step("environment", environment_items, limit=60),
    _numerics("linear", "linear", "mlp", "norm_linear", "norm_mlp"),
    _numerics("attention", "attention", "attention_qkv", "attention_packed"),
    _numerics("other", "patch_embed", "layer_norm", "rms_norm"),
    _numerics("fp8", "fp8_linear", "fp8_layer_norm", "fp8_quantize"),
    Step("parity", parity_items, limit=180, together=True, strict=True),
    Step("tune", tune_items, limit=200, stall=120),
    _models("models", *(("model", B16, b, peers) for peers in ("few", "timm") for b in (256, 1))),
    Step("ops", op_items, limit=420),
    Step("first_call", first_call_items, limit=120, fresh=True),
    _models("training", ("train", B16, 256, "few")),
    _models("models_more", *MORE),
)


def run_step(step: Step, settings: Settings) -> int:
    """Inside the step's process: every item that is not done yet, each recorded at once."""
    import torch

    from fastvit.environment import environment

    if settings.dry_run:
        shrink()
    path = settings.out / f"{step.name}.json"
    record = load(path)
    if not record:
        record = {
            "step": step.name,
            "dry_run": settings.dry_run,
            "environment": environment(),
            "device": settings.device,
            "dtype": "float32" if settings.dry_run else "bfloat16",
            "seed": settings.seed,
            "quick": False,
            "notes": [],
            "results": [],
            "failed": {},
        }
        if step.name != "environment":
            record["roof"] = measured_roof(settings)
    done = {result["item"] for result in record["results"]} | set(record["failed"])
    for name, item in step.items(settings).items():
        if name in done:
            continue
        save(path, record | {"running": name})
        print(name, flush=True)
        try:
            record["results"].append({"item": name, **item()})
        except Exception as error:
            record["failed"][name] = " ".join(f"{type(error).__name__}: {error}".split())[:500]
            print(f"  {record['failed'][name]}", flush=True)
        save(path, record)
        if not device_works(settings.device):
            return DEVICE_LOST
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    save(path, record | {"complete": not record["failed"], "gpu_after": gpu_state()})
    return 0


# --------------------------------------------------------------------------- files


def save(path: Path, record: dict[str, Any]) -> None:
    """In one go, so that a killed step leaves a whole file; NaN and infinity become null."""
    plain = json.loads(json.dumps(record), parse_constant=lambda name: None)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(plain, indent=1) + "\n")
    temporary.replace(path)


def folder_name() -> str:
    """``nvidia-h200_202611_torch2.11.0``: what the results of this machine are kept under."""
    import torch

    gpu = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    return f"{gpu}_{time.strftime('%Y%m')}_torch{torch.__version__.split('+')[0]}"


# --------------------------------------------------------------------------- processes


class Child:
    """A step's process, started again after a failure for the items that are left."""

    def __init__(self, step: Step, settings: Settings, deadline: float) -> None:
        self.step, self.settings = step, settings
        self.path = settings.out / f"{step.name}.json"
        self.deadline = min(deadline, time.monotonic() + step.limit)
        self.caches = tempfile.mkdtemp() if step.fresh else None
        record = load(self.path)
        if record:
            save(self.path, record | {"failed": {}, "running": None})
        self.log = (settings.out / f"{step.name}.log").open("a")
        self.start()

    def start(self) -> None:
        environment = {
            **os.environ,
            "PYTHONUNBUFFERED": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
            "FASTVIT_CACHE": str(self.settings.out / "cache"),  # of tuned tiles
        }
        for name in ("TRITON_INTERPRET", "FASTVIT_BACKEND"):
            environment.pop(name, None)
        if self.settings.dry_run:
            environment["TRITON_INTERPRET"] = "1"
        if self.step.strict:
            environment["FASTVIT_BACKEND"] = "triton"
        if self.caches:
            for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
                environment[name] = f"{self.caches}/{name}"
        command = [sys.executable, sys.argv[0], "--step", self.step.name]
        command += ["--out", str(self.settings.out), "--seed", str(self.settings.seed)]
        command += ["--dry-run"] * self.settings.dry_run
        self.process = subprocess.Popen(
            command, stdout=self.log, stderr=self.log, env=environment, start_new_session=True
        )
        self.started = time.time()

    def check(self) -> str | None:
        """None while it runs, then how it ended."""
        status = self.process.poll()
        if status is None:
            written = self.path.stat().st_mtime if self.path.exists() else 0.0
            quiet = time.time() - max(self.started, written)
            if time.monotonic() > self.deadline:
                self.stop()
                return self.close("out of time")
            if quiet < self.step.stall:
                return None
            self.stop()
            status = f"took longer than {self.step.stall:.0f} s"
        elif status == 0:
            return self.close("done" if load(self.path).get("complete") else "items failed")
        else:
            status = f"ended with status {status}"
        record = load(self.path)
        running = record.get("running")
        if running:
            record["failed"][running] = status
            save(self.path, record | {"running": None})
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

    def close(self, outcome: str) -> str:
        self.log.close()
        if self.caches:
            shutil.rmtree(self.caches, ignore_errors=True)
        return outcome


def run_all(steps: list[Step], settings: Settings, deadline: float) -> dict[str, str]:
    """Every unfinished step for as long as there is time; outcomes by name."""
    outcomes: dict[str, str] = {}
    waiting, active = list(steps), list[Child]()
    try:
        while waiting or active:
            while waiting and _may_start(waiting[0], active):
                step = waiting.pop(0)
                if load(settings.out / f"{step.name}.json").get("complete"):
                    outcomes[step.name] = "done before"
                elif time.monotonic() > deadline:
                    outcomes[step.name] = "not started: no time left"
                else:
                    print(f"{step.name} ...", flush=True)
                    active.append(Child(step, settings, deadline))
            time.sleep(0.1)
            for child in list(active):
                outcome = child.check()
                if outcome is not None:
                    outcomes[child.step.name] = outcome
                    active.remove(child)
    finally:
        for child in active:
            child.stop()
    return outcomes


def _may_start(step: Step, active: list[Child]) -> bool:
    """Alone, or together with others that time nothing, one for each core."""
    if not active:
        return True
    several = len(active) < (os.cpu_count() or 1)
    return several and all(other.together for other in (step, *(child.step for child in active)))


# --------------------------------------------------------------------------- the last table


def summary(settings: Settings, steps: list[Step], outcomes: dict[str, str]) -> tuple[str, bool]:
    """A short table, and whether all that ran is right."""
    lines, right = [], True
    for step in steps:
        record = load(settings.out / f"{step.name}.json")
        results, failed = record.get("results", []), record.get("failed", {})
        wrong = [result["item"] for result in results if verdict(result) is False]
        right = right and not wrong and not failed and not outcomes[step.name].startswith("failed")
        verdicts = [verdict(result) for result in results]
        checked = len(results) - verdicts.count(None)
        passed = f", {verdicts.count(True)} of {checked} pass the numerics" if checked else ""
        lines.append(f"{step.name:18} {outcomes[step.name]}; {len(results)} items{passed}")
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
    if "tuned" in result:
        gains = [tuned["gain"] for tuned in result["tuned"] if tuned.get("gain")]
        best = f", at best {max(gains):.2f}x" if gains else ""
        return f"{result['item']:42} {len(result['tuned'])} cases tuned{best}"
    if "skipped" in result:
        return f"skipped: {result['skipped']}"
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


# --------------------------------------------------------------------------- the command


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="for all of it")
    parser.add_argument("--out", type=Path, help=f"folder of the records; below {RESULTS}")
    parser.add_argument("--seed", type=int, help="of inputs and weights; fresh by default")
    parser.add_argument(
        "--dry-run", action="store_true", help="toy sizes in Triton's interpreter, without a GPU"
    )
    parser.add_argument("--step", help=argparse.SUPPRESS)  # inside a step's process
    args = parser.parse_args()
    deadline = time.monotonic() + 60 * args.minutes - MARGIN
    sys.path.insert(0, str(ROOT))
    if args.out is None:
        import torch

        if not args.dry_run and not torch.cuda.is_available():
            parser.error("PyTorch finds no GPU here; --dry-run does without")
        args.out = Path(tempfile.mkdtemp()) if args.dry_run else RESULTS / folder_name()
    args.out.mkdir(parents=True, exist_ok=True)
    seed = random.SystemRandom().randrange(2**31) if args.seed is None else args.seed
    settings = Settings(args.out, seed, args.dry_run)
    if args.step:
        return run_step(next(step for step in STEPS if step.name == args.step), settings)

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that no step outlives this
    first, *rest = STEPS
    if args.dry_run:  # nothing is timed in earnest, so all may run at once
        rest = [dataclasses.replace(step, together=True) for step in rest]
    outcomes = run_all([first], settings, deadline)
    if "roof" not in next(iter(load(args.out / "environment.json").get("results", [])), {}):
        print(f"no roof, so nothing to go by: see {args.out / 'environment.log'}")
        return 1
    outcomes |= run_all(rest, settings, deadline)
    text, right = summary(settings, list(STEPS), outcomes)
    print(f"\n{text}\nrecords: {args.out}; run again to go on")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
