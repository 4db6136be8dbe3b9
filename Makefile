# `make demo` and `make test` set themselves up: they need only Python and pip.
#
#   PYTHON=python3.13 make test     chooses the interpreter; .venv follows it

PYTHON ?= python3
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
READY := .venv/ready-$(VERSION)
RUN ?= runs/demo
BIN := .venv/bin

.PHONY: demo test lint clean

demo: $(READY)
	$(BIN)/prmoe train --config=configs/tiny.py:prmoe --workdir=$(RUN)
	@echo
	$(BIN)/prmoe eval --workdir=$(RUN)
	@echo
	$(BIN)/prmoe generate --workdir=$(RUN) --prompt="The people of the United States"
	@echo
	@echo "The run is in $(RUN): config.json, metrics.jsonl, tokenizer.json, checkpoints/, tensorboard/"

test: $(READY)
	$(BIN)/pytest -n 2 --dist worksteal

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf .venv build *.egg-info

# Another interpreter, or changed requirements, make the environment anew.
$(READY): setup.py
	rm -rf .venv
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[data,dev]'
	touch $@
