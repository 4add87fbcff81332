"""What several commands need: dtypes by name, consoles, strict JSON."""

from __future__ import annotations

import enum
import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)


class Dtype(str, enum.Enum):
    """A dtype by name; an Enum, since typer's lists take no Literal."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"

    @property
    def torch(self) -> torch.dtype:
        """torch's object of that name."""
        return getattr(torch, self.value)


FILE_WIDTH = 110  # columns of a table that goes to a file or a pipe


def console() -> Console:
    """Standard output."""
    return Console(width=None if sys.stdout.isatty() else FILE_WIDTH)


def progress_bar(*columns: ProgressColumn, show: bool = True) -> Progress:
    """On standard error, gone when done; nothing where that is no terminal, or without `show`."""
    error = Console(stderr=True)
    if not columns:
        text = TextColumn("{task.description}")
        columns = (text, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(
        *columns, console=error, transient=True, disable=not (show and error.is_terminal)
    )


def print_json(value: Any) -> None:
    """`value` as strict JSON on standard output; NaN and infinity become null."""
    typer.echo(json.dumps(finite(value), indent=2, allow_nan=False))


def finite(value: Any) -> Any:
    """A copy of a JSON-like `value` with None for NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def errors(command: str) -> Iterator[None]:
    """What bad input raises becomes one message, as `fail` prints it."""
    try:
        yield
    except (typer.Exit, typer.Abort):  # RuntimeErrors of click's
        raise
    except (ArithmeticError, ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        fail(command, str(error))


def fail(command: str, message: str) -> NoReturn:
    """Say what is wrong on standard error and exit with status 1."""
    typer.echo(f"fastvit {command}: {message}", err=True)
    raise typer.Exit(1)
