# make demo   set up, compare every method on the embedded model, write report/report.html
# make test   set up, lint, check types and floors, run the tests (make test SLOW=1 runs the slow ones too)

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test docs clean

demo: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/jeton compare --out report  # the embedded model is small: more threads only wait for each other
	@echo "Open $(CURDIR)/report/report.html"

test: .venv/testing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 $(if $(SLOW),,-m "not slow")

docs: .venv/testing
	$(BIN)/python -m jeton.measure.systems
	$(BIN)/python tests/with_timm.py jeton.measure.support

clean:
	rm -rf .venv report

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) --editable .
	touch $@

.venv/testing: .venv/installed
	$(PIP) --editable ".[test]"
	$(PIP) --no-deps timm  # with its dependencies another torch would come
	$(PIP) --no-deps --target .venv/apart torchvision  # see tests/apart.py
	touch $@
