# What people type. `make demo` and `make test` need only Python 3.11 and make; both share one .venv, whose install is
# skipped while pyproject.toml and constraints.txt are unchanged.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
INSTALL_KEY := $(shell cat pyproject.toml constraints.txt | cksum | tr ' ' '-')
DATA ?=
KEEP ?=
export DATA
# One file of unit tests per process at a time; those that start Ray, or kill, have the machine to themselves.
UNIT := $(BIN)/python -m pytest tests/test_layout.py tests/unit -q -n 2 --dist loadfile

.PHONY: help setup demo test test-fast promises check format bench up down clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(STAMP)-$(INSTALL_KEY) ## make .venv with the versions that were tested together

$(STAMP)-$(INSTALL_KEY):
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if (3, 11) <= v[:2] < (3, 13) else f"Python 3.11 or 3.12 is needed, this is {v[0]}.{v[1]}; set PYTHON=python3.11")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@rm -f $(STAMP)-* && touch $@

demo: setup ## the main job from end to end: faces, shards, GAN, swap, detectors, ensemble, service, report
	$(BIN)/counterfake run demo $(if $(DATA),--set "data=$$DATA") $(if $(filter-out 0 no false,$(KEEP)),--set keep=true)

test: setup ## lint, types, layout and every test that can run on this machine
	$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/mypy
	$(UNIT)
	$(BIN)/python -m pytest tests/chaos tests/cluster tests/serving tests/gpu

test-fast: setup ## layout and unit tests only
	$(UNIT)

promises: setup ## what must hold when things break, at the full figures: kills, races, faults, flips; long
	$(BIN)/python -m pytest --full -m 'full or chaos' -rP --show-capture=stdout

check: setup ## format, lint, types, layout and unit tests: before every commit
	$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/mypy
	$(UNIT)

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
