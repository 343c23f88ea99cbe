# `make demo` runs the main job on the embedded default, `make test` the tests; each makes the environment it needs.
PYTHON ?= python3
VENV ?= .venv
BUILD ?= build
TORCH ?= 2.13.0
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

BIN := $(VENV)/bin
STACKS := $(patsubst tests/stacks/requirements/%.txt,%,$(wildcard tests/stacks/requirements/*.txt))
# Files of tests side by side, one thread of arithmetic for each: most tests are too small for more.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=auto --maxprocesses=4 --dist=loadfile

.PHONY: help demo test test-fast stacks architectures check format dist subject over-refusing gemma clean

help:
	@echo "make demo           convert the refusing SmolLM2 and show refusals before and after"
	@echo "make test           all tests, on pico models and on real ones"
	@echo "make test-fast      tests on pico models only"
	@echo "make stacks         serve a converted model in vLLM, llama.cpp, OpenVINO and transformers"
	@echo "make architectures  convert a tiny twin of every architecture, and write docs/architectures.md"
	@echo "make check          ruff and mypy"
	@echo "make dist           a source archive, and the wheel that is built from it, in dist/"
	@echo "make clean          remove the environment and everything built"

# A CPU build of torch: from wherever pip is set up to look, else from PyTorch's own index. $(1) is a python.
install = $(1) -m pip install --quiet --disable-pip-version-check
torch = $(1) -c "import torch" 2>/dev/null || { [ "$$(uname)" = Darwin ] && $(install) "torch==$(TORCH)"; } \
	|| $(install) "torch==$(TORCH)+cpu" 2>/dev/null || $(install) --index-url $(TORCH_INDEX) "torch==$(TORCH)"

$(VENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(call torch,$(BIN)/python)
	$(call install,$(BIN)/python) -e ".[dev]"
	@touch $@

subject: $(VENV)/ready
	@$(BIN)/python tests/models/subject.py $(BUILD)/refusing-smollm2-135m

over-refusing: $(VENV)/ready
	@$(BIN)/python tests/models/subject.py $(BUILD)/over-refusing-smollm2-135m --over-refusing

gemma: $(VENV)/ready
	@$(BIN)/python tests/models/gemma.py $(BUILD)/gemma-3-270m

demo: subject
	$(BIN)/abliterate convert $(BUILD)/refusing-smollm2-135m $(BUILD)/answering-smollm2-135m --overwrite

test: $(VENV)/ready
	$(PYTEST) --no-loadscope-reorder

# An inference stack has an environment of its own. torch stays as it is; what is built for another one is taken out again.
stack-%: $(BUILD)/stacks/%/ready ;

.PRECIOUS: $(BUILD)/stacks/%/ready
$(BUILD)/stacks/%/ready: tests/stacks/requirements/%.txt
	$(PYTHON) -m venv --clear $(@D)
	$(call torch,$(@D)/bin/python)
	echo "torch==$(TORCH)" > $(@D)/constraints.txt
	$(call install,$(@D)/bin/python) -c $(@D)/constraints.txt -r $<
	$(@D)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

stacks: $(VENV)/ready $(STACKS:%=stack-%)
	ABLITERATE_STACKS=all $(BIN)/python -m pytest -m stacks --timeout 1800

test-fast: $(VENV)/ready
	$(PYTEST) -m "not real"

architectures: $(VENV)/ready
	$(BIN)/python -m tests.sweep --write

check: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The wheel comes from the archive, so that an archive with something missing is noticed.
dist: $(VENV)/ready
	rm -rf dist
	$(BIN)/python -m build --no-isolation --outdir dist

format: $(VENV)/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(BUILD) dist .pytest_cache .hypothesis .mypy_cache .ruff_cache
