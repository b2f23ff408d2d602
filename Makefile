# make train   set up .venv and train on this machine: the embedded base, int8, sharded over 2 CPU ranks or all GPUs
# make test    the fast tests          make test-slow   the others
# make check   format and lint         make format      fix both

PYTHON ?= python3
BIN := .venv/bin

.PHONY: install train test test-slow check format

# Recomputing the activations of so small a base would cost a quarter of the time and save nothing worth having.
train: install
	$(BIN)/lora-dist train opt_quotes --model_name_or_path embedded --dataset_name embedded \
	    --gradient_checkpointing false $(ARGS)

test: install
	$(BIN)/pytest -q

test-slow: install
	$(BIN)/pytest -q -m slow

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

install: .venv/installed

# torch first, and capped: a range that admits a newer release would install that one, with gigabytes for a GPU.
.venv/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lora-dist needs Python 3.11 or newer; set PYTHON=")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q "torch>=2.13,<2.14"
	$(BIN)/pip install -q -e '.[test]'
	touch $@
