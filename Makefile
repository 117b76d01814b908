# make demo   set up, compare every method on the embedded model, write report/report.html
# make test   set up, lint, check types and floors, run the tests (make test SLOW=1 runs the slow ones too)
# make oldest set up, in a place of its own, the oldest transformers that jeton works with, and run the models' tests on it

PYTHON ?= python3
BIN := .venv/bin
OLDEST := $(shell sed -n 's/.*"transformers>=\([0-9.]*\)".*/\1/p' pyproject.toml).0
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test oldest docs clean

demo: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/jeton compare --out report  # the embedded model is small: more threads only wait for each other
	@echo "Open $(CURDIR)/report/report.html"

test: .venv/testing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 $(if $(SLOW),,-m "not slow")

oldest: .venv-oldest/installed
	OMP_NUM_THREADS=1 .venv-oldest/bin/pytest -q -n 2 -m "not slow" tests/contract tests/models

docs: .venv/testing
	$(BIN)/python -m jeton.measure.systems
	$(BIN)/python tests/with_timm.py jeton.measure.support

clean:
	rm -rf .venv .venv-oldest report

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) --editable .
	touch $@

.venv/testing: .venv/installed
	$(PIP) --editable ".[test]"
	$(PIP) --no-deps timm  # with its dependencies another torch would come
	$(PIP) --no-deps --target .venv/apart torchvision  # see tests/apart.py
	touch $@

.venv-oldest/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-oldest
	grep -v "^transformers=\|^huggingface_hub=" constraints.txt > .venv-oldest/constraints.txt
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check --constraint .venv-oldest/constraints.txt \
		--editable . "transformers==$(OLDEST)" pytest pytest-xdist hypothesis
	touch $@
