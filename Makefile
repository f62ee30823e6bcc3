# Each target sets itself up: a virtual environment in .venv, installed once and again when pyproject.toml changes.
PYTHON ?= python3
PROCESSES ?= 2
BIN := .venv/bin

.PHONY: run test lint bench clean
.DEFAULT_GOAL := run

run: .venv/run.stamp        ## all five systems on this machine, in about a quarter of an hour
	$(BIN)/luthier tour

test: .venv/dev.stamp       ## all tests that this machine can run, in PROCESSES at once
	$(BIN)/python -m pytest --numprocesses $(PROCESSES) --dist loadfile

lint: .venv/dev.stamp       ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/dev.stamp      ## rerun the benchmarks and append to benchmarks/results/
	$(BIN)/python benchmarks/pretrain_throughput.py
	$(BIN)/python benchmarks/decode.py

.venv/pip.stamp:
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "luthier needs Python 3.11 or newer: make PYTHON=python3.12"'
	$(PYTHON) -m venv .venv
	touch $@

.venv/run.stamp: .venv/pip.stamp pyproject.toml
	$(BIN)/pip install --quiet --editable '.[train]'
	touch $@

.venv/dev.stamp: .venv/pip.stamp pyproject.toml
	$(BIN)/pip install --quiet --editable '.[all]'
	touch $@ .venv/run.stamp

clean:                      ## remove the environment and all runs
	rm -rf .venv runs
