"""Pictures in terminals of three kinds."""

import base64
import io
import re

import pytest
from PIL import Image

from service.cli.terminal import show_png

PICTURE = Image.effect_noise((64, 64), 90).convert("RGB")  # too much for one escape sequence


@pytest.fixture
def png(monkeypatch: pytest.MonkeyPatch) -> bytes:
    for name in ("TERM", "TERM_PROGRAM", "KITTY_WINDOW_ID"):
        monkeypatch.delenv(name, raising=False)
    buffer = io.BytesIO()
    PICTURE.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    "terminal", [{"TERM": "xterm-kitty"}, {"KITTY_WINDOW_ID": "1"}, {"TERM_PROGRAM": "ghostty"}], ids=str
)
def test_kitty_gets_the_file_in_chunks(
    png: bytes, terminal: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in terminal.items():
        monkeypatch.setenv(name, value)
    show_png(png)
    chunks = re.findall(r"\x1b_G([^;]*);([^\x1b]*)\x1b\\", capsys.readouterr().out)
    assert base64.b64decode("".join(chunk for _, chunk in chunks)) == png
    first, *more, last = [control for control, _ in chunks]
    assert (first, set(more), last) == ("a=T,f=100,m=1", {"m=1"} if more else set(), "m=0")
    assert max(len(chunk) for _, chunk in chunks) <= 4096


@pytest.mark.parametrize("program", ["iTerm.app", "WezTerm"])
def test_iterm2_gets_the_file_in_one(
    png: bytes, program: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TERM_PROGRAM", program)
    show_png(png)
    found = re.fullmatch(r"\x1b]1337;File=inline=1;size=(\d+):([^\a]*)\a\n", capsys.readouterr().out)
    assert found is not None
    assert (int(found[1]), base64.b64decode(found[2])) == (len(png), png)


def test_any_other_gets_two_pixels_to_a_character(
    png: bytes, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"FORCE_COLOR": "1", "COLORTERM": "truecolor", "TERM": "xterm", "COLUMNS": "80"}.items():
        monkeypatch.setenv(name, value)
    show_png(png)
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    assert [line.count("▀") for line in lines] == [64] * 32
    colors = re.findall(r"38;2;(\d+);\d+;\d+;48;2;(\d+);\d+;\d+m▀+", lines[3])
    first = tuple(PICTURE.getpixel((0, y))[0] for y in (6, 7))  # type: ignore[index]
    assert tuple(map(int, colors[0])) == first
