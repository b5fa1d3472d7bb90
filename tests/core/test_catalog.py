"""The catalog, against the code that it describes."""

import sys
from pathlib import Path

import pytest

from service.shared import sampler_facts as facts
from tests.packages import MIDPOINT, install
from timetuner_core.catalog import BUILTINS, SAMPLER_FACTS, builtin_specs
from timetuner_core.models.describing import describe
from timetuner_core.models.loading import load_builtin
from timetuner_core.samplers import SAMPLERS


@pytest.mark.parametrize("name", BUILTINS)
def test_built_in_models_are_what_the_catalog_says(name: str) -> None:
    assert builtin_specs()[name] == describe(load_builtin(name))


def test_the_catalog_has_all_samplers() -> None:
    assert {name: sampler.facts for name, sampler in SAMPLERS.items()} == SAMPLER_FACTS


def test_facts_of_installed_samplers_are_read_without_loading_them_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, "own_midpoint", MIDPOINT)
    install(tmp_path, "own_missing", "import a_module_that_nobody_has")
    install(tmp_path, "own_number", "SAMPLER = 3")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    facts._installed_samplers.cache_clear()
    try:
        with monkeypatch.context() as busy:  # A machine that is too busy just now: the failure is not remembered.
            busy.setattr(facts, "LOAD_SECONDS", 0.001)
            with pytest.raises(facts.SamplersUnknownError, match=r"cannot be loaded now .*timed out"):
                facts.sampler_facts("own_midpoint")
        with monkeypatch.context() as server:  # The server's image has no PyTorch: no later try would do better.
            server.setattr(facts, "python", lambda *_: [sys.executable, "-S", "-c", "import torch"])
            with pytest.raises(ValueError, match=r"'own_midpoint' cannot be loaded .*No module named 'torch'"):
                facts.sampler_facts("own_midpoint")
        own = facts.sampler_facts("own_midpoint")
        assert (own.order, own.calls_per_step, own.takes_eta) == (2, 2, False)
        with pytest.raises(ValueError, match=r"'own_missing' cannot be loaded .*a_module_that_nobody_has"):
            facts.sampler_facts("own_missing")
        with pytest.raises(ValueError, match=r"'own_number' cannot be loaded .*gives a int; accepted: a Sampler"):
            facts.sampler_facts("own_number")
        with pytest.raises(ValueError, match=r"sampler is 'nope'; accepted: ddim, .*own_number"):
            facts.sampler_facts("nope")
        assert "own_midpoint" not in sys.modules
    finally:
        facts._installed_samplers.cache_clear()
