"""Pictures in a terminal, by its own protocol if the environment names one, or by coloured characters."""

import base64
import io
import os
from collections.abc import Iterator

from PIL import Image
from rich.color import Color
from rich.console import Console
from rich.style import Style
from rich.text import Text

KITTY_CHUNK_CHARACTERS = 4096  # The longest text of one escape sequence.


def show_png(png: bytes) -> None:
    """Show a PNG on stdout."""
    console = Console()
    protocol = _protocol()
    if protocol == "kitty":
        console.file.write("".join(_kitty(png)) + "\n")
    elif protocol == "iterm2":
        console.file.write(f"\x1b]1337;File=inline=1;size={len(png)}:{base64.b64encode(png).decode()}\a\n")
    else:
        console.print(_half_blocks(png, console.width))


def _protocol() -> str | None:
    term, program = os.environ.get("TERM", ""), os.environ.get("TERM_PROGRAM", "")
    if "KITTY_WINDOW_ID" in os.environ or term in ("xterm-kitty", "xterm-ghostty") or program == "ghostty":
        return "kitty"
    return "iterm2" if program in ("iTerm.app", "WezTerm") else None


def _kitty(png: bytes) -> Iterator[str]:
    text = base64.b64encode(png).decode()
    chunks = [text[start : start + KITTY_CHUNK_CHARACTERS] for start in range(0, len(text), KITTY_CHUNK_CHARACTERS)]
    for k, chunk in enumerate(chunks):
        what = "a=T,f=100," if k == 0 else ""  # These keys mean: show a PNG.
        yield f"\x1b_G{what}m={int(k < len(chunks) - 1)};{chunk}\x1b\\"


def _half_blocks(png: bytes, width: int) -> Text:
    """The image as text. Each character shows two pixels, one above the other."""
    image = Image.open(io.BytesIO(png)).convert("RGB")
    image.thumbnail((width, image.height), Image.Resampling.BOX)
    text = Text(no_wrap=True)
    for y in range(0, image.height - image.height % 2, 2):
        for x in range(image.width):
            upper, lower = _color(image, x, y), _color(image, x, y + 1)
            text.append("▀", Style(color=upper, bgcolor=lower))
        text.append("\n")
    return text


def _color(image: Image.Image, x: int, y: int) -> Color:
    red, green, blue = image.getpixel((x, y))  # type: ignore[misc]
    return Color.from_rgb(red, green, blue)
