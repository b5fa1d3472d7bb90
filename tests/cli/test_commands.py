"""Commands, and a service that they use."""

import io
import json
import re
import signal
import subprocess
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from service.client import TimeTuner
from service.registry.keys import Scope
from tests.cli.conftest import COMMAND, Run
from tests.client.conftest import gratings, quick, schedule, service  # noqa: F401
from tests.keys import NewUser
from tests.stack import own_digits8, wait_until

pytestmark = pytest.mark.parametrize("stack", ["sqlite"], indirect=True, scope="session")

QUICK = ["--tuner", "total_iters=2", "--tuner", "population_size=16", "--evaluation", "num_samples=16"]


def test_a_model_is_imported_listed_shown_and_removed(connected: Run, tmp_path: Path) -> None:
    imported = connected("models", "import", str(own_digits8(tmp_path)), "--name", "by-command", "--json")
    assert imported.code == 0, imported.err
    made = json.loads(imported.out)
    assert (made["name"], made["spec"]["num_classes"]) == ("by-command", 10)
    [header, *lines] = connected("models", "list", "--limit", "1").out.splitlines()
    assert header.split()[:2] == ["id", "name"]
    assert [line.split()[:2] for line in lines] == [[made["id"], "by-command"]]
    assert json.loads(connected("models", "show", "by-command", "--json").out) == made
    assert connected("models", "rename", "by-command", "renamed").out.strip() == "renamed"
    assert json.loads(connected("models", "list", "--search", "RENAME", "--json").out)[0]["id"] == made["id"]
    assert connected("models", "rm", f"mdl_{made['id'][-8:]}").out.strip() == made["id"]
    gone = connected("models", "show", "by-command")
    assert (gone.code, gone.out) == (5, "")
    assert "no model 'by-command'; accepted: an id or a name" in gone.err


def test_several_steps_and_tuners_are_one_group_whose_cost_is_told_first(connected: Run, gratings: str) -> None:  # noqa: F811
    both = ["tune", gratings, "--num-steps", "3,2", "--objective", "dmn, ays", "--evaluation", "num_samples=16"]
    tuned = connected(*both, "--json")
    assert tuned.code == 0, tuned.err
    assert re.match(r"4 jobs: at most [\d,]+ samples through the network", tuned.err)
    made = json.loads(tuned.out)
    asked = [(job["request"]["num_steps"], job["request"]["tuner"]["objective"]) for job in made["group"]["jobs"]]
    assert asked == [(3, "dmn"), (3, "ays"), (2, "dmn"), (2, "ays")]
    assert {job["state"] for job in made["group"]["jobs"]} == {"succeeded"}
    assert [one["num_steps"] for one in made["schedules"]] == [3, 3, 2, 2]
    one = made["schedules"][0]["id"]
    assert connected("schedules", "rm", one).out.strip() == one
    assert connected("schedules", "show", one).code == 5
    group = connected(*both, "--detach").out.strip()
    assert group.startswith("grp_")
    wrong = connected("tune", gratings, "--num-steps", "3,many")
    assert (wrong.code, "--num-steps" in wrong.err, "such as 4,6,8" in wrong.err) == (2, True, True)


def test_a_schedule_is_tuned_named_moved_and_sampled_with(connected: Run, gratings: str, tmp_path: Path) -> None:  # noqa: F811
    tuned = connected("tune", gratings, "--num-steps", "3", *QUICK, "--seed", "7", "--json")
    made = json.loads(tuned.out)
    schedule_id = made["schedule"]["id"]
    assert (made["job"]["state"], made["job"]["schedule"], made["job"]["request"]["seed"]) == (
        "succeeded",
        schedule_id,
        7,
    )
    assert f"{made['job']['id']} succeeded" in tuned.err
    shown = connected("schedules", "show", f"sch_{schedule_id[-8:]}").out
    assert made["schedule"]["evaluation"]["summary"] in shown
    assert "teacher_l2" in shown

    assert connected("schedules", "alias", "by-command", schedule_id).out.strip() == "by-command"
    sampled = json.loads(connected("sample", gratings, "--num-steps", "3", "--schedule", "by-command", "--json").out)
    assert sampled["schedule"] == schedule_id
    assert Image.open(tmp_path / "samples.png").size == (262, 262)
    for out in ("four.npy", "four.zip"):
        connected("sample", gratings, "--num-steps", "3", "--num-images", "4", "--schedule", "by-command", "--out", out)
    array = np.load(tmp_path / "four.npy")
    assert array.shape == (4, 1, 8, 8)
    with zipfile.ZipFile(tmp_path / "four.zip") as archive:
        last = np.asarray(Image.open(io.BytesIO(archive.read("003.png"))))
    assert np.abs(last / 127.5 - 1 - array[3, 0].clip(-1, 1)).max() < 1 / 127

    connected("schedules", "export", schedule_id, "--out", "schedule.json")
    copy = json.loads(connected("schedules", "import", "schedule.json", "--model", gratings, "--json").out)
    assert (copy["t_ratios"], copy["status"]) == (made["schedule"]["t_ratios"], "imported")
    card = connected("schedules", "export", schedule_id, "--format", "card")
    assert "## Evaluation" in card.out and made["schedule"]["id"] in card.out
    refused = connected("schedules", "export", schedule_id, "--format", "diffusers")
    assert (refused.code, "accepted: --out FILE" in refused.err) == (2, True)
    listed = connected("schedules", "list", "--model", gratings, "--status", "imported", "--limit", "1", "--json").out
    assert [each["id"] for each in json.loads(listed)] == [copy["id"]]
    reason = json.loads(connected("schedules", "resolve", gratings, "--num-steps", "55", "--json").out)["reason"]
    assert reason.startswith("untuned")
    removed = connected("schedules", "alias", "by-command", "--remove-from", gratings, "--json")
    assert json.loads(removed.out) == {"deleted": "by-command", "model": gratings}


def test_a_detached_job_is_followed_and_cancelled(connected: Run, gratings: str) -> None:  # noqa: F811
    slow = ["--tuner", "total_iters=10000"]
    job_id = connected("tune", gratings, "--num-steps", "3", *slow, "--detach").out.strip()
    assert job_id in connected("jobs", "list", "--limit", "1").out
    assert json.loads(connected("jobs", "cancel", job_id, "--json").out)["id"] == job_id
    events = [json.loads(line) for line in connected("jobs", "logs", job_id, "--follow", "--json").out.splitlines()]
    assert (events[0]["type"], events[-1]["type"]) == ("queued", "cancelled")
    assert "cancelled" in connected("jobs", "logs", job_id).out.splitlines()[-1]
    assert "cancelled" in connected("jobs", "show", f"job_{job_id[-8:]}").out
    used = json.loads(connected("usage", "--model", gratings, "--json").out)
    assert {one["kind"] for one in used} >= {"tuning"} and used[0]["device_seconds"] > 0


@pytest.mark.parametrize("watch", [[], ["--watch"]])
def test_ctrl_c_cancels_the_job_that_is_waited_for(
    service: TimeTuner,  # noqa: F811
    gratings: str,  # noqa: F811
    environment: dict[str, str],
    watch: list[str],
) -> None:
    before = {job.id for job in service.tuning_jobs.list()}
    command = [*COMMAND, "tune", gratings, "--num-steps", "3", "--tuner", "total_iters=10000", *watch]
    # Ctrl-C may have been turned off for tests that run in the background.
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(
        command,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed,  # noqa: PLW1509
    ) as running:
        try:
            job = wait_until(lambda: next((j for j in service.tuning_jobs.list() if j.id not in before), None), "job")
            wait_until(lambda: service.tuning_jobs.get(job.id).state == "running", "start of the job")
            running.send_signal(signal.SIGINT)
            _, err = running.communicate()
        finally:
            running.kill()
    assert running.returncode == 130
    assert f"cancelling {job.id}" in err
    wait_until(lambda: service.tuning_jobs.get(job.id).state == "cancelled", "cancelled job")


def test_a_job_that_is_cancelled_by_another_is_a_failure(
    service: TimeTuner,  # noqa: F811
    gratings: str,  # noqa: F811
    environment: dict[str, str],
) -> None:
    before = {job.id for job in service.tuning_jobs.list()}
    command = [*COMMAND, "tune", gratings, "--num-steps", "3", "--tuner", "total_iters=10000", "--json"]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as running:
        try:
            job = wait_until(lambda: next((j for j in service.tuning_jobs.list() if j.id not in before), None), "job")
            job.cancel()
            out, err = running.communicate()
        finally:
            running.kill()
    assert (running.returncode, out) == (1, "")
    assert err.splitlines()[-1] == f"timetuner: job {job.id} was cancelled"


def test_refusals_are_one_line_and_a_code(
    connected: Run,
    service: TimeTuner,  # noqa: F811
    gratings: str,  # noqa: F811
    new_user: NewUser,
    guarded: str,
) -> None:
    ring = service.models.create(builtin="mixture-ring").id
    as_reader = {"TIMETUNER_URL": guarded, "TIMETUNER_API_KEY": new_user().key}
    refusals: list[tuple[list[str], dict[str, str], int, str]] = [
        (["jobs", "show", "job_nope"], {}, 5, "404 Not Found: no tuning job 'job_nope'"),
        (["models", "import", "nope"], {}, 2, "builtin: Input should be 'digits8'"),
        (["tune", gratings, "--num-steps", "3", "--sampler", "nope"], {}, 2, "sampler"),
        (["models", "rm", gratings], {}, 1, "409 Conflict"),
        (["models", "import", "digits8", "--private"], {}, 2, "private is true, but this request has no API key"),
        (
            ["tune", gratings, "--num-steps", "3", "--private"],
            {},
            2,
            "private is true, but this request has no API key",
        ),
        (["models", "list"], {"TIMETUNER_URL": guarded}, 4, "a valid API key"),
        (["models", "import", "digits8"], as_reader, 4, "403 Forbidden"),
        (["sample", ring, "--num-steps", "2"], {}, 2, "accepted for this model, whose samples are no images: .npy"),
    ]
    service.tuning_jobs.create(**quick(gratings)).wait()
    for arguments, own, code, message in refusals:
        result = connected(*arguments, **own)
        assert (result.code, result.out) == (code, ""), arguments
        lines = [line for line in result.err.splitlines() if line.startswith("timetuner: ")]
        assert len(lines) == 1
        assert message in lines[0]


def test_doctor_finds_a_service_well_and_says_how_to_mend_one_that_is_not(
    connected: Run,
    environment: dict[str, str],
    guarded: str,
    new_user: NewUser,
) -> None:
    well = connected("doctor", "--json")
    assert well.code == 0, well.out
    findings = {finding["check"]: finding for finding in json.loads(well.out)}
    assert findings.keys() == {"python", "packages", "service", "parts", "key"}
    without_key = connected("doctor", "--json", "--url", guarded)
    assert without_key.code == 1
    [bad] = [finding for finding in json.loads(without_key.out) if not finding["ok"]]
    assert (bad["check"], bad["mend"]) == ("key", "set TIMETUNER_API_KEY to a key of timetuner keys create")
    key = new_user(Scope.SAMPLE).key
    assert connected("doctor", "--url", guarded, TIMETUNER_API_KEY=key).code == 0
