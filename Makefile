# The verbs of this repository. Each does its own set-up on a fresh machine.
PORT ?= 8000
ARGS ?=

.PHONY: help serve test lint bench parity clean

help:
	@echo "make serve    serve the demo model on port $(PORT) (PORT=..., ARGS='--Worker.model=Qwen/Qwen3-0.6B')"
	@echo "make test     lint, types, import rules and every test"
	@echo "make lint     the static part of it"
	@echo "make bench    the benchmarks whose figures are in docs/"
	@echo "make parity   run the conformance kit and print the table of the README"
	@echo "make clean    remove the virtual environment and caches"

serve:
	@scripts/setup torch fast-tokenizer
	@.venv/bin/dynamo serve graphs.agg -f configs/agg.yaml --Frontend.port=$(PORT) $(ARGS)

test: lint
	.venv/bin/python -m pytest $(ARGS)

lint:
	@scripts/setup torch dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports --no-cache

bench:
	@scripts/setup torch dev
	.venv/bin/python -m benchmarks.torch_engine
	.venv/bin/python -m benchmarks.http_overhead

parity:
	@scripts/setup torch dev
	rm -rf build/parity
	DYNAMO_CONFORMANCE_RESULTS=build/parity .venv/bin/python -m pytest -q tests/conformance/test_torch.py tests/conformance/test_echo.py
	@.venv/bin/python -m dynamo.testing.matrix build/parity

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist
