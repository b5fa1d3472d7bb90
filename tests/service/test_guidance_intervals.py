"""One schedule for an interval of guidance scales: how it is asked for, judged, found, exported and imported."""

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from service.app import create_app
from service.registry.database import Registry
from service.registry.tables import TuningJob
from service.shared.queue import celery_app
from service.shared.settings import Settings
from tests.service.problems import assert_problem
from tests.stack import SMALLEST, Json
from worker.runtime import Runtime
from worker.tuning import run_tuning_job
from worker.tuning_progress import TuningProgress

GUIDED: Json = {"num_steps": 4, "guidance_type": "classifier-free"}
TUNING: Json = {
    **GUIDED,
    "guidance_scales": [1, 4],
    "tuner": {"objective": "solver", "total_iters": 2, "population_size": 48, "teacher_num_steps": 20},
    "evaluation": {"num_samples": 64, "max_num_samples": 64, "teacher_num_steps": 20, "batch_size": 64},
}


class Service:
    """An API whose tuning jobs run in this process, and the network calls of the last one."""

    def __init__(self, client: TestClient, settings: Settings) -> None:
        self.client, self.settings, self.calls = client, settings, 0
        self.model: str = client.post("/v1/models", json={"builtin": "mixture-ring"}).json()["id"]

    def tune(self, **request: Any) -> Json:
        """The job at its end."""
        job = self.client.post("/v1/tuning-jobs", json={"model": self.model, **TUNING, **request}).json()["id"]
        runtime = Runtime(self.settings, celery_app(self.settings.broker_url))
        self.calls, count = 0, TuningProgress.count

        def counted(progress: TuningProgress) -> None:
            self.calls += 1
            count(progress)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(TuningProgress, "count", counted)
            assert runtime.run(TuningJob, job, run_tuning_job)
        runtime.registry.close()
        done: Json = self.client.get(f"/v1/tuning-jobs/{job}").json()
        assert done["state"] == "succeeded", done["error"]
        return done

    def schedule(self, id: str) -> Json:
        schedule: Json = self.client.get(f"/v1/schedules/{id}").json()
        return schedule

    def resolve(self, **query: Any) -> Json:
        answer = self.client.get("/v1/schedules/resolve", params={"model": self.model, **GUIDED, **query})
        assert answer.status_code == 200, answer.text
        found: Json = answer.json()
        return found


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    home: Path = tmp_path_factory.mktemp("home")
    settings = Settings(timetuner_home=home, broker_url="redis://127.0.0.1:1/0", device="cpu")
    registry = Registry(settings.database_url)
    registry.upgrade()
    registry.close()
    with TestClient(create_app(settings), base_url="http://127.0.0.1", client=("127.0.0.1", 1)) as client:
        yield Service(client, settings)


@pytest.fixture(scope="module")
def job(service: Service) -> Json:
    return service.tune()


@pytest.fixture(scope="module")
def tuned(service: Service, job: Json) -> Json:
    schedule = service.schedule(job["schedule"])
    assert schedule["status"] == "accepted", schedule["evaluation"]["reason"]
    return schedule


def test_all_its_network_calls_are_counted_and_later_jobs_of_the_setting_need_fewer(service: Service) -> None:
    request: Json = {"guidance_scales": [2, 3], "num_steps": 3, "evaluation": {**SMALLEST, "batch_size": 8}}
    first = service.tune(**request)
    assert sum(phase["total"] for phase in first["phases"]) == service.calls
    second = service.tune(**request, tuner={"objective": "end_to_end", "total_iters": 2, "population_size": 16})
    assert sum(phase["total"] for phase in second["phases"]) == service.calls
    before, after = (job["phases"][-1]["total"] for job in (first, second))
    # At each of three scales, two batches of 16 noises are not sampled on three named grids, and with more steps.
    assert before - after >= 3 * 2 * (2 * 3 + 5 + 6 + 9 + 12)
    worths = [
        [each["worth"]["untuned"] for each in service.schedule(job["schedule"])["evaluation"]["at_scales"]]
        for job in (first, second)
    ]
    assert worths[0] == worths[1]
    other = service.tune(**request, seed=1)
    assert other["phases"][-1]["total"] == before


def test_it_is_judged_at_both_ends_and_in_the_middle(tuned: Json) -> None:
    assert (tuned["guidance_scale"], tuned["guidance_scales"]) == (1, [1, 4])
    evaluation = tuned["evaluation"]
    each = {one["guidance_scale"]: one for one in evaluation["at_scales"]}
    assert list(each) == [1, 2.5, 4]
    assert {one["verdict"] for one in each.values()} == {"accepted"}
    decides = each[evaluation["guidance_scale"]]
    assert decides["score"] == tuned["score"] == max(one["score"] for one in each.values())
    assert (decides["metrics"], decides["worth"]) == (evaluation["metrics"], evaluation["worth"])
    assert evaluation["reason"].startswith(f"at guidance scale {evaluation['guidance_scale']:g} fell")
    assert evaluation["summary"].startswith(f"At guidance scale {evaluation['guidance_scale']:g}, where it gains least")


def test_auto_serves_every_scale_inside_and_none_outside(service: Service, tuned: Json) -> None:
    for scale in (1, 1.7, 4):
        found = service.resolve(guidance_scale=scale)
        assert found["schedule"]["id"] == tuned["id"]
        assert "for guidance_scale 1 to 4" in found["reason"]
    outside = service.resolve(guidance_scale=4.5)
    assert outside["schedule"] is None
    assert outside["reason"].endswith(f"{tuned['id']}, does not match: guidance_scale is 4.5, tuned for 1 to 4")
    other = service.resolve(guidance_scale=3, guidance_rescale=0.5)
    assert other["schedule"] is None
    assert other["reason"].endswith("does not match: guidance_rescale is 0.5, tuned for 0")
    sampled = service.client.post(
        "/v1/samples",
        json={"model": service.model, **GUIDED, "guidance_scale": 3.3, "class_labels": 1},
        headers={"Prefer": "respond-async"},
    )
    assert sampled.json()["schedule"] == tuned["id"]


def test_a_schedule_of_the_very_scale_goes_before_an_interval(service: Service, tuned: Json) -> None:
    exact = service.schedule(service.tune(guidance_scales=None, guidance_scale=2)["schedule"])
    assert exact["guidance_scales"] is None
    assert exact["evaluation"]["at_scales"] is None
    assert exact["status"] == "accepted", exact["evaluation"]["reason"]
    assert service.resolve(guidance_scale=2)["schedule"]["id"] == exact["id"]
    assert service.resolve(guidance_scale=2.1)["schedule"]["id"] == tuned["id"]


def test_it_is_exported_with_its_interval_and_imported_as_a_version_of_its_own(service: Service, tuned: Json) -> None:
    path = f"/v1/schedules/{tuned['id']}/export"
    exported = service.client.get(path)
    content = exported.json()
    assert (content["guidance_scale"], content["guidance_scales"]) == (1, [1, 4])
    imported = service.client.post("/v1/schedules", json=content)
    assert imported.status_code == 201, imported.text
    assert imported.json()["guidance_scales"] == [1, 4]
    assert imported.json()["version"] == tuned["version"] + 1
    # A schedule for the lowest scale alone has versions of its own.
    alone = service.client.post("/v1/schedules", json={**content, "guidance_scales": None}).json()
    assert (alone["guidance_scales"], alone["version"]) == (None, 1)
    card = service.client.get(path, params={"format": "card"})
    assert "classifier-free, scale 1 to 4" in card.text
    notes = json.loads(card.headers["TimeTuner-Not-Carried"])
    assert notes == ["Guidance is the caller's: it was tuned with classifier-free guidance of scale 1 to 4."]


def test_pages_show_the_interval_and_each_scale(service: Service, job: Json, tuned: Json) -> None:
    page = service.client.get(f"/schedules/{tuned['id']}", headers={"Accept": "text/html"}).text
    assert "classifier-free ×1 to 4" in page
    for scale, after in pairwise(("1", "2.5", "4", None)):
        assert after is None or f">{scale}</th><td>accepted</td>" in page
    assert "classifier-free × 1 to 4" in service.client.get(f"/jobs/{job['id']}", headers={"Accept": "text/html"}).text
    form = {"model": service.model, **GUIDED, "guidance_scale": "1.5", "guidance_scale_high": "3"}
    own = {"Origin": "http://127.0.0.1"}
    made = service.client.post("/jobs", data=form, headers=own, follow_redirects=False)
    assert made.status_code == 303, made.text
    queued = service.client.get(f"/v1/tuning-jobs/{made.headers['Location'].rpartition('/')[2]}").json()
    assert queued["request"]["guidance_scales"] == [1.5, 3]


@pytest.mark.parametrize(
    ("request_", "field", "accepted"),
    [
        ({"guidance_scales": [3, 3]}, "guidance_scales", "the lowest guidance scale, then a higher one"),
        ({"guidance_scales": [3]}, "guidance_scales", "at least 2"),
        ({"guidance_scales": [1, 2, 3]}, "guidance_scales", "at most 2"),
        ({"guidance_scales": [1, 1001]}, "guidance_scales.1", "1000"),
        ({"guidance_scale": 2}, "guidance_scale", "beside guidance_scales: none, or the lowest"),
        ({"guidance_type": "uncond"}, "guidance_scales", "null when guidance_type is 'uncond'"),
        ({"tuner": {"objective": "dmn"}}, "tuner.objective", "'end_to_end' or 'solver'"),
        ({"tuner": {"objective": "next_eps"}}, "tuner.objective", "'end_to_end' or 'solver'"),
    ],
)
def test_a_bad_interval_is_refused_by_its_field(service: Service, request_: Json, field: str, accepted: str) -> None:
    answer = service.client.post("/v1/tuning-jobs", json={"model": service.model, **TUNING, **request_})
    assert_problem(answer, 422, field, accepted)
