# Two commands set everything up on a fresh machine: `make demo` and `make test`.
# PYTHON makes the environment: by default the first Python below that is 3.11 or newer and has venv.
# Choose another one with `make test PYTHON=/path/to/python`.
PYTHONS := python3 python3.13 python3.12 python3.11 python3.14 python
SUITABLE := import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in $(PYTHONS); do "$$p" -c "$(SUITABLE)" >/dev/null 2>&1 && echo "$$p" && break; done)
# Releases of torch and torchvision that belong together, and that everything is measured with (see pyproject.toml).
TORCH ?= torch==2.14.1 torchvision==0.29.1
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: backbones demo docs test quick test-all check format lint types faults speed versions clean

# One thread in each of two processes: the tests are small, and more threads slow them down.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# Processes of `make backbones`, of one thread each.
JOBS ?= 2

PLUGINS := $(sort $(wildcard plugins/*/pyproject.toml))

$(STAMP): pyproject.toml $(PLUGINS)
	@python="$(PYTHON)"; $${python:-false} -c "$(SUITABLE)" 2>/dev/null || { \
	  echo "petune needs Python 3.11 or newer with venv. Tried: $${python:-$(PYTHONS)}."; \
	  echo "Install it, then run make again:"; \
	  echo "  Debian, Ubuntu   sudo apt install python3 python3-venv"; \
	  echo "  Fedora           sudo dnf install python3"; \
	  echo "  macOS            brew install python"; \
	  echo "If it is installed under another name: make PYTHON=/path/to/python"; \
	  exit 1; } >&2
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade-strategy only-if-needed $(TORCH)
	$(BIN)/pip install --quiet -e ".[dev]"
	# hatchling is there by now, so the plugins are built without fetching anything
	$(BIN)/pip install --quiet --no-deps --no-build-isolation $(foreach plugin,$(PLUGINS),-e $(dir $(plugin)))
	touch $(STAMP)

demo: $(STAMP)  ## compare four methods on scikit-learn's digits, offline, with the backbone that comes with petune
	$(BIN)/petune compare linear vpt adaptformer full --backbone vit_nano --dataset digits --epochs 4 --output runs/demo

test: $(STAMP)  ## every test but the exhaustive ones; what CI runs
	$(PYTEST) -m "not exhaustive"

quick: $(STAMP)  ## the fast tests: no browser, no network
	$(PYTEST) -m "not slow and not browser and not network and not exhaustive"

test-all: $(STAMP)  ## every test
	$(PYTEST)

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

backbones: $(STAMP)  ## survey every family of backbones with every method; writes docs/backbones.md (hours; resumes where it was stopped)
	$(BIN)/python benchmarks/backbones.py --jobs $(JOBS) --resume

versions: $(STAMP)  ## move adapters between the oldest and newest libraries; writes docs/versions.md (8 GB of disk, an hour)
	$(BIN)/python benchmarks/versions.py
