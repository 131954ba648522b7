# `make` or `make help` lists the targets. Everything runs in .venv, which the first target that needs it creates.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help demo test test-slow test-minimum scale scaling kill soak fuzz package audit site coverage lint check format bench clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

# torchvision is built for one torch release: these two belong together and install fastest.
$(BIN)/.installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check torch==2.14.1 torchvision==0.29.1
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

demo: $(BIN)/.installed  ## fit the digits CNN at two widths and with two schemes, draw accuracy against size, write a report, and compress the CNN
	$(BIN)/nernlit sweep --configs configs/digits_h96.yaml configs/digits_h96_decoupled.yaml --hidden 96 128 --jobs 2 --out runs/demo
	$(BIN)/nernlit report runs/demo/digits_h96_h128_seed0 runs/demo/digits_h96_decoupled_h128_seed0 --out runs/demo/report.html
	$(BIN)/nernlit export runs/demo/digits_h96_decoupled_h96_seed0 -o runs/demo/digits.nern
	@# The file is all that is needed: it is tested in an empty folder.
	folder=$$(mktemp -d) && cp runs/demo/digits.nern $$folder && cd $$folder && \
		$(CURDIR)/$(BIN)/nernlit test digits.nern --data DigitsDataModule; code=$$?; rm -r $$folder; exit $$code
	$(BIN)/nernlit compress digits_resnet8 -o runs/demo/small.nern --data DigitsDataModule --out_runs runs/demo

test: $(BIN)/.installed  ## install missing packages and run the tests
	$(BIN)/pytest -n auto --maxprocesses 8 --dist worksteal

test-slow: $(BIN)/.installed  ## the tests that take minutes
	$(BIN)/pytest -m slow

# torch 2.6 from PyPI brings CUDA libraries: several GB. The configurations are left to `make test`.
test-minimum:  ## the tests with the lowest versions that pyproject.toml allows, in .venv-minimum
	$(PYTHON) -m venv .venv-minimum
	.venv-minimum/bin/pip install --quiet --disable-pip-version-check uv
	.venv-minimum/bin/uv pip install --quiet --python .venv-minimum --resolution lowest-direct --editable '.[dev]'
	.venv-minimum/bin/pytest -n auto --maxprocesses 8 --dist worksteal --ignore tests/cli/test_configurations.py

kill: $(BIN)/.installed  ## kill all commands that train or write files at 200 random moments, continue them, and compare the results
	$(BIN)/python -W ignore -m tests.benchmarks.kill --kills 200

soak: $(BIN)/.installed  ## the commands of the demo 50 times, killed and continued: results, memory and disk must not change
	$(BIN)/python -W ignore -m tests.benchmarks.soak --iterations 50

fuzz: $(BIN)/.installed  ## fuzz every reader of files for a minute (Linux)
	$(BIN)/pip install --quiet --disable-pip-version-check atheris
	$(BIN)/python -W ignore -m tests.benchmarks.fuzz --seconds 60

scale: $(BIN)/.installed  ## list, load, test and analyze 1.3 million generated image files, and fit a ResNet50 with all weights (Linux)
	$(BIN)/python -W ignore -m tests.benchmarks.scale

scaling: $(BIN)/.installed  ## time training steps with one process, two DDP processes and two independent processes (idle machine, two cores)
	$(BIN)/python -W ignore -m tests.benchmarks.scaling

package:  ## build sdist and wheel, install the wheel into an empty environment and run a fit there
	rm -rf dist build .venv-build .venv-package
	$(PYTHON) -m venv .venv-build
	.venv-build/bin/pip install --quiet --disable-pip-version-check build
	.venv-build/bin/python -m build --outdir dist .
	$(PYTHON) -m venv .venv-package
	.venv-package/bin/pip install --quiet --disable-pip-version-check torch==2.14.1 torchvision==0.29.1
	.venv-package/bin/pip install --quiet --disable-pip-version-check dist/nernlit-*.whl
	@# In an empty folder: only what is in the wheel can be found.
	folder=$$(mktemp -d) && cd $$folder && program=$(CURDIR)/.venv-package/bin/nernlit && \
		$$program --version && $$program doctor && \
		$$program fit -c digits_h96 --trainer.max_epochs 1 --data.steps_per_epoch 20 && \
		$$program test -c digits_h96 --ckpt_path best; code=$$?; rm -r $$folder; exit $$code

audit: $(BIN)/.installed  ## look up the installed packages among known vulnerabilities (needs pypi.org)
	test -d .venv-audit || $(PYTHON) -m venv .venv-audit
	.venv-audit/bin/pip install --quiet --disable-pip-version-check pip-audit
	$(BIN)/pip freeze --exclude-editable > .venv-audit/installed.txt
	@# --strict: fail if a package cannot be looked up, instead of skipping it.
	.venv-audit/bin/pip-audit --strict --disable-pip --no-deps --requirement .venv-audit/installed.txt

site: $(BIN)/.installed  ## build the documentation site into build/site, with every link and reference checked
	$(BIN)/pip install --quiet --disable-pip-version-check '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

coverage: $(BIN)/.installed  ## run the tests and list the lines and branches that they do not cover
	$(BIN)/pytest -n auto --maxprocesses 8 --dist worksteal --cov --cov-report term-missing

lint: $(BIN)/.installed  ## check formatting, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

check: lint test  ## everything that a change must pass

format: $(BIN)/.installed  ## format the code and apply automatic lint fixes
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# These settings keep freed memory in the process: see docs/performance.md.
bench: $(BIN)/.installed  ## time the parts on this machine
	MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=1099511627776 $(BIN)/python -m tests.benchmarks.bench

clean:  ## remove the environments and the runs
	rm -rf .venv .venv-audit .venv-build .venv-minimum .venv-package build dist runs
