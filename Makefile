# `make demo` and `make test` do all the set-up on a fresh machine.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO := demo-out

.PHONY: demo test check format peers schema clean

demo: $(STAMP)  ## harden the shipped network on the embedded sample and show the summary
	$(BIN)/toolkit harden shipped:cnn8 --data sample --prune 0.5 --int8 --threat paper --epochs 30 --output $(DEMO) --force

test: $(STAMP)  ## all tests; two processes of one thread each
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

check: $(STAMP)  ## format, lint, types, import rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

schema: $(STAMP)  ## write docs/report.schema.json again
	$(BIN)/python -m toolkit.reports.schema > docs/report.schema.json

peers: $(STAMP)  ## an environment of its own with what benchmarks compare against
	$(PYTHON) -m venv .venv-peers
	$(BIN)/python -c "import site; print('import site; site.addsitedir(%r)' % site.getsitepackages()[0])" > .venv-peers/main.pth
	mv .venv-peers/main.pth "$$(.venv-peers/bin/python -c 'import site; print(site.getsitepackages()[0])')/main.pth"
	.venv-peers/bin/python -m pip install --quiet --no-deps --requirement constraints-peers.txt

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed: make PYTHON=python3.12')"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) .venv-peers $(DEMO) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
