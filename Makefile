# Thin on purpose: every target is one or two commands, which also run without make (see README.md).
PROFILE ?= full
PYTHON  ?= python3.11
BIN     := .venv/bin
CHECKS  := $(BIN)/ruff check . && $(BIN)/lint-imports --no-logo
export OMP_NUM_THREADS ?= 1

.PHONY: help report quick verify test test-all lab bench architectures wheel lock
help:            ## list the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

.venv/installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv && $(BIN)/pip install --quiet -r requirements.txt && touch $@

report: .venv/installed  ## run the notebooks and write the page; PROFILE=full (default), quick, smoke or your own
	$(BIN)/python report/build.py --profile $(PROFILE)

quick: .venv/installed   ## the study in small: the same as `make report PROFILE=quick`
	$(BIN)/python report/build.py --profile quick

verify: .venv/installed  ## check the committed results: every file's hash, and a sample of runs trained again
	$(BIN)/python report/verify.py --profile $(PROFILE)

test: .venv/installed    ## style, the order of imports, and the quick tests
	$(CHECKS) && $(BIN)/python -m pytest

test-all: .venv/installed  ## the same with the slow tests: whole builds, kills, browsers; needs Chromium and Java
	$(CHECKS) && $(BIN)/python -m pytest -m ''

lab: .venv/installed     ## JupyterLab on this machine alone, with a token, open at the playground
	$(BIN)/jupyter lab $(LAB_FLAGS) --ServerApp.ip=127.0.0.1 --notebook-dir=. --LabApp.default_url=/lab/tree/notebooks/playground.ipynb

benchmarks/.venv/installed: benchmarks/requirements.txt
	$(PYTHON) -m venv benchmarks/.venv && benchmarks/.venv/bin/pip install --quiet --no-deps -r benchmarks/requirements.txt
	benchmarks/.venv/bin/pip install --quiet --no-deps -e . && touch $@

bench: benchmarks/.venv/installed  ## time SGSC and the study's engine against their peers; writes docs/benchmark.md
	cd benchmarks && for part in bench_statistic bench_training bench_scaling bench_profile summary; do \
	  .venv/bin/python $$part.py || exit; done

benchmarks/.venv-architectures/installed: benchmarks/architectures.txt
	$(PYTHON) -m venv benchmarks/.venv-architectures
	benchmarks/.venv-architectures/bin/pip install --quiet --no-deps -r benchmarks/architectures.txt
	benchmarks/.venv-architectures/bin/pip install --quiet --no-deps -e . && touch $@

# torchvision_on_cpu lets torchvision be imported where CUDA is not; --noconftest, as the study's packages are not here.
architectures: benchmarks/.venv-architectures/installed  ## run SGSC on architectures of torchvision, timm, transformers
	cd benchmarks && .venv-architectures/bin/python -m pytest --noconftest -p torchvision_on_cpu ../tests/test_integrations.py \
	  && .venv-architectures/bin/python architectures.py

wheel: .venv/installed   ## the package as a file: dist/sgsc-*.whl
	$(BIN)/pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .

# Versions stay where they satisfy pyproject.toml; `make lock LOCK_FLAGS=--upgrade` takes the newest. torch's CPU build
# adds a local version to its number, which other machines would not find.
lock: .venv/installed    ## write requirements.txt from pyproject.toml
	$(BIN)/pip install --quiet -e '.[lock]' && $(BIN)/pip-compile $(LOCK_FLAGS) --quiet --extra test --strip-extras \
	  --allow-unsafe --no-annotate --no-header --no-emit-index-url --no-emit-find-links --upgrade-package torch==2.13.0 \
	  --output-file requirements.txt pyproject.toml \
	  && sed -i 's/+cpu$$//; /^sgsc @/d; /^#/d; /^$$/d' requirements.txt && echo '-e .' >> requirements.txt
