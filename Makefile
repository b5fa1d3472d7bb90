INSTALLED := .venv/installed
BIN := .venv/bin

.PHONY: demo up test chaos fuzz soak lint format bench audit lock

demo: $(INSTALLED)  ## the main job, end to end; writes demo.png
	$(BIN)/python examples/demo.py

up: $(INSTALLED)  ## serve on http://127.0.0.1:8000 until Ctrl-C
	$(BIN)/timetuner up

test: $(INSTALLED)
	$(BIN)/pytest --numprocesses auto --maxprocesses 4 --dist loadgroup

lint: $(INSTALLED)
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(INSTALLED)
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

chaos: $(INSTALLED)  ## processes killed at random while they work; a quarter of an hour
	$(BIN)/python -m tests.chaos

fuzz: $(INSTALLED)  ## 15,000 requests of all kinds against the OpenAPI document; 21 minutes on a busy machine
	$(BIN)/python -m tests.fuzz

soak: $(INSTALLED)  ## 10,000 small jobs, and whether processes grow; over an hour on a busy machine
	$(BIN)/python -m tests.soak

bench: $(INSTALLED)  ## all tuners on all shipped models; half an hour on two cores
	$(BIN)/timetuner compare

audit:  ## known vulnerabilities of what requirements.lock pins (needs uv, and where it asks)
	uv tool run pip-audit -r requirements.lock --disable-pip --require-hashes

lock:  ## pin the newest versions pyproject.toml allows
	uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 --generate-hashes --upgrade \
		--no-emit-index-url --no-annotate --custom-compile-command "make lock" --quiet -o requirements.lock

$(INSTALLED): .ci/bootstrap requirements.lock pyproject.toml
	.ci/bootstrap
