"""The web page in use."""

import base64
import io
import json
import re
import tarfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import BrowserContext, Page, expect

from service.access.cookies import COOKIE
from service.registry.keys import Scope
from tests.keys import NewUser
from tests.stack import START_SECONDS, Json, own_digits8, wait_until
from tests.web.conftest import World
from tests.web.test_looks import settle

LONG = {"total_iters": 500, "population_size": 16, "teacher_num_steps": 10}


def pixels(page: Page, selector: str) -> list[int]:
    """The colours of the picture that a link leads to, as red, green, blue and alpha."""
    script = """async (link) => {
        const image = Object.assign(new Image(), {src: link.href});
        await image.decode();
        const size = [image.naturalWidth, image.naturalHeight];
        const context = new OffscreenCanvas(...size).getContext("2d");
        context.drawImage(image, 0, 0);
        return [...context.getImageData(0, 0, ...size).data];
    }"""
    found: list[int] = page.locator(selector).evaluate(script)
    return found


def shown(page: Page, selector: str) -> str:
    """The picture that a canvas shows, as a URL of its content."""
    found: str = page.locator(selector).evaluate("(canvas) => canvas.toDataURL()")
    return found


def test_a_model_is_registered_by_one_click_and_tuned_by_another(world: World, page: Page) -> None:
    page.goto(f"{world.url}/models")
    page.get_by_label("Built-in model").select_option("mixture-ring")
    page.get_by_role("button", name="Register").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("mixture-ring")
    page.locator("[name=num_steps]").fill("2")
    page.locator("[name=objective]").select_option("dmn")
    page.get_by_role("button", name="Start tuning").click()
    page.wait_for_url(re.compile("/jobs/job_"))
    expect(page.locator(".state .badge").first).to_have_text("succeeded")  # The page was not loaded again.
    page.get_by_role("link", name="See the schedule").click()
    expect(page.get_by_role("heading", level=1)).to_contain_text("2 steps of ddim")


def test_several_jobs_are_priced_and_submitted_as_a_group(world: World, page: Page) -> None:
    page.goto(f"{world.url}/models/{world.points}")
    page.locator("[name=num_steps]").fill("2, 3")
    page.locator("[name=objective]").select_option(["dmn", "ays"])
    expect(page.locator("#price")).to_contain_text("4 jobs: at most ")
    page.get_by_role("button", name="Start tuning").click()
    page.wait_for_url(re.compile("/groups/grp_"))
    expect(page.locator("tbody tr")).to_have_count(4)
    expect(page.get_by_role("link", name="Compare what they made")).to_be_visible()  # The page was not loaded again.


def test_an_archive_is_uploaded_and_a_wrong_one_is_refused(world: World, page: Page, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "own.tar.gz", "w:gz", compresslevel=1) as file:
        file.add(own_digits8(tmp_path), arcname=".")
    page.goto(f"{world.url}/models")
    page.get_by_label("Archive").set_input_files({"name": "x.zip", "mimeType": "application/zip", "buffer": b"no zip"})
    page.get_by_role("button", name="Upload").click()
    expect(page.locator("#upload .error")).to_contain_text("accepted")
    content = base64.b64encode((tmp_path / "own.tar.gz").read_bytes()).decode()
    dropped = page.evaluate_handle(
        """(content) => {
            const bytes = Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0)), data = new DataTransfer();
            data.items.add(new File([bytes], "own.tar.gz"));
            return data;
        }""",
        content,
    )
    page.locator("#upload").dispatch_event("drop", {"dataTransfer": dropped})
    page.wait_for_url(re.compile("/models/mdl_"))
    expect(page.get_by_role("heading", level=1)).to_have_text("own")
    expect(page.get_by_role("button", name="Start tuning")).to_be_visible()  # It is ready.


def test_a_refused_form_says_why_beside_its_button(world: World, page: Page) -> None:
    page.goto(f"{world.url}/models/{world.model}")
    page.get_by_label("Guidance scale").fill("3")
    page.get_by_role("button", name="Start tuning").click()
    expect(page.get_by_role("alert")).to_contain_text("guidance_scale is 3; accepted: 1 when guidance_type is 'uncond'")
    assert page.url == f"{world.url}/models/{world.model}"


def test_a_running_job_shows_its_progress_and_curves_and_can_be_cancelled(world: World, page: Page) -> None:
    job = world.stack.submit(world.points, num_steps=4, tuner=LONG)
    page.goto(f"{world.url}/jobs/{job['id']}")
    page.evaluate("window.sameDocument = true")
    for title in ("Loss", "Ratio of each step"):
        expect(page.locator("figure.chart", has_text=title).get_by_role("img")).to_be_visible()
    shown = page.locator(".state")
    before = shown.inner_text()
    wait_until(lambda: page.wait_for_timeout(200) or shown.inner_text() != before, "progress", START_SECONDS)
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator(".state .badge")).to_have_text("cancelled")
    expect(page.get_by_role("button", name="Cancel")).to_have_count(0)
    assert world.stack.client.get(f"/v1/tuning-jobs/{job['id']}").json()["state"] == "cancelled"


def test_a_job_tells_its_verdict_times_worker_cost_and_log_and_lists_tell_verdicts(world: World) -> None:
    client, (first, _, undecided, _) = world.stack.client, world.schedules
    html = client.get(f"/jobs/{first['job']}").text
    text = re.sub(r"<[^>]*>|\s+", " ", html)
    text = re.sub(" +", " ", text)
    for fact in (
        "succeeded its schedule: accepted took 1 min 15 s",
        "Worker worker-1@here, attempt 1",
        "Waited 3 s",
        "Took 1 min 15 s, of which tuning 10 s",
        "123 456 samples through the network",
        "started by worker-1@here, attempt 1",
        "teacher began",
        "tuning began",
    ):
        assert fact in text, fact
    assert text.index("teacher began") < text.index("tuning began")
    rows = re.findall(r"<tr>.*?</tr>", client.get("/jobs").text, re.DOTALL)
    for schedule, verdict in ((first, "accepted"), (undecided, "undecided")):
        [row] = [row for row in rows if f"/jobs/{schedule['job']}" in row]
        assert f'badge {verdict}">{verdict}<' in row and "succeeded" not in row and "1 min 15 s" in row


def test_a_model_is_renamed_found_and_deleted_with_what_its_page_lists(world: World, page: Page) -> None:
    model, grid = world.stack.register("mixture-gratings"), {"num_steps": 1, "timesteps": [1, 0.001], "t_ratios": [1]}
    schedule = world.stack.client.post("/v1/schedules", json={"model": model, **grid}).json()["id"]
    page.goto(f"{world.url}/models/{model}")
    page.get_by_label("Name", exact=True).fill("one of mine")
    page.get_by_role("button", name="Rename").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("one of mine")
    page.goto(f"{world.url}/models")
    page.get_by_label("Search").fill("OF mine")
    page.get_by_role("button", name="Show").click()
    expect(page.locator(".cards li")).to_have_count(1)
    page.get_by_role("link", name="one of mine").click()
    expect(page.locator("#delete").get_by_role("link", name=schedule[-8:])).to_be_visible()
    page.once("dialog", lambda dialog: dialog.accept())
    page.get_by_label("with its schedules").check()
    page.get_by_role("button", name="Delete this model").click()
    page.wait_for_url(re.compile("/models$"))
    assert world.stack.client.get(f"/v1/models/{model}").status_code == 404


def test_an_export_is_copied_by_a_click(world: World, context: BrowserContext, page: Page) -> None:
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    schedule = world.schedules[0]
    page.goto(f"{world.url}/schedules/{schedule['id']}")
    page.get_by_role("button", name="Copy TimeTuner's own").click()
    expect(page.locator("button", has_text="Copied")).to_be_visible()
    copied = json.loads(page.evaluate("navigator.clipboard.readText()"))
    assert copied["t_ratios"] == schedule["t_ratios"]


def test_filters_are_in_the_address(world: World, page: Page) -> None:
    page.goto(f"{world.url}/schedules")
    page.get_by_label("Model").select_option("digits8")
    page.get_by_label("Steps").fill("8")
    page.get_by_role("button", name="Filter").click()
    page.wait_for_url(re.compile("num_steps=8"))
    rows = page.locator("tbody tr")
    expect(rows).to_have_count(1)
    expect(rows).to_contain_text(world.schedules[1]["id"][-8:])
    page.goto(f"{world.url}/schedules?num_steps=8&sampler=&status=")
    expect(rows).to_have_count(1)
    page.get_by_role("link", name="Clear").click()
    expect(rows.nth(3)).to_be_visible()


def test_a_schedule_shows_its_figures_its_curves_and_pictures_from_the_same_noise(world: World, page: Page) -> None:
    schedule = world.schedules[0]
    page.goto(f"{world.url}/schedules/{schedule['id']}")
    settle(page)
    table = page.get_by_role("region", name="Evaluation")
    measured = schedule["evaluation"]["metrics"]["teacher_l2"]
    for name in ("before", "after", "low", "high"):
        expect(table).to_contain_text(f"{measured[name]:.4g}")
    page.get_by_text("Ratio of each step as a table").click()
    for ratio in schedule["t_ratios"]:
        expect(page.get_by_role("region", name="Ratio of each step")).to_contain_text(f"{ratio:.6g}")
    figures = page.locator("figure.sample")
    for number, alt in enumerate(("Teacher, 100 steps: 9 samples", "Untuned, 4 steps: 9 samples")):
        expect(figures.nth(number).get_by_role("img")).to_have_attribute("aria-label", re.compile(alt))
        expect(figures.nth(number).locator(".about")).to_contain_text(("100 network calls", "4 network calls")[number])
    expect(figures.nth(2).get_by_role("link").first).to_have_attribute("href", f"/schedules/{schedule['id']}")
    assert len({shown(page, f"#{name} canvas") for name in ("teacher", "untuned", "tuned")}) == 3
    expect(page.locator(".summary .badge")).to_have_text("accepted")
    expect(page.locator(".summary")).to_contain_text("4 steps, as good as 10 untuned: 60% fewer.")
    page.get_by_text("Quality against cost as a table").click()
    for text in ("untuned", "this schedule", "other by dmn", "other by end_to_end"):
        expect(page.get_by_role("region", name="Quality against cost")).to_contain_text(text)
    code = page.locator("pre")
    for text in ("from service.client import TimeTuner", "TimeTunerScheduler.from_schedule", f"curl {world.url}/v1/"):
        expect(code.filter(has_text=text)).to_have_count(1)


def test_the_first_screen_holds_what_a_schedule_brought_and_a_slider_compares_any_two_pictures(
    world: World, page: Page
) -> None:
    page.goto(f"{world.url}/schedules/{world.schedules[0]['id']}")
    settle(page)
    for width, height in ((1280, 800), (390, 844)):
        page.set_viewport_size({"width": width, "height": height})
        for selector in (".summary", ".summary .badge", "#teacher canvas", "#untuned canvas", "#tuned canvas"):
            box = page.locator(selector).bounding_box()
            assert box is not None and box["y"] >= 0 and box["y"] + box["height"] <= height, selector
    slider, line = page.locator(".between"), page.get_by_role("slider", name="The line between both pictures")
    line.focus()
    line.press("Home")
    expect(line).to_have_attribute("aria-valuetext", "Untuned on 0 % from the left, then Tuned")
    slider.get_by_label("Left").select_option("teacher")
    line.press("ArrowRight")
    expect(line).to_have_attribute("aria-valuetext", "Teacher on 1 % from the left, then Tuned")
    assert (
        page.locator(".between .over").evaluate("(over) => getComputedStyle(over).clipPath") == "inset(0px 99% 0px 0px)"
    )
    assert shown(page, ".between .over") == shown(page, "#teacher canvas")
    assert shown(page, ".between canvas:not(.over)") == shown(page, "#tuned canvas")


def test_a_schedule_shows_its_learned_solver_and_whether_it_is_undecided(world: World, page: Page) -> None:
    page.goto(f"{world.url}/schedules/{world.schedules[3]['id']}")
    rows = page.get_by_role("region", name="Learned solver").get_by_role("row")
    expect(rows.nth(3)).to_contain_text("-0.0625")
    expect(page.locator(".badge").first).to_have_text("accepted")
    page.goto(f"{world.url}/schedules/{world.schedules[2]['id']}")
    expect(page.locator(".badge").first).to_have_text("undecided")
    expect(page.locator(".summary")).to_have_text("undecided As the test has it.")
    expect(page.get_by_role("link", name="Try it all the same")).to_be_visible()
    expect(page.locator(".warning")).to_contain_text("Undecided: it is not known to be better than untuned sampling")
    expect(page.get_by_role("region", name="Learned solver")).to_have_count(0)


def test_an_alias_is_set_and_removed(world: World, page: Page) -> None:
    schedule = world.schedules[1]
    page.goto(f"{world.url}/schedules/{schedule['id']}")
    page.get_by_label("New alias").fill("Nightly")
    page.get_by_role("button", name="Set", exact=True).click()
    expect(page.get_by_role("alert")).to_contain_text("name")
    page.get_by_label("New alias").fill("nightly")
    page.get_by_role("button", name="Set", exact=True).click()
    remove = page.get_by_role("button", name="Remove the alias nightly")
    expect(remove).to_be_visible()
    aliases = world.stack.client.get(f"/v1/models/{world.model}/aliases").json()["items"]
    assert {"model": world.model, "name": "nightly", "schedule": schedule["id"]} in aliases
    remove.click()
    expect(remove).to_have_count(0)
    assert len(world.stack.client.get(f"/v1/models/{world.model}/aliases").json()["items"]) == len(aliases) - 1


def test_tuners_are_compared_by_cost(world: World, page: Page) -> None:
    page.goto(f"{world.url}/compare?model={world.model}")
    figure = page.locator("figure.chart")
    for name in ("end_to_end", "dmn", "untuned"):
        expect(figure.get_by_role("list")).to_contain_text(name)
    figure.locator("summary").click()
    first = world.schedules[0]["evaluation"]["metrics"]["teacher_l2"]
    expect(figure.get_by_role("region")).to_contain_text(f"{first['after']:.6g}")
    page.locator("[name=metric]").select_option("sliced_wasserstein")
    page.get_by_role("button", name="Compare", exact=True).click()
    page.wait_for_url(re.compile("metric=sliced_wasserstein"))
    expect(page.locator("figure.chart .axis").nth(1)).to_have_text("sliced Wasserstein distance")


def test_the_matrix_shows_the_best_of_each_cell_and_tunes_the_empty_ones(world: World) -> None:
    client, best = world.stack.client, world.schedules[1]
    html = client.get("/matrix").text
    assert re.search(f'href="/schedules/{best["id"]}">30 % closer</a> <span class="badge accepted">', html)
    assert f'<a href="/models/{world.model}?num_steps=8#tune"' not in html  # It has an accepted schedule there.
    assert f'<a href="/models/{world.model}?num_steps=10#tune"' in html
    assert 'name="num_steps" value="10"' in client.get(f"/models/{world.model}?num_steps=10").text


def test_the_best_tuner_leads_and_any_two_schedules_are_compared(world: World) -> None:
    client, (first, second, undecided, of_points) = world.stack.client, world.schedules
    html = client.get(f"/compare?model={world.model}").text
    board = html[html.index("Leaderboard of tuners") : html.index("Compared schedules")]
    assert board.index("end_to_end") < board.index("dmn")
    two = "/compare/schedules?a={}&b={}"
    html = client.get(two.format(first["id"], second["id"])).text
    for schedule in (first, second):
        figures = schedule["evaluation"]["metrics"]["teacher_l2"]
        assert all(f'class="n">{figures[when]:.4g}</td>' in html for when in ("before", "after"))
    assert "cannot be compared" not in html
    assert "cannot be compared" in client.get(two.format(undecided["id"], of_points["id"])).text
    assert client.get(two.format(first["id"], "sch_none")).status_code == 404
    assert client.get("/compare/schedules?a=1").status_code == 422
    assert f'<option value="{second["id"]}">' in client.get(f"/schedules/{first['id']}").text


def test_the_playground_streams_previews_and_ends_with_the_images_of_the_api(world: World, page: Page) -> None:
    page.goto(f"{world.url}/playground?model={world.model}")
    page.evaluate("""window.previews = new Set();
        const predicted = "#untuned canvas[aria-label='The images as predicted so far']";
        const note = () => document.querySelectorAll(predicted).forEach((canvas) => previews.add(canvas.toDataURL()));
        new MutationObserver(note).observe(document.body, {childList: true, subtree: true})""")
    steps = page.locator("[name=num_steps]")
    steps.focus()
    for _ in range(22):
        steps.press("ArrowRight")
    expect(page.locator("output")).to_have_text("30")
    page.locator("[name=guidance_type]").select_option("classifier-free")
    page.get_by_label("Guidance scale").fill("2")
    page.locator("[name=class_labels]").select_option("3")
    page.get_by_label("Seed").fill("77")
    page.get_by_label("Images").fill("4")
    page.get_by_role("button", name="Sample").click()
    for figure in ("#untuned", "#tuned"):
        expect(page.locator(figure)).to_have_attribute("aria-busy", "false")
    assert page.evaluate("previews.size") >= 2
    expect(page.locator("#tuned")).to_contain_text("No accepted schedule")
    body = {"model": world.model, "num_steps": 30, "num_images": 4, "seed": 77, "schedule": "none", "class_labels": 3}
    body |= {"guidance_type": "classifier-free", "guidance_scale": 2}
    png = world.stack.client.post("/v1/samples", json=body, headers={"Accept": "image/png"}).content
    assert pixels(page, "#untuned a[download]") == [*Image.open(io.BytesIO(png)).convert("RGBA").tobytes()]


def test_the_forms_begin_with_a_setting_that_has_a_schedule(world: World) -> None:
    client, newest = world.stack.client, world.schedules[1]
    both = [client.get(path).text for path in (f"/playground?model={world.model}", f"/models/{world.model}")]
    for html in both:
        assert re.search(r'name="num_steps" value="8"', html)
        assert re.search(r'<option(?: value="ddim")? selected[^>]*>ddim<', html)
    assert f'<option value="{newest["id"]}"' in both[0]
    asked = [
        f"{path}num_steps=6&sampler=heun" for path in (f"/playground?model={world.model}&", f"/models/{world.model}?")
    ]
    for html in (client.get(path).text for path in asked):
        assert re.search(r'name="num_steps" value="6"', html)
        assert re.search(r'<option(?: value="heun")? selected[^>]*>heun<', html)
    undecided = world.schedules[2]["id"]
    html = client.get(f"/playground?model={world.model}&schedule={undecided}").text
    assert re.search(f'<option value="{undecided}"[^>]* selected>[^<]*undecided', html)
    wrong = client.get(f"/playground?model={world.model}&schedule=sch_none")
    assert (wrong.status_code, wrong.json()["errors"][0]["loc"]) == (422, ["query", "schedule"])
    assert f"/playground?model={world.model}&amp;schedule={undecided}" in client.get("/schedules").text


def test_a_link_to_the_playground_shows_its_pictures_and_the_code_and_is_remembered(world: World, page: Page) -> None:
    schedule = world.schedules[0]["id"]
    page.goto(f"{world.url}/schedules/{schedule}")
    page.get_by_role("link", name="Try it", exact=True).click()
    tuned = page.locator("#tuned")
    expect(tuned).to_contain_text(schedule[-8:])
    expect(tuned.locator(".about")).to_contain_text("4 network calls · ")
    page.get_by_text("Show the code").click()
    for name, text in (("curl", f'"schedule":"{schedule}"'), ("python", "num_steps=4,"), ("comfyui", "comfyui-node")):
        expect(page.locator(f"[data-code={name}]")).to_contain_text(text)
    before = page.locator("[name=seed]").input_value()
    page.get_by_role("button", name="Roll the dice").click()
    seed = page.locator("[name=seed]").input_value()
    assert seed != before
    expect(page.locator("[data-code=curl]")).to_contain_text(f'"seed":{seed}')
    page.locator("[name=sampler]").select_option("heun")
    expect(page.get_by_label("Tuned setting")).to_have_value("auto")
    expect(page.locator("#comfyui")).to_be_hidden()
    page.get_by_role("button", name="Keep as a preset").click()
    page.get_by_role("button", name="Sample").click()
    expect(tuned.locator(".about")).to_contain_text("at most 8 network calls")
    assert f"seed={seed}" in page.url and "sampler=heun" in page.url
    expect(page.get_by_role("link", name="Tune this setting")).to_have_attribute(
        "href", re.compile("sampler=heun.*#tune")
    )
    page.reload()
    expect(page.locator("[name=seed]")).to_have_value(seed)
    page.get_by_text("Presets and history").click()
    entries = page.locator("#history li")
    expect(entries).to_have_count(2)
    expect(entries.first).to_contain_text("preset")
    page.get_by_label("Tuned setting").select_option(schedule)
    expect(page.locator("[name=sampler]")).to_have_value("ddim")
    page.get_by_role("button", name="Forget all").click()
    expect(entries).to_have_count(0)


def test_the_playground_draws_points_and_says_what_was_refused(world: World, page: Page) -> None:
    page.goto(f"{world.url}/playground?model={world.points}")
    page.locator("[name=guidance_type]").select_option("uncond")
    page.get_by_label("Images").fill("20")
    page.get_by_role("button", name="Sample").click()
    expect(page.locator("#tuned .picture circle")).to_have_count(20)
    page.locator("[name=sampler]").select_option("own_broken")
    page.get_by_role("button", name="Sample").click()
    expect(page.locator("#tuned .error")).to_be_visible()


def test_errors_are_pages_for_browsers_and_problems_for_programs(world: World, page: Page) -> None:
    for path, status, text in (
        ("/models/mdl_none", 404, "no model 'mdl_none'"),
        ("/schedules?num_steps=many", 422, "query.num_steps"),
        ("/compare?metric=beauty", 422, "accepted: "),
    ):
        answer = page.goto(world.url + path)
        assert answer is not None and answer.status == status
        expect(page.get_by_role("alert")).to_contain_text(text)
        assert world.stack.client.get(path).headers["content-type"] == "application/problem+json"


def test_the_keyboard_reaches_the_content_first(world: World, page: Page) -> None:
    page.goto(f"{world.url}/schedules")
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    expect(page.get_by_label("Search")).to_be_focused()


# Keys


def log_in(page: Page, url: str, key: str) -> None:
    page.get_by_label("API key").fill(key)
    page.get_by_role("button", name="Log in").click()


def test_pages_ask_for_a_key_and_show_what_it_may_do(
    world: World, page: Page, context: BrowserContext, guarded: str, new_user: NewUser
) -> None:
    page.goto(f"{guarded}/schedules")
    page.wait_for_url(f"{guarded}/login?next=/schedules")
    log_in(page, guarded, "tt_nonsense")
    expect(page.get_by_role("alert")).to_contain_text("no valid API key")
    log_in(page, guarded, new_user(Scope.SAMPLE).key)
    page.wait_for_url(f"{guarded}/schedules")
    [cookie] = [one for one in context.cookies() if one["name"] == COOKIE]
    assert (cookie["httpOnly"], cookie["sameSite"], cookie["secure"]) == (True, "Strict", False)
    page.goto(f"{guarded}/models/{world.model}")
    expect(page.get_by_text("Your API key may not tune.")).to_be_visible()
    page.goto(f"{guarded}/schedules/{world.schedules[0]['id']}")
    settle(page)  # scripts use the API by the same cookie
    expect(page.locator("figure.sample canvas")).to_have_count(3)
    expect(page.get_by_label("New alias")).to_have_count(0)
    page.get_by_role("button", name="Log out").click()
    page.wait_for_url(f"{guarded}/login")
    page.goto(f"{guarded}/jobs")
    page.wait_for_url(f"{guarded}/login?next=/jobs")


def test_a_cookie_changes_nothing_for_another_site(world: World, guarded: str, new_user: NewUser) -> None:
    user = new_user(Scope.MODELS_WRITE, Scope.SAMPLE)
    client, cookie = user.client, {"Cookie": f"{COOKIE}={user.key}"}
    del client.headers["Authorization"]
    body: Json = {"model": world.points, "num_steps": 1, "schedule": "none"}
    for other in ({}, {"Origin": "https://evil.example"}, {"Origin": "null"}, {"Sec-Fetch-Site": "same-site"}):
        answer = client.post("/v1/samples", json=body, headers=cookie | other)
        assert answer.status_code == 403, other
        answer = client.post("/models", data={"builtin": "mixture-ring"}, headers=cookie | other)
        assert answer.status_code == 403, other
    assert client.get("/v1/models", headers=cookie).status_code == 200
    for own in ({"Origin": guarded}, {"Sec-Fetch-Site": "same-origin"}):
        assert client.post("/v1/samples", json=body, headers=cookie | own).status_code == 200
        assert client.post("/models", data={"builtin": "mixture-ring"}, headers=cookie | own).status_code == 303


def test_a_key_may_do_by_forms_only_what_it_may_do_by_the_api(world: World, guarded: str, new_user: NewUser) -> None:
    user = new_user(Scope.SAMPLE)
    headers = {"Cookie": f"{COOKIE}={user.key}", "Origin": guarded}
    del user.client.headers["Authorization"]
    job = world.schedules[0]["job"]
    for path, form in (
        ("/models", {"builtin": "mixture-ring"}),
        ("/jobs", {"model": world.model, "num_steps": "2"}),
        (f"/jobs/{job}/cancel", {}),
        (f"/schedules/{world.schedules[0]['id']}/aliases", {"name": "mine"}),
        (f"/schedules/{world.schedules[0]['id']}/aliases/delete", {"name": "production"}),
    ):
        assert user.client.post(path, data=form, headers=headers).status_code == 403, path
    assert user.client.get(f"/jobs/{job}", headers=headers).status_code == 404  # another's
    assert job not in user.client.get("/jobs", headers=headers).text


def test_links_to_elsewhere_are_not_followed_after_a_login(guarded: str, new_user: NewUser) -> None:
    user = new_user()
    for there in ("https://evil.example", "//evil.example", "/\\evil.example"):
        form = {"key": user.key, "next": there}
        answer = user.client.post("/login", data=form, headers={"Origin": guarded})
        assert (answer.status_code, answer.headers["location"]) == (303, "/")


def test_an_old_cookie_does_not_lock_anybody_out_while_no_key_is_needed(world: World) -> None:
    headers = {"Cookie": f"{COOKIE}=tt_of_another_service"}
    assert world.stack.client.get("/models", headers=headers).status_code == 200
    assert world.stack.client.get("/v1/models", headers=headers).status_code == 200
