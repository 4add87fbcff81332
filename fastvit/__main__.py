"""`python -m fastvit`."""

from fastvit.cli.main import app

app(prog_name="fastvit")
