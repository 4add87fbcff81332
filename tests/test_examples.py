"""The examples run, and print what their docstrings say."""

import json
import re
import runpy
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

EXAMPLES = Path(__file__).parent.parent / "examples"
SAYS = {  # a pattern of the last line, and what its number is at least
    "accelerate_timm.py": (r"restored: (True)", None),
    "accelerate_transformers.py": (r"attn_implementation='fastvit': within (\S+)", None),
    "dense.py": (r"intersection over union on 8 new pictures: (\d+)%", 60),
    "embed_folder.py": (r"(\d+) of 12 neighbours are of the same photograph", 10),
    "finetune.py": (r"fine-tuned at 16x16 from random weights: top-1 (\S+)%", None),
}
QUICK = {"accelerate_transformers.py", "embed_folder.py"}


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in SAYS]
)
def test_example_runs(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    *_, last = capsys.readouterr().out.splitlines()
    pattern, least = SAYS[name]
    found = re.fullmatch(pattern, last)
    assert found is not None, last
    assert least is None or float(found[1]) >= least


def test_every_example_is_tested():
    others = {"saliency.py"}  # test_dense.py
    assert {path.name for path in EXAMPLES.glob("*.py")} == {*SAYS} | others


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")  # of its own process
    notebook = nbformat.read(EXAMPLES / "tour.ipynb", as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=120, resources=resources).execute()  # a cell's error raises
    text = "".join(o.get("text", "") for c in notebook.cells for o in c.get("outputs", ()))
    assert text.count(": pass") == 4
    assert "FAIL" not in text


def test_the_notebook_is_stored_with_its_pictures():
    notebook = nbformat.read(EXAMPLES / "tour.ipynb", as_version=4)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert any("image/jpeg" in output.get("data", {}) for output in outputs)
    assert not any(output.output_type == "error" for output in outputs)
    assert all(cell.outputs for cell in notebook.cells[3:] if cell.cell_type == "code")


def test_the_papers_accuracies_are_those_of_the_records():
    text = (EXAMPLES / "paper/README.md").read_text()
    lines = re.findall(r"^\| \[.*?\]\((.*?)/table\.md\)(.*)$", text, re.MULTILINE)
    assert len(lines) == 6
    for folder, line in lines:
        record = json.loads((EXAMPLES / "paper" / folder / "results.json").read_text())
        means = {f"{row['mean']:.1f}" for row in record["summary"]}
        assert set(re.findall(r"(\d+\.\d) %", line)) <= means, folder
