"""`fastvit`: every command is a function in a file of its own."""

from __future__ import annotations

import typer

from fastvit.cli.attention_map import attention_map
from fastvit.cli.audit import audit
from fastvit.cli.bench import bench
from fastvit.cli.coverage import coverage
from fastvit.cli.demo import demo
from fastvit.cli.doctor import doctor
from fastvit.cli.embed import embed
from fastvit.cli.eval import evaluate
from fastvit.cli.explain import explain
from fastvit.cli.export import export
from fastvit.cli.finetune import finetune
from fastvit.cli.list import list_models
from fastvit.cli.numerics import numerics
from fastvit.cli.paper import paper
from fastvit.cli.predict import predict
from fastvit.cli.pretrain import pretrain
from fastvit.cli.report import report
from fastvit.cli.train import train
from fastvit.cli.tune import tune

app = typer.Typer(
    name="fastvit",
    help="Vision Transformers on Triton kernels: run them, check them, time them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
app.command()(demo)
app.command()(explain)
app.command()(predict)
app.command()(attention_map)
app.command()(export)
app.command()(train)
app.command()(finetune)
app.command("eval")(evaluate)
app.command()(embed)
app.command()(pretrain)
app.command()(paper)
app.command()(numerics)
app.command()(bench)
app.command()(report)
app.command()(coverage)
app.command()(audit)
app.command()(tune)
app.command("list")(list_models)
app.command()(doctor)

if __name__ == "__main__":
    app()
