PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-faults check bench
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: .venv/installed        ## plan, train and compare the example on this machine
	$(BIN)/weft compare examples/code_lm.py --devices 4

test: .venv/installed        ## the whole suite: style, types, tests
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-faults: .venv/installed ## 60 random faults in training; the seed is printed
	$(BIN)/python benchmarks/faults.py

bench: .venv/installed       ## against hand-written PyTorch
	$(BIN)/python benchmarks/handwritten.py
