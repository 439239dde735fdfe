# `make demo` and `make test` are all that is needed; `make help` lists the rest.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PYTEST_ARGS ?=
# each process runs whole files of tests, in one thread
JOBS ?= logical
PARALLEL := -n $(JOBS) --maxprocesses 8 --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help install demo test slow mixins check lint types docs format constraints clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# Done once, and again only when one of these three files changes. torch comes first and by its plain version, so that
# pip takes the build (CPU or CUDA) that the machine's own package index offers.
$(INSTALLED): setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt "$$(sed -n 's/^\(torch==[^ ;]*\).*/\1/p' constraints.txt)"
	$(BIN)/python -m pip install -c constraints.txt -e ".[dev]"
	@touch $@

install: $(INSTALLED)  ## create .venv with the package (editable) and all tools

demo: $(INSTALLED)  ## install, then run the embedded model: text, thinking steps, energies
	$(BIN)/ebt demo

test: $(INSTALLED)  ## install, then run the test suite without its slow tests
	$(BIN)/python -m pytest $(PARALLEL) $(PYTEST_ARGS)

slow: $(INSTALLED)  ## the whole test suite, slow tests included
	$(BIN)/python -m pytest $(PARALLEL) -m "slow or not slow" $(PYTEST_ARGS)

# A development check (docs/hf_test_mixins.md): transformers' own model tests, which are in its source distribution only.
mixins: $(INSTALLED)  ## run our models through the common model tests of transformers
	@folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && \
	version=$$($(BIN)/python -c "import transformers; print(transformers.__version__)") && \
	$(BIN)/python -m pip install -q parameterized && \
	$(BIN)/python -m pip download -q --no-deps --no-binary transformers -d "$$folder" "transformers==$$version" && \
	tar -xzf "$$folder"/transformers-*.tar.gz -C "$$folder" && \
	TRANSFORMERS_SOURCE="$$(echo "$$folder"/transformers-*/)" $(BIN)/python -m pytest -m "" tests/hf_mixins $(PYTEST_ARGS)

check: lint types test docs  ## what CI runs

lint: $(INSTALLED)  ## ruff: rules and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy cannot look through an editable installation, and the checkout's folder need not be called ebt_transformers:
# it sees the package through a link of that name.
types: $(INSTALLED)  ## mypy on the package
	@link=$$(mktemp -d) && trap 'rm -rf "$$link"' EXIT && ln -s "$(CURDIR)" "$$link/ebt_transformers" && cd "$$link" && \
	MYPYPATH="$$link" "$(CURDIR)/$(BIN)/mypy" --config-file "$(CURDIR)/pyproject.toml" \
		--cache-dir "$(CURDIR)/.mypy_cache" -p ebt_transformers

format: $(INSTALLED)  ## let ruff fix and format everything
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(INSTALLED)  ## build the documentation into site/ (any warning or broken link fails)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

constraints: $(INSTALLED)  ## write constraints.txt from what is installed in .venv
	$(BIN)/python .ci/constraints.py > constraints.tmp && mv constraints.tmp constraints.txt

clean:  ## remove .venv, builds and caches
	rm -rf $(VENV) build dist site *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
