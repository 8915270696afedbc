# Everything runs in .venv; the targets create it and install again when pyproject.toml or constraints.txt change.
PYTHON ?= python3
VENV ?= .venv
DEMO ?= demo
PYTEST_ARGS ?= -m 'not long and not longest'
TEST_PROCESSES ?= 2

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check install --constraint constraints.txt

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test lint clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-6s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo "Variables: PYTHON=$(PYTHON) (3.11 or later), VENV=$(VENV), DEMO=$(DEMO), PYTEST_ARGS='-k name',"
	@echo "  TEST_PROCESSES=$(TEST_PROCESSES) (0: one after another, in one process)"

demo: $(VENV)/.demo ## Tokenize a small corpus of photographs and clips into demo/
	@$(BIN)/bsq demo --out $(DEMO)

test: $(VENV)/.test ## Run the tests, but for the longest (some minutes)
	@$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile $(PYTEST_ARGS)

lint: $(VENV)/.lint ## Check style and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

clean: ## Delete the environment and the demo
	@rm -rf $(VENV) $(DEMO)

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "bsqtok needs Python 3.11 or later; name one with make PYTHON=python3.12"; exit 1; }
	@echo "Creating $(VENV) ..."
	@$(PYTHON) -m venv $(VENV)
	@touch $@

# PyTorch goes first, by itself: the pinned version then decides what the rest may need.
$(VENV)/.torch: $(VENV)/.python constraints.txt
	@echo "Installing PyTorch ..."
	@$(PIP) torch
	@touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	@echo "Installing bsqtok and the sample photographs ..."
	@$(PIP) --editable '.[demo]'
	@touch $@

$(VENV)/.test: $(VENV)/.demo
	@echo "Installing what the tests need ..."
	@$(PIP) --editable '.[demo,test]'
	@touch $@

$(VENV)/.lint: $(VENV)/.test
	@echo "Installing ruff and mypy ..."
	@$(PIP) --editable '.[demo,test,lint]'
	@touch $@
