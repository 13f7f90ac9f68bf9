PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-long test-faults bench

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: .venv/installed        ## plan, train and compare the example on this machine
	$(BIN)/weft compare examples/code_lm.py --devices 4

test: .venv/installed        ## style, types, and all tests but the long ones
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not long"

test-long: .venv/installed   ## the tests that make test leaves out
	$(BIN)/python -m pytest -n 2 --dist worksteal -m long

test-faults: .venv/installed ## 60 random faults in training; the seed is printed
	$(BIN)/python benchmarks/faults.py

bench: .venv/installed       ## against hand-written PyTorch
	$(BIN)/python benchmarks/handwritten.py
