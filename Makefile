# `make demo`, `make test` and `make check` each set up .venv on a bare machine and run.
PYTHON ?= python3
BIN := .venv/bin
RUN := .venv/.run
DEV := .venv/.dev

.PHONY: demo test coverage quick docs attack check clean

demo: $(RUN)
	$(BIN)/mvit-export --to all --variant xxs --overwrite
	$(BIN)/mvit-export verify artifacts/mobilevit_xxs

test: $(DEV)
	$(BIN)/pytest -n auto --dist worksteal --durations=15

# Tracing every line slows the converters, so coverage stands apart from the suite that CI runs.
coverage: $(DEV)
	$(BIN)/pytest -n auto --dist worksteal --cov --cov-report=term:skip-covered

quick: $(DEV)
	$(BIN)/pytest -n auto --dist worksteal -m 'not slow and not docs and not attack'

# Every command that README and docs/ show, as printed, in an empty folder a page. The gate of one of them wants the
# machine to itself.
docs: $(DEV)
	$(BIN)/pytest -n auto -m "docs or not docs" tests/docs -k "not ci.md"
	$(BIN)/pytest -m "docs or not docs" tests/docs -k "ci.md"

# Hostile and damaged material, the same cases at every run; ATTACK_SEED=7 draws others.
attack: $(DEV)
	$(BIN)/pytest -q -n 2 --dist worksteal -m "attack or not attack" tests/attack

check: $(DEV)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

$(RUN): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -e '.[all]'
	@touch $@

$(DEV): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	@touch $@ $(RUN)

clean:
	rm -rf .venv .coverage build dist *.egg-info
