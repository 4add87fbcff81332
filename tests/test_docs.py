"""README and docs are true: their blocks run, their quotes stand in the code, their figures in a
record.

A block of Python or shell runs, in the order of its page, whose blocks share a namespace and a
temporary folder. The title of a block says otherwise: one of `NOT_RUN` is parsed only, a file's
name is where the block is quoted from. Nothing is downloaded: ``pretrained=True`` runs as False.
"""

import ast
import json
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import timm
import torch
import typer
from typer.core import TyperGroup
from typer.testing import CliRunner

import fastvit
from fastvit.cli.main import app

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES += sorted((ROOT / "examples").rglob("*.md"))
NOT_RUN = {"on a GPU", "on several machines", "downloads weights", "installs", "takes minutes"}
FENCE = re.compile(r'^```(\w+)(?: title="([^"]*)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
COMMANDS = cast(TyperGroup, typer.main.get_command(app)).commands


def blocks(page: Path, *languages: str) -> Iterator[tuple[int, str, str, str]]:
    """Line, language, title and text of the page's blocks in `languages`."""
    text = page.read_text()
    for found in FENCE.finditer(text):
        language, title, code = found.groups()
        if language in languages:
            yield text.count("\n", 0, found.start()) + 1, language, title or "", code


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def runs(page: Path) -> bool:
    return any(not title for *_, title, _ in blocks(page, "python", "sh"))


@pytest.mark.parametrize("page", [page for page in PAGES if runs(page)], ids=name)
def test_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for line, language, title, code in blocks(page, "python", "sh"):
        if title:
            continue
        if language == "python":
            offline = code.replace("pretrained=True", "pretrained=False")
            # a traceback names the page and its line
            exec(compile("\n" * line + offline, page, "exec"), namespace)
        else:
            for command in commands(code):
                run(command, monkeypatch)


def commands(code: str) -> list[list[str]]:
    """The words of every command, without comments."""
    lines = code.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def run(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """``fastvit ...`` or ``python FILE ...`` of the repository, in this process."""
    program, *arguments = words
    if program == "python":
        monkeypatch.setattr(sys, "argv", arguments)
        runpy.run_path(str(ROOT / arguments[0]), run_name="__main__")
        return
    assert program == "fastvit", words
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, f"{shlex.join(words)}\n{done.output}\n{done.exception!r}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_what_does_not_run_is_right_as_far_as_reading_goes(page):
    for _, language, title, code in blocks(page, "python", "sh", "json"):
        if not title:
            continue
        if title not in NOT_RUN:
            file = ROOT / title
            assert file.is_file(), f"{title} is neither a file nor one of {NOT_RUN}"
            assert quoted(code, file.read_text()), f"{title} has changed:\n{code}"
        elif language == "python":
            for node in ast.walk(ast.parse(code)):
                if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "fastvit":
                    assert hasattr(fastvit, node.attr), ast.unparse(node)
        else:
            for words in commands(code):
                known(words)


def quoted(code: str, source: str) -> bool:
    """Whether the parts of `code`, between lines that are "...", stand in `source` in order."""
    place = 0
    for part in re.split(r"^ *\.\.\.\n", code, flags=re.MULTILINE):
        place = source.find(part, place)
        if place < 0:
            return False
    return True


def known(words: list[str]) -> None:
    """A fastvit command's name and options exist."""
    if "fastvit" in words:
        command, *options = words[words.index("fastvit") + 1 :]
        assert command in COMMANDS, words
        COMMANDS[command].make_context(command, list(options))


def test_every_command_is_in_the_list():
    listed = re.findall(
        r"^\| `fastvit ([\w-]+)", (ROOT / "docs/index.md").read_text(), re.MULTILINE
    )
    assert sorted(listed) == sorted(COMMANDS)


def test_links_to_files_lead_somewhere():
    """Those of the site are checked by its build."""
    for page in [*ROOT.glob("*.md"), *(ROOT / "examples").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
            assert "://" in target or (page.parent / target).exists(), f"{page}: {target}"


def test_the_readme_shows_what_explain_prints(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    fastvit.explain(fastvit.accelerate(timm.create_model("vit_base_patch16_224")))
    printed = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    (shown,) = (text.splitlines() for *_, text in blocks(ROOT / "README.md", "text"))
    assert shown[:-1] == printed[:-1]
    assert shown[-1].strip() == "the ops run as: Triton"  # here they do not


def test_the_table_of_numerics_is_of_its_record():
    """Worst ratio of each op's outputs, then of its gradients."""
    page = (ROOT / "docs/numerics.md").read_text()
    (path,) = set(re.findall(r"benchmarks/results/\S+interpreter\.json", page))
    entries = json.loads((ROOT / path).read_text())["certificate"]
    verdict = f"{sum(entry['passed'] for entry in entries)} of {len(entries)} cases"
    assert verdict in page
    assert verdict in (ROOT / "README.md").read_text()
    dtypes = ("bfloat16", "float16", "float32")
    lines = re.findall(r"^\| (`.*?`) \| (.*) \|$", page, re.MULTILINE)
    assert {op for ops, _ in lines for op in ops.split(", ")} == {f"`{e['op']}`" for e in entries}
    for ops, shown in lines:
        cells = []
        for dtype in dtypes:
            rows = [
                row for e in entries
                if f"`{e['op']}`" in ops.split(", ") and e["dtype"] == dtype for row in e["rows"]
            ]  # fmt: skip
            worst = [
                max((row["ratio"] for row in rows if row["name"].startswith(kind)), default=None)
                for kind in ("output", "grad")
            ]
            cells.append(" / ".join("-" if value is None else f"{value:.2f}" for value in worst))
        assert shown == " | ".join(cells), ops


def test_a_quote_that_is_not_there_and_a_command_that_is_not_there_are_noticed():
    assert quoted("a\n...\nc\n", "a\nb\nc\n")
    assert not quoted("c\n...\na\n", "a\nb\nc\n")
    known(["fastvit", "train", "--epochs", "3"])
    with pytest.raises(AssertionError):
        known(["fastvit", "trian"])
    with pytest.raises(Exception, match="No such option: --epoch"):
        known(["fastvit", "train", "--epoch", "3"])


def test_the_ratios_of_the_benchmarks_page_are_the_records():
    page = (ROOT / "docs/benchmarks.md").read_text()
    (path,) = set(re.findall(r"benchmarks/results/\S+/models\.json", page))
    times = {
        (result["batch"], name): timing["median"]
        for result in json.loads((ROOT / path).read_text())["results"]
        for name, timing in result["contenders"].items()
    }
    compiled, overhead = times[256, "timm + torch.compile"], times[1, "timm + reduce-overhead"]
    forms = ("fastvit", "fastvit + CUDA graphs", "fastvit + fp8 + CUDA graphs")
    eager, graph, fp8 = (f"{compiled / times[256, form]:.2f}" for form in forms)
    assert f"fastvit is {eager} times as fast" in page
    assert f"in a graph {graph}, with fp8 in a graph {fp8}" in page
    assert f"{overhead / times[1, 'fastvit + CUDA graphs']:.2f} times as fast as `reduce-" in page
