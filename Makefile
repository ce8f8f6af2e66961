# `make demo` and `make test` are all that is needed. Both make .venv and install into it; a second call installs nothing.
#
# PYTHON=python3.12  the Python that .venv is made with (default: the newest of 3.13, 3.12, 3.11; `make clean` to change)
# TORCH_INDEX=URL    another build of torch, such as https://download.pytorch.org/whl/cpu (remembered in .venv)

# Python keeps compiled modules, whatever the environment says: a test starts hundreds of processes.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
VENV := .venv
BIN := $(VENV)/bin
TORCH_INDEX ?= $(shell cat $(VENV)/torch-index 2>/dev/null)

# The stamp's name holds a checksum of all that decides what is installed (and where: scripts hold absolute paths).
KEY := $(shell { cat pyproject.toml constraints.txt; echo '$(TORCH_INDEX)'; pwd; } | cksum | cut -d' ' -f1)
STAMP := $(VENV)/installed-$(KEY)
NOTEBOOKS := $(VENV)/notebooks-$(KEY)

USABLE := import ensurepip, sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))

# Tests and mypy see the phases under their installed names (phase1, ...): links, where nothing is installed.
LINK_PHASES = rm -rf $(VENV)/phases && mkdir -p $(VENV)/phases && for phase in phase-*; do \
    number=$${phase\#phase-}; ln -s "../../$$phase/engine" "$(VENV)/phases/phase$${number%%-*}"; done

LESSONS := --nbmake --nbmake-timeout=600 phase-*/lesson.ipynb

# `make gpu` writes into OUT; with DRY_RUN=1, which needs no card and computes nothing, into a folder in it.
OUT ?= gpu-results
RESULTS = $(OUT)$(if $(DRY_RUN),/dry-run)
GPU_BENCH ?= --rounds 3

.PHONY: help demo bench diff notebook test test-all mutants interop sanitize gpu lint mypy-tests mypy-phases install clean

help:  ## list the targets
	@echo "usage: make TARGET [PYTHON=python3.12] [TORCH_INDEX=https://download.pytorch.org/whl/cpu]"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1|\2/p' Makefile | awk -F'|' '{ printf "%-12s %s\n", $$1, $$2 }'

demo: $(STAMP)  ## run every phase on the embedded models and print one table
	@$(BIN)/lab demo

bench: $(STAMP)  ## every phase's bench at its quick size, and the README's table and picture measured again
	@$(BIN)/lab bench --readme

diff: $(STAMP)  ## how phase N differs from the one before: make diff N=2
	@$(BIN)/lab diff $(or $(N),$(error name a phase: make diff N=2))

notebook: $(NOTEBOOKS)  ## open the notebook of phase N, and install JupyterLab for it: make notebook N=2
	$(BIN)/python -m jupyterlab $(or $(wildcard phase-$(N)-*/lesson.ipynb),$(error name a phase: make notebook N=2))

# The plugins are named, because pytest would load all that are installed, and rewrite their assertions, in each process.
test: lint  ## lab drift, ruff, mypy --strict, and the tests (of the notebooks too) that are quick and need no graphics card
	OMP_NUM_THREADS=1 PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 $(BIN)/pytest -p xdist.plugin -p _hypothesis_pytestplugin \
	    -n auto --dist worksteal -m "not slow and not gpu" tests

test-all: lint  ## every test, the slow ones too; those for a graphics card where there is one
	$(BIN)/pytest $(LESSONS) tests

mutants: $(STAMP)  ## change the engine in many small ways, one at a time, and see that tests notice: make mutants ONLY=verify.py
	@$(LINK_PHASES)
	PYTHONPATH=.:$(VENV)/phases $(BIN)/python -m tests.support.mutation $(ONLY)

interop: $(STAMP)  ## programs that others wrote, in environments of their own, against the server, the sweep and the results
	@$(LINK_PHASES)
	PYTHONPATH=.:$(VENV)/phases $(BIN)/python -m tests.support.interop

sanitize: $(STAMP)  ## the C++ kernels under the compiler's sanitizers: addresses, undefined behaviour, threads
	cd phase-5-kernels-kvcache && PYTHONPATH=.:.. ../$(BIN)/python -m checks.sanitize

# GPU_PYTHON=python3 takes a Python that has the dependencies already, instead of .venv. The parts are in the order of what
# a short time with a card is worth most for: kernels and ledger, captured steps, all tests, benches from the newest phase
# on. PARTS="ledger graphs" runs these alone. A part that fails does not stop the others; what each gave and took is in
# OUT/manifest.json. A dry run captures steps on the emulator of CUDA.
gpu: $(if $(GPU_PYTHON),,$(STAMP))  ## on a machine with a graphics card: its tests, and every phase's bench into OUT
	@$(LINK_PHASES); $(if $(DRY_RUN),rm -rf "$(RESULTS)";) mkdir -p "$(RESULTS)"; rm -f "$(RESULTS)/parts.tsv"
	@python='$(or $(GPU_PYTHON),$(BIN)/python)'; failed=0; \
	part() { \
	    name=$$1; shift; case " $(or $(PARTS),$$name) " in *" $$name "*) ;; *) return 0 ;; esac; \
	    echo "$$name: $$*"; began=$$(date +%s); status=0; \
	    "$$@" > "$(RESULTS)/$$name.txt" || { status=$$?; failed=1; }; \
	    tail -n 40 "$(RESULTS)/$$name.txt" | cut -c1-200; \
	    printf '%s\t%s\t%s\n' $$name $$status $$(($$(date +%s) - began)) >> "$(RESULTS)/parts.tsv"; \
	}; \
	$(if $(DRY_RUN),,part ledger env PYTHONPATH=phase-5-kernels-kvcache:.:$$PYTHONPATH $$python -m checks.ledger --write; \
	cp phase-5-kernels-kvcache/engine/kernels/verified.json "$(RESULTS)/";) \
	part graphs env PYTHONPATH=.:$(VENV)/phases:$$PYTHONPATH \
	    $(if $(DRY_RUN),$$python -m pytest -p no:cacheprovider -m "not slow" -k "plain or grows" tests/phase6/test_graphs.py,\
	    $$(command -v compute-sanitizer) $$python -m pytest -p no:cacheprovider -m gpu tests/phase6/test_gpu_graphs.py); \
	part tests env PYTHONPATH=.:$(VENV)/phases:$$PYTHONPATH $$python -m pytest -p no:cacheprovider -m gpu \
	    $$(grep -lr --include='test_*.py' 'mark\.gpu' tests); \
	for phase in $$(printf '%s\n' phase-* | sort -r); do \
	    part $$phase env PYTHONPATH=. $$python $$phase/bench.py --device $(if $(DRY_RUN),auto --dry-run,cuda) \
        $(GPU_BENCH) --output "$(RESULTS)/$$phase"; \
	done; \
	PYTHONPATH=. $$python -m common.gpu_manifest "$(RESULTS)" && exit $$failed

# mypy runs once per phase, because each phase has its own package called `engine`; it does not follow editable installs.
# It analyses torch with the first phase, which takes most of its time. The tests, and the phases one after the other, go
# on from that cache, each in a cache of its own, because they run side by side. What is byte-identical in the next phase
# is not analysed again.
lint: $(STAMP)  ## lab drift, lab tables --check, ruff format --check, ruff check, mypy --strict
	$(BIN)/lab drift
	$(BIN)/lab tables --check
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	@$(LINK_PHASES)
	MYPYPATH=phase-1-baseline:. $(BIN)/mypy --strict --cache-dir .mypy_cache/phases phase-1-baseline
	@[ -d .mypy_cache/tests ] || cp -pR .mypy_cache/phases .mypy_cache/tests
	@$(MAKE) --no-print-directory --jobs 2 mypy-tests mypy-phases

mypy-tests:
	MYPYPATH=.:$(VENV)/phases $(BIN)/mypy --strict --cache-dir .mypy_cache/tests common tests

mypy-phases:
	@for phase in $(filter-out phase-1-%,$(sort $(wildcard phase-*))); do \
	    echo "MYPYPATH=$$phase:. $(BIN)/mypy --strict $$phase"; \
	    MYPYPATH=$$phase:. $(BIN)/mypy --strict --cache-dir .mypy_cache/phases $$phase || exit 1; \
	done

install: $(STAMP)  ## make .venv and install into it (demo and test do this by themselves)

$(STAMP):
	@set -e; \
	if ! $(BIN)/python -c 'import pip; $(USABLE)' 2>/dev/null; then \
	    for python in $(or $(PYTHON),python3.13 python3.12 python3.11 python3) none; do \
	        if [ $$python = none ]; then \
	            echo "error: no Python 3.11 to 3.13 with venv and pip (tried: $(or $(PYTHON),python3.13," \
	                "python3.12, python3.11, python3)); install one, or name it: make PYTHON=/path/to/python3.12" >&2; \
	            exit 2; \
	        fi; \
	        if $$python -c '$(USABLE)' 2>/dev/null; then break; fi; \
	    done; \
	    $$python -m venv --clear $(VENV); \
	fi; \
	echo "Installing into $(VENV), with $$($(BIN)/python -V); the first time takes minutes, most of it for torch"; \
	rm -f $(VENV)/installed-*; \
	if [ "$(TORCH_INDEX)" != "$$(cat $(VENV)/torch-index 2>/dev/null)" ]; then \
	    $(BIN)/python -m pip uninstall -qq -y torch; \
	    echo "$(TORCH_INDEX)" > $(VENV)/torch-index; \
	fi; \
	cp constraints.txt $(VENV)/constraints.txt; \
	if [ -n "$(TORCH_INDEX)" ]; then \
	    $(BIN)/python -m pip install -q --index-url "$(TORCH_INDEX)" torch; \
	    grep -v '^torch==' constraints.txt > $(VENV)/constraints.txt; \
	fi; \
	$(BIN)/python -m pip install -q -c $(VENV)/constraints.txt -e '.[dev]'; \
	touch $@

$(NOTEBOOKS): $(STAMP)
	rm -f $(VENV)/notebooks-*
	$(BIN)/python -m pip install -q -c $(VENV)/constraints.txt -e '.[notebook]'
	touch $@

clean:  ## remove .venv, caches and build products
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
