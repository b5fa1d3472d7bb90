"""Options of the commands for whole pipelines, without a service."""

from pathlib import Path

import pytest
import typer

from service.cli.options import assignment, call_of, image_file, scale_or_interval, size
from service.cli.output import CommandError
from service.cli.tune import _read_prompts
from service.shared.pipeline_calls import decode_image
from tests.pipelines import picture


def test_arguments_and_image_files_become_a_call(tmp_path: Path) -> None:
    picture().save(tmp_path / "photo.PNG")
    picture(mode="L").save(tmp_path / "mask.webp", lossless=True)
    images = [image_file(str(tmp_path / "photo.PNG")), image_file(f"mask_image={tmp_path / 'mask.webp'}")]
    call = call_of([assignment("strength=0.6"), assignment("prompt_2=a red fox")], images)
    assert (call["strength"], call["prompt_2"]) == (0.6, "a red fox")
    assert decode_image(call["image"], "image").tobytes() == picture().tobytes()
    assert decode_image(call["mask_image"], "mask_image").mode == "L"


@pytest.mark.parametrize(
    ("name", "expected"),
    [("photo.gif", r"photo\.gif'; accepted: a name that ends with \.png"), ("none.png", "No such file")],
)
def test_what_is_no_image_is_refused(tmp_path: Path, name: str, expected: str) -> None:
    with pytest.raises(CommandError, match=expected):
        call_of([], [image_file(str(tmp_path / name))])


def test_a_size_is_height_and_width() -> None:
    assert size("768x1024") == (768, 1024)
    with pytest.raises(typer.BadParameter, match=r"'768'; accepted: HEIGHTxWIDTH"):
        size("768")


def test_a_guidance_scale_is_one_or_an_interval() -> None:
    assert scale_or_interval("2.5") == {"guidance_scale": 2.5}
    assert scale_or_interval("1.5..7.5") == {"guidance_scales": [1.5, 7.5]}
    for text in ("strong", "1..", "..2", "1-2"):
        with pytest.raises(typer.BadParameter, match=r"accepted: a number, or LOWEST\.\.HIGHEST, such as 1\.5\.\.7\.5"):
            scale_or_interval(text)


def test_prompts_are_the_lines_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a lighthouse\n\na red fox\n")
    assert _read_prompts(tmp_path / "prompts.txt") == ["a lighthouse", "a red fox"]
    with pytest.raises(CommandError, match=r"none\.txt"):
        _read_prompts(tmp_path / "none.txt")
