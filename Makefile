# Thin on purpose: every target is one or two commands, which also run without make (see README.md).
PROFILE ?= full
PYTHON  ?= python3.11
BIN     := .venv/bin
export OMP_NUM_THREADS ?= 1

.PHONY: help report quick verify test test-faults lab bench lock
help:            ## list the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

.venv/installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv && $(BIN)/pip install --quiet -r requirements.txt && touch $@

report: .venv/installed  ## run the notebooks and write the page; PROFILE=full (default), quick, smoke or your own
	$(BIN)/python report/build.py --profile $(PROFILE)

quick: .venv/installed   ## the same as `make report PROFILE=quick`
	$(BIN)/python report/build.py --profile quick

verify: .venv/installed  ## check the committed results: every file's hash, and a sample of runs trained again
	$(BIN)/python report/verify.py --profile $(PROFILE)

test: .venv/installed    ## the whole test suite
	$(BIN)/ruff check . && $(BIN)/python -m pytest

test-faults: .venv/installed  ## the long tests of what a build survives: kills, full disks, damaged files, lost workers
	$(BIN)/python -m pytest -m faults -s

lab: .venv/installed     ## JupyterLab on this machine alone, with a token, open at the playground
	$(BIN)/jupyter lab $(LAB_FLAGS) --ServerApp.ip=127.0.0.1 --notebook-dir=. --LabApp.default_url=/lab/tree/notebooks/playground.ipynb

benchmarks/.venv/installed: benchmarks/requirements.txt
	$(PYTHON) -m venv benchmarks/.venv && benchmarks/.venv/bin/pip install --quiet --no-deps -r benchmarks/requirements.txt
	benchmarks/.venv/bin/pip install --quiet --no-deps -e . && touch $@

bench: benchmarks/.venv/installed  ## time SGSC and the study's engine against their peers, in an environment of their own
	cd benchmarks && .venv/bin/python bench_statistic.py && .venv/bin/python bench_training.py \
	  && .venv/bin/python summary.py

# torch's CPU build adds a local version to its number, which other machines would not find.
lock: .venv/installed    ## write requirements.txt anew from pyproject.toml
	$(BIN)/pip install --quiet 'pip-tools>=7.5' && $(BIN)/pip-compile --quiet --upgrade --extra test --strip-extras \
	  --allow-unsafe --no-annotate --no-header --no-emit-index-url --no-emit-find-links --upgrade-package torch==2.13.0 \
	  --output-file requirements.txt pyproject.toml && sed -i 's/+cpu$$//; /^#/d; /^$$/d' requirements.txt && echo '-e .' >> requirements.txt
