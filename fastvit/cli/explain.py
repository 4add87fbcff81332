"""`fastvit explain`: what of a model runs on our kernels, and why the rest does not."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated

import typer

from fastvit.cli._models import bare_model
from fastvit.cli._shared import console, errors, print_json, progress_bar
from fastvit.cli.doctor import path_taken


def explain(
    model: Annotated[
        str,
        typer.Argument(
            help="A model by timm's name, a run folder, a checkpoint folder or config.json of "
            "transformers or timm, or a checkpoint file of timm's train.py."
        ),
    ],
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Say what `fastvit.accelerate` would run, module by module, and why the rest stays.

    The model is built without weights: nothing is downloaded and nothing computed.
    """
    with errors("explain"), progress_bar() as bar:
        bar.add_task("building the model", total=None)
        from fastvit.accelerate.find import find_parts
        from fastvit.accelerate.plan import make_plan

        built = bare_model(model)
        plan = make_plan(built, find_parts(built))
    paths = {f"on a {kind.upper()}": path_taken(kind) for kind in ("cpu", "gpu")}
    backend = "; ".join(f"{path} {where} ({why})" for where, (path, why) in paths.items())
    plan = dataclasses.replace(plan, backend=backend)
    if as_json:
        print_json({"model": model, **json.loads(plan.to_json())})
    else:
        console().print(plan.note or plan.table())
