# Two commands set everything up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: backbones demo docs test check format lint types faults speed clean

PLUGINS := $(sort $(wildcard plugins/*/pyproject.toml))

$(STAMP): pyproject.toml $(PLUGINS)
	$(PYTHON) -m venv $(VENV)
	# torch and torchvision by name: releases that belong together, whatever else the index offers (see pyproject.toml)
	$(BIN)/pip install --quiet --upgrade-strategy only-if-needed "torch==2.14.1" "torchvision==0.29.1"
	$(BIN)/pip install --quiet -e ".[dev]"
	# hatchling is there by now, so the plugins are built without fetching anything
	$(BIN)/pip install --quiet --no-deps --no-build-isolation $(foreach plugin,$(PLUGINS),-e $(dir $(plugin)))
	touch $(STAMP)

demo: $(STAMP)  ## compare four methods on scikit-learn's digits, offline, with the backbone that comes with petune
	$(BIN)/petune compare linear vpt adaptformer full --backbone vit_nano --dataset digits --epochs 4 --output runs/demo

test: $(STAMP)  ## every test, in two processes of one thread
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

check: $(STAMP) format lint types test  ## format, lint, types and tests

format: $(STAMP)
	$(BIN)/ruff format --check .

lint: $(STAMP)
	$(BIN)/ruff check .

types: $(STAMP)
	$(BIN)/mypy

docs: $(STAMP)  ## the documentation as a site, in runs/site; opened from a disk or a server, it asks nobody for anything
	$(BIN)/pip install --quiet --upgrade-strategy only-if-needed -e ".[docs]"
	$(BIN)/python docs/tools/pages.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

clean:  ## the environment only; runs/ holds what was trained
	rm -rf $(VENV)

faults: $(STAMP)  ## every fault, tried often; writes docs/reliability.md (a quarter of an hour on an idle machine)
	$(BIN)/pip install --quiet --upgrade-strategy only-if-needed -e ".[ray]"
	PETUNE_FAULTS=full $(BIN)/python -m pytest tests/faults -q

speed: $(STAMP)  ## steps, memory and start beside the peers'; writes docs/speed.md (an idle machine, a quarter of an hour)
	$(BIN)/python benchmarks/speed.py
	$(BIN)/python benchmarks/tables.py

backbones: $(STAMP)  ## survey every family of backbones with every method; writes docs/backbones.md (an hour)
	$(BIN)/python benchmarks/backbones.py
