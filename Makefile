# Each target makes .venv first when it is missing, so on a fresh machine any of them is the only command needed.
# pip compiles nothing: Python does, at the first import, what is imported.
# Only `gpu` runs without .venv where torch in PYTHON can use the GPU: such a machine may have no internet.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
READY := .venv/ready

.PHONY: demo test test-all check docs install-trial client-trial robustness bench bench-sim gpu mutants protos picture clean

demo: $(READY)            ## three daemons on this machine answer a prompt together
	$(BIN)/ruyi-flow demo

# In a process a core and one more, four at the most; a file's tests share their families.
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test: $(READY)            ## all tests but the slow ones
	$(PYTEST) -m "not slow"

test-all: $(READY)        ## all tests
	$(PYTEST)

check: $(READY)           ## format, lint, types, import order
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

docs: $(READY)            ## the documentation, in site/: generated pages first, and no broken link
	$(BIN)/python -m tests.generate_docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

install-trial: $(READY)   ## build the wheels, and try them in empty environments on every Python of this machine
	$(BIN)/python -m tests.install

client-trial: $(READY)    ## LiteLLM in an environment of its own, and curl, against real daemons and their HTTP server
	$(BIN)/python -m tests.http.clients

robustness: $(READY)      ## faults of real nodes and links: FAULTS=1000 SEED=1 REPLICAS=2 JOBS=2
	$(BIN)/python -m tests.robustness --faults $(or $(FAULTS),100) --seed $(or $(SEED),1) --replicas $(or $(REPLICAS),1) \
		--jobs $(or $(JOBS),1)

bench: $(READY)           ## measure; ends in one JSON line
	$(BIN)/python -m tests.bench

bench-sim: $(READY)       ## the simulator against the running system; writes docs/results/fidelity.md
	$(BIN)/ruyi-flow bench fidelity --table docs/results/fidelity.md

gpu:                      ## tests and benchmarks for one NVIDIA GPU, in ten minutes; ends in one JSON line
	@python="$(PYTHON)"; \
	"$$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null \
		|| { python=$(BIN)/python && $(MAKE) --silent $(READY); } \
		&& "$$python" -m tests.bench.gpu

mutants: $(READY)         ## change the pure core in small ways, and count what the tests notice
	$(BIN)/python -m tests.mutants

protos: $(READY)          ## generate ruyi_flow/transport/_pb from protos/
	$(BIN)/python -m tests.generate_protos

picture: $(READY)         ## draw docs/images/demo.svg from a run of the demo
	$(BIN)/python -m tests.draw_demo

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' || (echo "Python 3.11 to 3.14 is needed; set PYTHON=…" && exit 1)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

clean:                    ## remove .venv and caches
	rm -rf .venv site mutants .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
