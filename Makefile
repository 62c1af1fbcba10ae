# make run: install, train the default model, sample from it and evaluate it.
# make test: install with the development extras and run every test.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

run: $(VENV)/run.done
	$(BIN)/python train.py
	$(BIN)/python sample.py prompt="ROMEO:" sampling.temperature=0.8
	$(BIN)/python eval.py
	@echo "to go on: source $(BIN)/activate, then python sample.py and every other command of the README"

test: $(VENV)/dev.done
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

lint: $(VENV)/dev.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tests/budgets.py

$(VENV)/run.done: EXTRA := progress
$(VENV)/dev.done: EXTRA := dev
$(VENV)/%.done: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[$(EXTRA)]"
	touch $@

.PHONY: run test lint
