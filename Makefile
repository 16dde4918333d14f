# Sets itself up: needs Python >= 3.11, pip and make. Everything lands in .venv (and .venv-oldest, -newest, -app, -vllm).
PYTHON ?= python3
VENV := .venv
OLDEST := .venv-oldest
OLDEST_TRANSFORMERS := 5.16.1
NEWEST := .venv-newest
APP := .venv-app
VLLM := .venv-vllm
ARGS ?=
N ?= 1000
SEED ?= 0
# What depends on the version of transformers.
CORE := $(addprefix tests/,$(addsuffix .py,$(addprefix test_,configuration modeling numbers families processing hub \
	convert_checkpoint parity)) files training)

.PHONY: demo test test-all test-slow test-oldest test-newest test-app test-vllm fuzz lint parity clean

# A stamp newer than what it was made from: set-up runs once, and again when the project's needs change.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

$(OLDEST)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(OLDEST)
	grep -Ev '^(transformers|huggingface_hub)==' constraints.txt > $(OLDEST)/constraints.txt
	echo 'transformers==$(OLDEST_TRANSFORMERS)' >> $(OLDEST)/constraints.txt
	$(OLDEST)/bin/pip install --quiet --disable-pip-version-check -c $(OLDEST)/constraints.txt torch
	$(OLDEST)/bin/pip install --quiet --disable-pip-version-check -c $(OLDEST)/constraints.txt -e '.[dev]'
	touch $@

# Whatever pip gives today, but for torch: a plain one takes gigabytes of CUDA.
$(NEWEST)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(NEWEST)/bin/pip install --quiet --disable-pip-version-check --upgrade --upgrade-strategy eager -e '.[dev]' \
		"$$($(NEWEST)/bin/pip freeze | grep '^torch==')"
	touch $@

# Apart, because gradio holds Pillow back.
$(APP)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(APP)
	grep -v '^pillow==' constraints.txt > $(APP)/constraints.txt
	$(APP)/bin/pip install --quiet --disable-pip-version-check -c $(APP)/constraints.txt torch
	$(APP)/bin/pip install --quiet --disable-pip-version-check -c $(APP)/constraints.txt -e '.[app]' pytest playwright
	touch $@

# Apart, because vLLM pins most of its libraries, and wants none of the newest transformers.
$(VLLM)/.ready: pyproject.toml constraints.txt tests/serving/vllm_requirements.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(VLLM)/bin/pip install --quiet --disable-pip-version-check --no-deps -r tests/serving/vllm_requirements.txt
	$(VLLM)/bin/pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@

# The main job: an image and a question in, an answer out. make demo ARGS="scene.tif --question 'What is this?'"
demo: $(VENV)/.ready
	$(VENV)/bin/python -m mfrsvlm.demo $(ARGS)

test: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest tests -n 2 --dist loadfile $(ARGS)

# Also the tests that train, start processes or run whole commands.
test-all: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest tests -m "not slow and not gpu" -n 2 --dist loadfile $(ARGS)

test-slow: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest tests -m "slow and not gpu" -n 2 --dist load $(ARGS)

# Mutated inputs of every kind, N of each. make fuzz N=10000 ARGS="--area 'model folders'"
fuzz: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(VENV)/bin/python tests/fuzz --count $(N) --seed $(SEED) $(ARGS)

# The tests of the core, with the oldest transformers that pyproject.toml claims and with the newest that pip gives.
test-oldest: $(OLDEST)/.ready
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest $(CORE) -m "not slow and not gpu" -n 2 $(ARGS)

test-newest: $(NEWEST)/.ready
	OMP_NUM_THREADS=1 $(NEWEST)/bin/python -m pytest $(CORE) -n 2 $(ARGS)

# The web page, also in a browser where Chromium is installed.
test-app: $(APP)/.ready
	OMP_NUM_THREADS=1 $(APP)/bin/python -m pytest tests/app -m "not gpu" $(ARGS)

# The plugin of vLLM, on CPUs with AVX2 or more. Takes minutes: vLLM starts nine times.
test-vllm: $(VLLM)/.ready
	OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest tests/serving/test_vllm.py -m "not gpu" $(ARGS)

lint: $(VENV)/.ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	mkdir -p $(VENV)/types && ln -sfn "$(CURDIR)" $(VENV)/types/mfrsvlm  # mypy wants a folder of the package's name
	cd $(VENV)/types && ../bin/mypy --config-file mfrsvlm/pyproject.toml --cache-dir mfrsvlm/.mypy_cache \
		mfrsvlm/checksums_mfrsvlm.py mfrsvlm/configuration_mfrsvlm.py mfrsvlm/image_sources_mfrsvlm.py \
		mfrsvlm/image_processing_mfrsvlm.py mfrsvlm/conversations_mfrsvlm.py mfrsvlm/processing_mfrsvlm.py \
		mfrsvlm/injection_mfrsvlm.py mfrsvlm/modeling_mfrsvlm.py mfrsvlm/released_layout.py \
		mfrsvlm/convert_checkpoint.py mfrsvlm/arguments.py mfrsvlm/cli.py mfrsvlm/lazy_exports.py mfrsvlm/output_folders.py
	$(VENV)/bin/lint-imports

# The table of docs/parity.md: largest error of every stage against the published implementation.
parity: $(VENV)/.ready
	rm -rf $(VENV)/parity
	$(VENV)/bin/python -m mfrsvlm.convert_checkpoint released tests/reference/checkpoint \
		--vision-tower tests/reference/checkpoint/vision_tower --output $(VENV)/parity
	$(VENV)/bin/python tests/measure_parity.py tests/reference $(VENV)/parity

clean:
	rm -rf $(VENV) $(OLDEST) $(NEWEST) $(APP) $(VLLM) build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
