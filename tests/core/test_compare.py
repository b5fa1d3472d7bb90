"""The comparison of all tuners: its figures, and the report it writes."""

import csv
import dataclasses
import io
import itertools
import json
import multiprocessing
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from timetuner_core.compare import Comparison, Effort, Outcome, Plan, PlanError, parse_guidance, run
from timetuner_core.compare.report import files, write
from timetuner_core.compare.tables import to_csv
from timetuner_core.grids import make_timesteps, teacher_timesteps
from timetuner_core.models.loading import load_builtin
from timetuner_core.samplers import get_sampler
from timetuner_core.sampling.generate import Guidance
from timetuner_core.tuning.end_to_end import tune_end_to_end
from timetuner_core.tuning.problem import TuningProblem, TuningState
from timetuner_core.tuning_setup import TUNING_SEEDS, Experiment

EFFORT = Effort(
    teacher_num_steps=20,
    tuning_teacher_num_steps=10,
    noise_population=32,
    data_population=32,
    end_to_end_iters=3,
    per_step_iters=3,
    search_samples=16,
)
# ddpm adds noise, so that not everyone can take part.
PLAN = Plan(
    ("mixture-ring",),
    (2, 4),
    ("uncond", "cfg:2"),
    ("ddim", "ddpm"),
    ("uniform", "log_snr", "gits", "timetuner", "end_to_end_grid"),
    num_samples=48,
    effort=EFFORT,
)


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    return run(PLAN)


@pytest.fixture(scope="module")
def written(comparison: Comparison) -> dict[str, bytes]:
    return files(comparison, "a <command>")


@pytest.fixture(scope="module")
def content(written: dict[str, bytes]) -> dict[str, str]:
    """The texts among the files."""
    return {name: data.decode() for name, data in written.items() if not name.endswith(".png")}


@pytest.fixture(scope="module")
def without_pictures() -> Comparison:
    """A comparison of a setting that no entrant can do."""
    return run(Plan(("digits8",), (5,), ("classifier:1",), ("ddim",), ("log_snr",)))


def outcome_of(comparison: Comparison, entrant: str, num_steps: int = 4, guidance: str = "uncond") -> Outcome:
    """The outcome with DDIM."""
    return next(
        o
        for o in comparison.outcomes
        if (o.entrant, o.setting.num_steps, *o.setting.group[1:]) == (entrant, num_steps, guidance, "ddim")
    )


def records(table: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(table)))


def experiment(guidance: str = "uncond", sampler: str = "ddim", seed: int = 0) -> Experiment:
    model = load_builtin("mixture-ring")
    return Experiment(
        model, parse_guidance(guidance), get_sampler(sampler), seed=seed, rows_at_once=EFFORT.rows_at_once
    )


def test_everyone_is_judged_in_every_setting(comparison: Comparison) -> None:
    expected = itertools.product(("uncond", "cfg:2"), ("ddim", "ddpm"), (2, 4), PLAN.entrants)
    given = [(*o.setting.group[1:], o.setting.num_steps, o.entrant) for o in comparison.outcomes]
    assert given == list(expected)
    assert PLAN.entrants[0] == "untuned"


@pytest.mark.parametrize("guidance", ["uncond", "cfg:2"])
@pytest.mark.parametrize("entrant", ["log_snr", "timetuner", "end_to_end_grid"])
def test_figures_are_those_of_an_experiments_evaluation(comparison: Comparison, guidance: str, entrant: str) -> None:
    outcome = outcome_of(comparison, entrant, guidance=guidance)
    timesteps, t_ratios = (torch.tensor(v, dtype=torch.float64) for v in (outcome.timesteps, outcome.t_ratios))
    expected = experiment(guidance).evaluate(timesteps, t_ratios, PLAN.num_samples, EFFORT.teacher_num_steps)
    assert outcome.evaluation is not None
    figures = expected.to_dict()
    figures["metrics"].pop("frechet_to_data", None)  # Comparisons leave out what decides nothing.
    assert outcome.evaluation.to_dict() == figures
    assert outcome.verdict == expected.verdict
    assert outcome.reason == expected.reason


def test_tuners_are_charged_for_what_they_ask_of_the_network(comparison: Comparison) -> None:
    assert outcome_of(comparison, "log_snr").tuning_calls == 0
    assert outcome_of(comparison, "gits").tuning_calls == 60 * EFFORT.search_samples
    teacher = EFFORT.noise_population * EFFORT.tuning_teacher_num_steps
    # Three distinct grids of four steps beside the best, which is one of them, then three iterations of Adam.
    expected = teacher + 4 * 4 * EFFORT.search_samples + 3 * 4 * EFFORT.batch_size
    assert outcome_of(comparison, "end_to_end_grid").tuning_calls == expected
    # Guidance asks twice.
    assert outcome_of(comparison, "end_to_end_grid", guidance="cfg:2").tuning_calls == 2 * expected


@pytest.mark.parametrize("start_method", ["forkserver", pytest.param("spawn", marks=pytest.mark.exhaustive)])
def test_two_processes_give_the_figures_of_one(
    comparison: Comparison, start_method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`spawn` is what `run` uses. A fork server imports once what each spawned process imports for itself."""
    context = multiprocessing.get_context(start_method)
    context.set_forkserver_preload(["timetuner_core.compare"])
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: context)
    by_two = run(dataclasses.replace(PLAN, guidances=("cfg:2",), samplers=("ddim",)), jobs=2)
    by_one = [o for o in comparison.outcomes if o.setting.group == by_two.plan.groups[0]]

    def without_times(outcomes: list[Outcome]) -> list[dict[str, str]]:
        return [record | {"tuning_seconds": ""} for record in records(to_csv(outcomes))]

    assert without_times(by_two.outcomes) == without_times(by_one)


def test_another_seed_gives_other_noise(comparison: Comparison) -> None:
    plan = dataclasses.replace(PLAN, seed=1, num_steps=(4,), guidances=("uncond",), entrants=("log_snr",))
    other, same = outcome_of(run(plan), "log_snr"), outcome_of(comparison, "log_snr")
    assert other.timesteps == same.timesteps
    assert other.figure("teacher_l2") != same.figure("teacher_l2")


def test_who_does_not_apply_is_listed_with_the_reason(comparison: Comparison, content: dict[str, str]) -> None:
    refused = [o for o in comparison.outcomes if o.verdict == "not applicable"]
    assert {(o.entrant, o.setting.group.sampler) for o in refused} == {("end_to_end_grid", "ddpm")}
    assert all("adds noise" in o.reason for o in refused)
    assert [
        record["reason"] for record in records(content["results.csv"]) if record["verdict"] == "not applicable"
    ] == [o.reason for o in refused]
    for name in ("results.md", "report.html"):
        assert f"end_to_end_grid: {refused[0].reason}" in content[name]


def test_a_setting_that_no_one_can_do_is_listed_with_the_reason(without_pictures: Comparison) -> None:
    assert [o.verdict for o in without_pictures.outcomes] == ["not applicable"] * 2
    assert "classifier:1" in without_pictures.outcomes[0].reason
    assert set(files(without_pictures, "")) == {"results.csv", "results.md", "report.html"}


def test_a_grid_that_is_the_default_is_not_called_rejected(comparison: Comparison) -> None:
    same = outcome_of(comparison, "uniform")
    assert (same.verdict, same.figure("teacher_l2")) == (
        "baseline",
        outcome_of(comparison, "untuned").figure("teacher_l2"),
    )


def test_the_files_say_the_same(comparison: Comparison, content: dict[str, str]) -> None:
    table = records(content["results.csv"])
    assert len(table) == len(comparison.outcomes)
    for record, outcome in zip(table, comparison.outcomes, strict=True):
        assert (record["entrant"], record["verdict"]) == (outcome.entrant, outcome.verdict)
        if outcome.evaluation is None:
            continue
        for name, metric in outcome.evaluation.metrics.items():
            assert float(record[name]) == metric.after
            assert float(record[f"{name}_change_high"]) == metric.change.high
        assert json.loads(record["timesteps"]) == list(outcome.timesteps)
        assert json.loads(record["t_ratios"]) == list(outcome.t_ratios)
    for name in ("results.md", "report.html"):
        assert f"{outcome_of(comparison, 'timetuner').figure('teacher_l2'):.3g}" in content[name]


def test_the_best_of_each_column_is_bold(comparison: Comparison, content: dict[str, str]) -> None:
    section = content["results.md"].split("### mixture-ring, uncond, ddim\n")[1].split("###")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line.startswith("| ")]
    column = {row[0]: row[2] for row in rows[2:]}  # 4 steps
    assert column["uniform"] == "= untuned"
    best = min(PLAN.entrants, key=lambda entrant: outcome_of(comparison, entrant).figure("teacher_l2") or 0.0)
    assert [entrant for entrant, text in column.items() if text.startswith("**")] == [best]


def test_wins_and_ranks_add_up(comparison: Comparison, content: dict[str, str]) -> None:
    summary = content["results.md"].split("### Summary\n")[1].split("###")[0]
    rows = [[cell.strip("* ") for cell in line.split("|")[1:-1]] for line in summary.splitlines() if "| " in line][2:]
    judged = {row[0]: row for row in rows if row[1] != "–"}
    assert sum(int(row[2]) for row in judged.values()) == len(PLAN.settings)
    # Five take part with ddim and four with ddpm, uniform being untuned: ranks add up to 15 and 10 in each setting.
    total = sum(float(row[1]) * (4 if name == "end_to_end_grid" else 8) for name, row in judged.items())
    assert total == pytest.approx(4 * 15 + 4 * 10, abs=8 * 5 * 0.05)


def test_the_report_needs_nothing_from_elsewhere(content: dict[str, str]) -> None:
    html = content["report.html"]
    links = re.findall(r"""(?:src|href)\s*=\s*["']([^"']*)""", html)
    assert {link.partition(",")[0] for link in links if not link.startswith("#")} == {"data:image/png;base64"}
    assert not re.search(r"https?://|@import|url\(|<script|<link", html)
    anchors = {link[1:] for link in links if link.startswith("#")}
    assert len(anchors) == len(PLAN.groups)
    assert all(f'id="{anchor}"' in html for anchor in anchors)
    assert "a &lt;command&gt;" in html


def test_each_group_is_drawn(written: dict[str, bytes]) -> None:
    pictures = {name: data for name, data in written.items() if name.endswith(".png")}
    kinds = [name.partition("-")[0] for name in pictures]
    # No trajectories to compare where noise is added.
    assert {kind: kinds.count(kind) for kind in kinds} == {"quality": 4, "ratios": 4, "trajectories": 2}
    for data in pictures.values():
        image = Image.open(io.BytesIO(data))
        assert image.width > 600
        assert len(image.convert("RGB").getcolors(image.width * image.height) or []) > 10


def test_trajectories_are_those_of_the_samplers(comparison: Comparison) -> None:
    drawn = comparison.trajectories[comparison.plan.groups[0]]
    assert drawn.num_steps == 4
    tuned = outcome_of(comparison, next(name for name in drawn.paths if name not in {"teacher", "untuned"}))
    others = [o for o in comparison.outcomes if o.setting == tuned.setting and o.entrant != "untuned"]
    distances = [figure for o in others if o.verdict != "baseline" and (figure := o.figure("teacher_l2"))]
    assert tuned.figure("teacher_l2") == min(distances)
    of_experiment = experiment()
    ends = of_experiment.sample(
        of_experiment.seeds(6, TUNING_SEEDS), None, torch.tensor(tuned.timesteps), torch.tensor(tuned.t_ratios)
    )
    torch.testing.assert_close(torch.from_numpy(drawn.paths[tuned.entrant][:, -1]).float(), ends)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"models": ("mixture-rong",)}, "models is 'mixture-rong'; accepted: digits8, .*diffusers-format folder"),
        ({"models": ()}, "models is ''; accepted: one or more"),
        ({"num_steps": (0,)}, "num_steps is 0; accepted: 1 to 1000"),
        ({"guidances": ("cfg",)}, "guidances is 'cfg'; accepted: uncond, cfg:SCALE"),
        ({"guidances": ("cfg:nan",)}, "guidances is 'cfg:nan'"),
        ({"guidances": ("cfg:-1",)}, "guidances is 'cfg:-1'"),
        ({"samplers": ("dim",)}, "samplers is 'dim'; accepted: ddim"),
        ({"entrants": ("tuned",)}, "entrants is 'tuned'; accepted: untuned, uniform"),
        ({"num_samples": 1}, "num_samples is 1; accepted: 16 to 50000"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Plan(**{"models": ("mixture-ring",), **options})


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"models is .*; accepted: a diffusers-format folder"):
        Plan((str(tmp_path),))


def test_a_report_takes_the_place_of_an_earlier_one_only(without_pictures: Comparison, tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "compare"
    write(without_pictures, folder, "")
    (folder / "quality-01-of-before.png").touch()
    write(without_pictures, folder, "again")
    assert {path.name for path in folder.iterdir()} == set(files(without_pictures, "again"))
    assert "again" in (folder / "results.md").read_text()
    assert [path.name for path in folder.parent.iterdir()] == ["compare"]
    (folder / "notes.txt").touch()
    for occupied in (folder, folder / "notes.txt"):
        with pytest.raises(PlanError, match=r"out is .*; accepted: a folder that is new, empty"):
            write(without_pictures, occupied, "")
    assert "again" in (folder / "results.md").read_text()


def test_end_to_end_tuning_is_the_same_with_a_given_teacher_and_remembered_steps() -> None:
    of_experiment = experiment("cfg:2")
    schedule = of_experiment.model.noise_schedule
    timesteps = make_timesteps(schedule, 3)
    problem: TuningProblem = of_experiment.problem("noise", timesteps, 16, 16)
    seeds, condition = of_experiment.seeds(16, TUNING_SEEDS), of_experiment.conditions(16, TUNING_SEEDS)
    target = of_experiment.teach(seeds, condition, 10, decode=False)

    def tuned(**options: Any) -> TuningState:
        state = TuningState.start(timesteps)
        for _ in tune_end_to_end(problem, state, teacher_timesteps(schedule, 10), "both", total_iters=3, **options):
            pass
        return state

    expected, given = tuned(), tuned(target=target, recompute=False)
    torch.testing.assert_close(given.t_ratios, expected.t_ratios)
    torch.testing.assert_close(given.timesteps, expected.timesteps)


def test_guidance_is_read_from_its_short_form() -> None:
    assert parse_guidance("cfg:2.5") == Guidance("classifier-free", 2.5)
    assert parse_guidance("classifier:1") == Guidance("classifier", 1.0)
