# make demo  the whole system in minutes on a laptop      make demo VIDEOS=path/to/clips
# make test  lint, types, unit and end-to-end tests
# make faults  slow tests; kills, full disks, damaged checkpoints, hangs in the middle of training (an hour and more)
# All set themselves up in .venv. Another Python or package source:
#   make venv PYTHON=python3.12 PIP_ARGS="--index-url URL"

PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
OUT ?= $(if $(VIDEOS),runs/demo-$(notdir $(VIDEOS:/=)),runs/demo)
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test faults lint format venv clean
.DEFAULT_GOAL := demo

venv: $(READY)

$(READY): setup.py .constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 10) <= v <= (3, 12) else \
	  "error: Python %d.%d; ardiff needs 3.10 to 3.12, try make PYTHON=python3.11" % v)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c .constraints.txt -e '.[test]'
	@touch $@

demo: $(READY)
	$(BIN)/python launch/demo.py --out "$(OUT)" $(if $(VIDEOS),--videos "$(VIDEOS)")

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# A file is run by one worker: those that start several processes do not oversubscribe the cores.
test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

faults: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m slow
	$(BIN)/python -m tests.end_to_end.faults --jobs 2 $(FAULTS)

clean:
	rm -rf "$(OUT)" .mypy_cache .ruff_cache .pytest_cache
