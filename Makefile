# make demo (TASK=text) · make test · make setup · make bench · make torture · make lint
# VENV=path chooses the virtual environment, PYTHON=python3.x the interpreter it is made with.

VENV ?= .venv
PYTHON ?= python3.11
TASK ?= text
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup demo test bench torture lint link

setup: $(STAMP) link

# A new environment, or one whose requirements have changed, is installed; otherwise nothing happens.
$(STAMP): requirements.txt requirements-dev.txt constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt -c constraints.txt
	touch $@

# lib is importable from any folder; repeated each time, because one environment may serve several clones.
link: $(STAMP)
	@$(BIN)/python -c "import pathlib, sysconfig; pathlib.Path(sysconfig.get_path('purelib'), 'accelerando.pth').write_text('$(CURDIR)\n')"

demo: setup
	PATH="$(abspath $(BIN)):$$PATH" bash data/demo_$(TASK).sh

test: setup
	$(BIN)/python -m pytest tests -n 2 --dist worksteal $(PYTEST_ARGS)

torture: setup
	$(BIN)/python -m pytest tests/torture.py -s $(PYTEST_ARGS)

bench: setup
	$(BIN)/python benchmarks/text.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
