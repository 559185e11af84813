"""Where recipes lie. Apart from `recipe.py`, so that listing them needs no pydantic."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).parent


def folders() -> list[Path]:
    """Where recipes are looked up, first match wins: the user's own, an installed copy, a source checkout."""
    return [
        folder
        for folder in (Path("recipes"), PACKAGE / "_data" / "recipes", PACKAGE.parent / "recipes")
        if folder.is_dir()
    ]


def recipe_files() -> dict[str, Path]:
    """name → file of every recipe in sight."""
    found: dict[str, Path] = {}
    for folder in folders():
        for path in sorted(folder.glob("*.yaml")):
            found.setdefault(path.stem, path)
    return dict(sorted(found.items()))
