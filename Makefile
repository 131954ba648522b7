# `make` or `make help` lists the targets. Everything runs in .venv, which the first target that needs it creates.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help demo test test-slow lint check format bench clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

# torchvision is built for one torch release: these two belong together and install fastest.
$(BIN)/.installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check torch==2.14.1 torchvision==0.29.1
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

demo: $(BIN)/.installed  ## fit the digits CNN at two widths and with two schemes, draw accuracy against size, write a report and a .nern file
	$(BIN)/nernlit sweep --configs configs/digits_h96.yaml configs/digits_h96_decoupled.yaml --hidden 96 128 --out runs/demo
	$(BIN)/nernlit report runs/demo/digits_h96_h128_seed0 runs/demo/digits_h96_decoupled_h128_seed0 --out runs/demo/report.html
	$(BIN)/nernlit export runs/demo/digits_h96_decoupled_h96_seed0 -o runs/demo/digits.nern
	$(BIN)/nernlit test runs/demo/digits.nern --data DigitsDataModule

test: $(BIN)/.installed  ## install what is missing and pass the tests
	$(BIN)/pytest -n auto --maxprocesses 8 --dist worksteal

test-slow: $(BIN)/.installed  ## the tests that take minutes
	$(BIN)/pytest -m slow

lint: $(BIN)/.installed  ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

check: lint test  ## everything that a change must pass

format: $(BIN)/.installed  ## bring the code into shape
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(BIN)/.installed  ## time the parts on this machine
	$(BIN)/python -m tests.benchmarks.bench

clean:  ## remove the environment and the runs
	rm -rf .venv runs
