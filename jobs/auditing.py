"""The audit of a version that a command has just written, told on the console. Kept with the dataset, asked before training."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jobs.console import Console

if TYPE_CHECKING:
    from counterfake.versions import Version
    from counterfake.workspace import Workspace


def audited(
    uri: str, version: Version, workspace: Workspace, console: Console, *, headers: bool = True
) -> dict[str, list[str]]:
    """Leaks between splits and shortcuts that a detector could learn, told and returned by level.

    headers=False: without the metadata probe, the only part that reads pictures. A stored audit is not made again."""
    from counterfake import audit  # scikit-learn takes a second to load
    from counterfake.records import Dataset

    dataset = Dataset.open(uri, cache=workspace.cache)
    found = audit.stored(dataset, version)
    if found is None:
        with console.progress("audit", version.rows()) as advance:
            found = audit.audit(dataset, version, headers=headers, progress=advance)
    for finding in (*found.leaks, *found.warnings):
        console.event(f"{finding.level} ({finding.kind}): {finding.text}")
    if not found.leaks:
        console.event(f"the audit found no leak between splits and has {len(found.warnings)} warnings")
    return {name: [f"{f.kind}: {f.text}" for f in getattr(found, name)] for name in ("leaks", "warnings")}
