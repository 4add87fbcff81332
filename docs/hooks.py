"""What mkdocs does first: a copy of the package for mkdocstrings, whose reader (griffe) wants an
``__init__.py`` in every folder, where kernels/ has none."""

import shutil
from pathlib import Path

ROOT = Path(__file__).parent.parent
COPY = ROOT / "build/docs/fastvit"  # mkdocs.yml's `paths`


def on_startup(command: str, dirty: bool) -> None:
    """Copy the package, Python files only, before mkdocstrings looks for the folder."""
    shutil.rmtree(COPY, ignore_errors=True)
    for path in [*(ROOT / "fastvit").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]:
        inside = path.relative_to(ROOT)
        target = COPY.parent / ("fastvit" / inside if inside.parts[0] == "kernels" else inside)
        target.parent.mkdir(parents=True, exist_ok=True)
        (target.parent / "__init__.py").touch()
        shutil.copy(path, target)
