# Every target sets up what it needs in .venv, with the versions pinned in constraints.txt.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart test test-slow lint docs docs-check core-check format clean

quickstart: .venv/ready  ## the whole path on 192 hand-written pairs: no key, GPU or download of models or data
	$(BIN)/sp2dpo run examples/quickstart/process.yaml
	@echo
	@echo "Open runs/quickstart/report.html in a browser. Next: README.md, 'With your own data'."

test: .venv/ready-dev  ## the tests
	$(BIN)/pytest -q

test-slow: .venv/ready-dev  ## the tests that take minutes
	$(BIN)/pytest -q -m slow

lint: .venv/ready-dev  ## ruff and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/ready-dev  ## write the generated documentation anew
	$(BIN)/python scripts/docs.py

docs-check: .venv/ready-dev  ## fail if the generated documentation is stale
	$(BIN)/python scripts/docs.py --check

core-check:  ## the core package in an environment without torch
	sh scripts/core_check.sh $(PYTHON)

format: .venv/ready-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.venv/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "sp2dpo needs Python 3.11 or newer: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet pip==26.3
	@echo "Installing into .venv; the first time this takes a few minutes."
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[train,report]'
	@touch $@

.venv/ready-dev: .venv/ready
	$(BIN)/python -m pip install --quiet -c constraints.txt --group dev
	@touch $@

clean:
	rm -rf .venv runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
