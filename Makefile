INSTALLED := .venv/installed
SERVICE_INSTALLED := .venv/installed-service
BIN := .venv/bin
# Tests that start processes wait for them half of the time, so there may be more of pytest's own than cores.
IN_PARALLEL := --numprocesses 3 --dist loadgroup --no-loadscope-reorder
REDOCLY := @redocly/cli@2.77.0

.PHONY: demo up test test-all chaos containers fuzz soak lint openapi docs format bench audit lock

demo: $(SERVICE_INSTALLED)  ## the main job, end to end; writes demo.png
	$(BIN)/python examples/demo.py

up: $(SERVICE_INSTALLED)  ## serve on http://127.0.0.1:8000 until Ctrl-C
	$(BIN)/timetuner up

test: $(INSTALLED)
	$(BIN)/pytest $(IN_PARALLEL)

test-all: $(INSTALLED)  ## the exhaustive matrices too, and every test on both engines
	$(BIN)/pytest $(IN_PARALLEL) --all

lint: $(INSTALLED)
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/python tools/synchronous_client.py --check
	$(BIN)/mypy
	$(BIN)/lint-imports

openapi: $(INSTALLED)  ## the API's description against Redocly's rules, warnings counted
	$(BIN)/python -c "import json, service.app; print(json.dumps(service.app.create_app().openapi()))" > .venv/openapi.json
	PATH="$(CURDIR)/$(BIN):$$PATH" REDOCLY_TELEMETRY=off REDOCLY_SUPPRESS_UPDATE_NOTICE=true \
		npx --yes $(REDOCLY) lint --extends=recommended-strict .venv/openapi.json

docs: $(INSTALLED)  ## the documentation as a web site, into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

format: $(INSTALLED)
	$(BIN)/python tools/synchronous_client.py
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

chaos: $(INSTALLED)  ## parts that fail at random while they work; half an hour
	$(BIN)/python -m tests.chaos

containers: $(INSTALLED)  ## build the images and run docker-compose.yml without Docker; needs root on Debian (docs/containers.md)
	$(BIN)/python tools/containers.py

fuzz: $(INSTALLED)  ## 20,000 requests of all kinds against the OpenAPI document; 10 to 30 minutes
	$(BIN)/python -m tests.fuzz

soak: $(INSTALLED)  ## 10,000 small jobs, and whether processes grow; half an hour
	$(BIN)/python -m tests.soak

bench: $(INSTALLED)  ## all tuners on four shipped models; 20 minutes on two slow cores
	$(BIN)/timetuner compare

audit:  ## known vulnerabilities of what requirements.lock pins (needs uv, and where it asks)
	uv tool run pip-audit -r requirements.lock --disable-pip --require-hashes

lock:  ## pin the newest versions pyproject.toml allows
	uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 --generate-hashes --upgrade \
		--no-emit-index-url --no-annotate --custom-compile-command "make lock" --quiet -o requirements.lock
	# The images' packages are some of those, in the same versions.
	for extras in build server server,worker; do \
		uv pip compile pyproject.toml $$(echo ,$$extras | sed 's/,/ --extra /g') --constraint requirements.lock \
			--universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-annotate \
			--custom-compile-command "make lock" --quiet -o requirements/$${extras##*,}.lock || exit 1; \
	done

$(INSTALLED): .ci/bootstrap requirements.lock pyproject.toml
	.ci/bootstrap

# The service and the library, without what tests and lint need. TORCH=cpu: PyTorch without CUDA.
$(SERVICE_INSTALLED): .ci/bootstrap requirements/build.lock requirements/worker.lock pyproject.toml
	.ci/bootstrap service
