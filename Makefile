# `make lab` to learn, `make test` to check. The first run makes .venv; later ones install nothing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip --disable-pip-version-check -qq install -c constraints.txt

.PHONY: lab test lint types screenshots clean

lab: $(VENV)/lab.stamp
	@$(BIN)/hmmlab lab $(ARGS)

test: $(VENV)/test.stamp
	@$(BIN)/python tests/browser/chromium.py
	$(BIN)/pytest --nbval tests notebooks $(ARGS)

lint: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/test.stamp
	$(BIN)/mypy

# The browser tests leave what they saw in build/screenshots; the README shows two of them.
screenshots: $(VENV)/test.stamp
	@$(BIN)/python tests/browser/chromium.py
	$(BIN)/pytest tests/browser $(ARGS)
	mkdir -p docs/screenshots
	cp build/screenshots/tour-light.png build/screenshots/tour-dark.png docs/screenshots/

clean:
	rm -rf $(VENV) build .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -o -name .ipynb_checkpoints | xargs rm -rf

$(VENV)/lab.stamp: pyproject.toml constraints.txt | $(VENV)/made.stamp
	@echo "Installing JupyterLab and hmmlab into $(VENV): once, about half a minute ..."
	@$(INSTALL) -e .
	@touch $@

$(VENV)/test.stamp: pyproject.toml constraints.txt | $(VENV)/made.stamp
	@echo "Installing hmmlab and its test tools into $(VENV): once, about half a minute ..."
	@$(INSTALL) -e ".[test]"
	@touch $@ $(VENV)/lab.stamp

$(VENV)/made.stamp:
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" 2>/dev/null || \
	  { echo "hmmlab needs Python 3.11 or newer, and $(PYTHON) is not; try: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c "import ensurepip, venv" 2>/dev/null || \
	  { echo "$(PYTHON) cannot make virtual environments; on Debian and Ubuntu: sudo apt-get install python3-venv" >&2; exit 1; }
	@$(PYTHON) -m venv --clear $(VENV)
	@touch $@
