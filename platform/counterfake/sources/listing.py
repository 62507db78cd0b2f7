"""What lies below a folder, nothing left unsaid: files to read, and what is not one, under a name that says why.

A name that ends in "/" is a folder that is not entered, one input of its own. What an operating system or a tool leaves
behind (hidden files and folders, Thumbs.db) and what belongs to a data set without being a picture or a video of it is
set aside: counted and named, but no fault of the data (see `is_aside`).
"""

from __future__ import annotations

import os
from pathlib import Path

LITTER = frozenset(
    {
        "thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx", "@eadir", "$recycle.bin", "system volume information",
    }
)  # in lower case  # fmt: skip
HIDDEN = "hidden, or of the operating system"
BESIDE = "belongs to the data set but is none of its media"
UNWANTED = "left out by the settings of the source"
LINKED = "a link to a folder, which is not followed"
ASIDE = frozenset({HIDDEN, BESIDE, UNWANTED})


def listed(root: Path) -> list[str]:
    """Everything below root as names relative to it, sorted by their parts; a folder that is not entered ends in "/".

    Not entered are hidden folders, links to folders, and folders that cannot be read."""
    found: list[str] = []
    waiting = [""]
    while waiting:
        folder = waiting.pop()
        try:
            with os.scandir(root / folder) as entries:
                for entry in entries:
                    name = folder + entry.name
                    if not _is_folder(entry):
                        found.append(name)
                    elif is_litter(entry.name) or entry.is_symlink():
                        found.append(f"{name}/")
                    else:
                        waiting.append(f"{name}/")
        except OSError:
            if folder:
                found.append(folder)
            else:
                raise  # the source itself, which somebody has named
    return sorted(found, key=lambda name: name.split("/"))


def refusal(root: Path, name: str) -> str | None:
    """Why an input that `listed` names is not read; None for one that may be a file."""
    if is_litter(name):
        return HIDDEN
    if not name.endswith("/"):
        return None
    path = root / name
    if path.is_symlink():
        return LINKED
    try:
        os.scandir(path).close()
    except OSError as error:
        return f"a folder that cannot be read: {error.strerror}"
    return "a folder that could not be read when it was listed"


def is_litter(name: str) -> bool:
    """Whether a file, or a folder above it, is hidden or of an operating system."""
    parts = (part for part in name.split("/") if part not in ("", ".", ".."))
    return any(part.startswith(".") or part.lower() in LITTER for part in parts)


def is_aside(reason: str) -> bool:
    """Whether an input skipped for this reason is counted, but says nothing against the data."""
    return reason in ASIDE


# -- private --------------------------------------------------------------------------------------------------------


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """A folder or a link to one; a broken link or one that may not be followed is a file that will not be read."""
    try:
        return entry.is_dir()
    except OSError:
        return False
