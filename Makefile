# What people type. `make demo` and `make test` need only Python 3.11 and make; both share one .venv, whose install is
# skipped while pyproject.toml and constraints.txt are unchanged.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
INSTALL_KEY := $(shell cat pyproject.toml constraints.txt | cksum | tr ' ' '-')
DATA ?=
KEEP ?=

.PHONY: help setup demo test test-fast check format bench up down clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(STAMP)-$(INSTALL_KEY) ## make .venv with the versions that were tested together

$(STAMP)-$(INSTALL_KEY):
	@$(PYTHON) -c 'import sys; v = sys.version_info; assert (3, 11) <= v[:2] < (3, 13), f"Python 3.11 or 3.12 is needed, this is {v.major}.{v.minor}; set PYTHON=python3.11"'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@rm -f $(STAMP)-* && touch $@

demo: setup ## the main job from end to end: faces, shards, GAN, swap, detectors, ensemble, service, report
	$(BIN)/counterfake run demo $(if $(DATA),--set data=$(DATA)) $(if $(KEEP),--set keep=true)

test: setup ## lint, types, layout and every test that can run on this machine
	$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/mypy
	$(BIN)/python -m pytest

test-fast: setup ## layout and unit tests only
	$(BIN)/python -m pytest tests/test_layout.py tests/unit -q

check: setup ## format, lint, types, layout and unit tests: before every commit
	$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/mypy
	$(BIN)/python -m pytest tests/test_layout.py tests/unit -q

format: setup ## apply the formatter and safe fixes
	$(BIN)/ruff format . && $(BIN)/ruff check --fix .

bench: setup ## every benchmark, one JSON object each
	@for name in $$($(BIN)/counterfake run benchmark --list); do $(BIN)/counterfake run benchmark $$name --json; done

up: ## the whole platform in containers (needs docker compose)
	docker compose -f infra/compose.yaml up --build --detach

down: ## stop the containers, keep the volumes
	docker compose -f infra/compose.yaml down

clean: ## remove what runs wrote here; keeps .venv
	rm -rf runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
