# `make demo` and `make test` set themselves up: they need only Python and pip.
#
#   PYTHON=python3.13 make test     chooses the interpreter; .venv follows it
#   make quick                      the tests of what git says has changed
#   make test-slow                  the slowest tests: more meshes, lost processes, kills, notebooks that train
#   make test-extras                the tests that need torch, lm-eval, gcsfs, Beam, W&B and a TPU's compiler (7.6 GB), and a model (0.5 GB)
#   make docs                       the pages of docs/ as a site, in site/

PYTHON ?= python3
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
READY := .venv/ready-$(VERSION)
RUN ?= runs/demo
BIN := .venv/bin
EXTRAS := .venv-extras/ready-$(VERSION)

.PHONY: demo test quick test-slow test-extras test-wheel lint docs notebooks clean

demo: $(READY)
	$(BIN)/prmoe train --config=configs/tiny.py:prmoe --workdir=$(RUN)
	@echo
	$(BIN)/prmoe eval --workdir=$(RUN)
	@echo
	$(BIN)/prmoe generate --workdir=$(RUN) --prompt="The people of the United States"
	@echo
	@echo "The run is in $(RUN): config.json, metrics.jsonl, tokenizer.json, checkpoints/, tensorboard/"

test: $(READY)
	$(BIN)/pytest -n 2 --dist worksteal -m "not slow"

quick: $(READY)
	@tests=$$($(BIN)/python -m tests.repository.changed) && echo "tests: $${tests:-none}" && \
	{ test -z "$$tests" || $(BIN)/pytest -n 2 --dist worksteal -m "not slow" $$tests; }

test-slow: $(READY)
	$(BIN)/pytest -n 2 --dist worksteal -m slow

test-extras: $(EXTRAS)
	XLA_FLAGS=--xla_backend_optimization_level=1 .venv-extras/bin/pytest -n 2 --dist worksteal -m extra -rs

# The package as its users install it: in an environment of its own, outside the checkout.
test-wheel:
	rm -rf build
	$(PYTHON) -m venv build/venv
	build/venv/bin/pip wheel --quiet --no-deps --wheel-dir build .
	build/venv/bin/pip install --quiet --disable-pip-version-check "$$(ls build/*.whl)[data]"
	mkdir build/elsewhere
	cd build/elsewhere && ../venv/bin/prmoe params --paper
	cd build/elsewhere && ../venv/bin/prmoe train --config=tiny:prmoe --config.train.steps=5 --workdir=run

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/mypy

# Each from a clean kernel, with its outputs; the texts beside them are the sources.
notebooks: $(READY)
	cd notebooks && ../$(BIN)/jupytext --quiet --to ipynb --execute *.py

docs: .venv/docs-$(VERSION)
	$(BIN)/python docs/generate.py --check
	$(BIN)/mkdocs build --strict

clean:
	rm -rf .venv .venv-extras .cache site build *.egg-info

# Another interpreter, or changed requirements, make an environment anew.
$(READY): setup.py
	rm -rf .venv
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[data,dev]'
	touch $@

$(EXTRAS): setup.py
	rm -rf .venv-extras
	$(PYTHON) -m venv .venv-extras
	.venv-extras/bin/pip install --quiet --disable-pip-version-check -e '.[data,dev,beam,eval,gcs,interop,text,tpu,wandb]'
	touch $@

.venv/docs-$(VERSION): $(READY)
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[docs]'
	touch $@
