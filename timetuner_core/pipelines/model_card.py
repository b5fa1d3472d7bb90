"""The licence of a saved pipeline, by its model card."""

from pathlib import Path

from timetuner_core.pipelines.files import MAX_README_BYTES, README

MAX_LICENCE = 200


def read_licence(folder: Path) -> dict[str, str | None]:
    """The licence's name and the file that says it, both None if none does."""
    path = folder / README
    licences: list[object] = []
    if path.is_file() and path.stat().st_size <= MAX_README_BYTES:
        licences = _licences(path.read_text(encoding="utf-8", errors="replace"))
    text = ", ".join(str(each) for each in licences if each)[:MAX_LICENCE]
    return {"name": text or None, "source": README if text else None}


def _licences(card: str) -> list[object]:
    from huggingface_hub import ModelCard

    try:
        data: dict[str, object] = vars(ModelCard(card, ignore_metadata_errors=True).data)
    except Exception:  # A card is free text, and what stands before it may be no YAML.
        return []
    licence, name = data.get("license"), data.get("license_name")
    if isinstance(licence, list):
        return licence
    return [name if licence == "other" and name else licence]
