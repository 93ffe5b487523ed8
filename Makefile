# Two commands for newcomers: `make demo` and `make test`. Each sets up everything it needs in .venv, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help demo test lint docs build clean

help: ## say what can be made
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: $(READY) ## images in, table and HTML report out (no network once installed)
	$(BIN)/ulfine-fast demo

test: $(READY) ## all tests, the style checks among them
	$(BIN)/python -m pytest

lint: $(READY) ## style and types alone
	$(BIN)/python -m pytest tests/test_style.py

docs: $(READY) ## the documentation as a site in site/
	$(BIN)/python -m mkdocs build --strict

build: $(READY) ## a wheel and a source archive in dist/
	$(BIN)/python -m build

clean: ## remove the environment and everything made
	rm -rf $(VENV) build dist site demo-output *.egg-info

# The stamp is newer than its causes once the install has gone through; then this rule costs nothing.
$(READY): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "Python 3.10 or newer is needed; name one with make PYTHON=/path/to/python3"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[offline,dev]"
	touch $(READY)
