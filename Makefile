# Everything a developer types. Needs Python 3.11+, git, make and a C compiler; installs the rest into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
BENCH_STAMP := $(VENV)/.installed-bench

.PHONY: setup run test check format lint types layers bench chaos models clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("deepopt needs Python 3.11 or newer, found %s.%s" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --group dev --editable .
	touch $@

$(BENCH_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --group bench
	touch $@

run: setup  ## train the built-in model on the standard library's sources: four workers, the schedule that is best here
	$(BIN)/deepopt launch --workers 4

test: setup  ## all tests that this machine can run
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile tests/unit
	$(BIN)/python -m pytest --ignore tests/unit

check: format lint types layers test

format: setup
	$(BIN)/ruff format --check .

lint: setup
	$(BIN)/ruff check .

types: setup
	$(BIN)/mypy

layers: setup
	$(BIN)/lint-imports

bench: $(BENCH_STAMP)  ## every performance claim, one ratio each
	for script in benchmarks/*.py; do case $$script in */_*) continue;; esac; echo "== $$script"; $(BIN)/python $$script || exit 1; done

models: setup  ## eight models of transformers and PyTorch, trained by DeepTrainer, with the bits of one worker and of PyTorch
	$(BIN)/python benchmarks/models.py

chaos: setup  ## the fault matrix with real jobs and signals, then 50 faults at random; CHAOS="--only head" for a part
	PYTHONPATH=tests $(BIN)/python -m chaos $(CHAOS)

clean:
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache runs
