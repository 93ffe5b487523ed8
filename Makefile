# Two commands for newcomers: `make demo` and `make test`. Each sets up everything it needs in .venv, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# The versions that were tested; they need Python 3.11. Empty: the newest that fit.
CONSTRAINTS ?= $(if $(shell $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' && echo yes),constraints.txt)

.DEFAULT_GOAL := help
.PHONY: help demo test lint docs build latest constraints clean

help: ## say what can be made
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

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

latest: ## all tests with the newest version of every library, in .venv-latest
	$(MAKE) test VENV=.venv-latest CONSTRAINTS=

constraints: latest ## constraints.txt anew, from the versions that `make latest` passed with
	sed -n '/^#/p' constraints.txt > constraints.txt.tmp
	.venv-latest/bin/python -m pip freeze --exclude-editable | grep == >> constraints.txt.tmp
	mv constraints.txt.tmp constraints.txt

clean: ## remove the environment and everything made
	rm -rf .venv .venv-latest build dist site demo-output *.egg-info

# The stamp is newer than its causes once the install has gone through; then this rule costs nothing.
$(READY): requirements.txt pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "Python 3.10 or newer is needed; name one with make PYTHON=/path/to/python3"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[offline,dev]" $(CONSTRAINTS:%=--constraint %)
	touch $(READY)
