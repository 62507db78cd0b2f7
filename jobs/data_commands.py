"""`counterfake data …`: what datasets hold, how versions differ, new versions out of old ones, export, audit, cleaning up.

Every command takes a dataset as a name, name@version, or a URI, and `--json`. What happens is in the library; this file
parses and prints.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from counterfake.errors import ConfigError, CounterfakeError
from jobs.auditing import audited
from jobs.console import Console
from jobs.options import Home, Json, Storage, open_workspace

if TYPE_CHECKING:
    from counterfake.records import Dataset, Report, Version

app = typer.Typer(no_args_is_help=True, help="Datasets and their versions.")

Uri = Annotated[str, typer.Argument(metavar="DATASET", help="faces, faces@3, or a file:// or s3:// URI")]
Into = Annotated[str, typer.Option("--into", help="Dataset that gets the new version.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no events.")]


@app.command("list")
def list_all(home: Home = None, storage: Storage = None, as_json: Json = False) -> None:
    """Datasets of this workspace, with their newest version."""
    from counterfake.records import Dataset
    from counterfake.storage import open_store

    workspace, console = open_workspace(home, storage), Console(as_json=as_json)
    store = open_store(f"{workspace.storage}/datasets")
    names = sorted({entry.key.split("/")[0] for entry in store.list() if "/versions/" in entry.key})
    rows, broken = [], []
    for name in names:
        try:
            version = Dataset.open(workspace.dataset(name)).version()
        except CounterfakeError as error:  # one broken dataset does not hide the others
            broken.append(str(error))
        else:
            rows.append((name, version.number, version.rows()))
    if as_json:
        console.result([{"name": n, "version": v, "rows": r} for n, v, r in rows])
    else:
        console.table("datasets", ("name", "version", "rows"), rows)
    _complain(console, broken)
    if not names:
        console.event(f"no datasets in {store.uri}; `counterfake run ingest synthetic-faces-demo` makes one")


@app.command()
def show(uri: Uri, home: Home = None, storage: Storage = None, as_json: Json = False) -> None:
    """One version: splits, counts, sources, report, who wrote it."""
    console = Console(as_json=as_json)
    found = _open(uri, home, storage).version().describe()
    if as_json:
        return console.result(found)
    counts = found.pop("counts")
    console.result(found)
    console.table("rows", ("split", "label", "maker", "people", "rows"), _rows_by_maker(counts))
    return None


@app.command()
def history(uri: Uri, home: Home = None, storage: Storage = None, as_json: Json = False) -> None:
    """Every version of a dataset: when it was written, by what, from what, and how many rows it has."""
    console, dataset = Console(as_json=as_json), _open(uri, home, storage)
    numbers, entries, broken = dataset.versions(), [], []
    for number in numbers or [dataset.version().number]:  # without any version: its error
        try:
            entries.append(_entry(dataset.version(number)))
        except CounterfakeError as error:
            broken.append(str(error))
    if as_json:
        console.result(entries)
    else:
        names = ("version", "created_at", "parent", "rows", "made by", "digest")
        rows = [tuple(entry[name] for name in names) for entry in entries]
        console.table(dataset.store.uri, ("version", "written", "adds to", *names[3:]), rows)
    _complain(console, broken)


@app.command()
def diff(
    first: Annotated[str, typer.Argument(help="The older version; alone: compare it with what it adds to.")],
    second: Annotated[str | None, typer.Argument(help="The newer version.")] = None,
    home: Home = None,
    storage: Storage = None,
    as_json: Json = False,
) -> None:
    """Rows added, removed, relabelled and moved between splits, by maker. Shards that both have are not read."""
    from counterfake import curation

    console = Console(as_json=as_json)
    after = _open(second or first, home, storage)
    newer = after.version()
    before = _open(first, home, storage) if second else after
    older = before.version() if second else before.version(_parent(newer, first))
    with console.progress("comparing", None) as advance:
        found = curation.diff((before, older), (after, newer), progress=advance)
    if as_json:
        return console.result(found.to_dict())
    rows = [tuple(change.values()) for change in found.changes]
    console.table(f"{found.before} → {found.after}", ("change", "maker", "split", "label", "rows"), rows)
    console.result({"shards": found.shards, "sources": found.sources})
    if found.same:
        console.event("the same rows and sources")
    return None


@app.command()
def verify(uri: Uri, home: Home = None, storage: Storage = None, as_json: Json = False) -> None:
    """Read every byte of a version and compare it with its digest. Exit status 1 if any was altered or is lost."""
    console, dataset = Console(as_json=as_json), _open(uri, home, storage)
    with console.progress("verifying", None) as advance:
        found = dataset.verify(progress=advance)
    console.result(found if as_json else {**found, "problems": len(found["problems"])})
    _complain(console, found["problems"])


@app.command()
def derive(
    uri: Uri,
    into: Into,
    where: Annotated[
        list[str] | None,
        typer.Option(help="fake=0, maker=a,b, identity!=null, attributes.yaw<=0.5; all must hold."),
    ] = None,
    least: Annotated[
        list[str] | None,
        typer.Option(
            "--min",
            help="sharpness=100, short_side=256, face_side=80, face_score=2: as measured at ingest, or more.",
        ),
    ] = None,
    change: Annotated[
        str,
        typer.Option(
            "--map", help="What each row becomes: crop-faces[:MARGIN], resize:SIDE, jpeg:90, webp:90 or png."
        ),
    ] = "",
    home: Home = None,
    storage: Storage = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """The rows of a version that satisfy every condition, splits kept, as a new version of another dataset (or the same)."""
    from counterfake import changes, curation, parts
    from counterfake.records import Report

    console, report = Console(as_json=as_json, quiet=quiet), Report()
    workspace, dataset = open_workspace(home, storage), _open(uri, home, storage)
    target, rules = workspace.dataset(into), [*(where or []), *map(_at_least, least or [])]
    made = changes.Change.parse(change) if change else None
    with _counting(console, "choosing rows") as progress:
        version = curation.derive(
            dataset,
            None,
            rules,
            uri=target,
            change=made,
            writer={"job": "data derive"},
            report=report,
            progress=progress,
            scratch=parts.scratch(workspace.home),
        )
    found = audited(target, version, workspace, console, headers=False)
    console.result({**_made(target, version, report), "audit": found})


@app.command()
def merge(
    uris: Annotated[
        list[str], typer.Argument(metavar="DATASET…", help="Two or more, each perhaps with @version.")
    ],
    into: Into,
    home: Home = None,
    storage: Storage = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """All rows of several versions as one, splits kept, sources united. Of equal pictures the first stays."""
    from counterfake import curation, parts
    from counterfake.records import Report

    if len(uris) < 2:
        raise ConfigError(f"merge needs at least two datasets, got {len(uris)}")
    console, report = Console(as_json=as_json, quiet=quiet), Report()
    workspace, sets = open_workspace(home, storage), [_open(uri, home, storage) for uri in uris]
    target, cache = workspace.dataset(into), workspace.cache
    with _counting(console, "merging") as progress:
        version = curation.merge(
            sets,
            target,
            writer={"job": "data merge"},
            report=report,
            progress=progress,
            scratch=parts.scratch(workspace.home),
            cache=cache,
        )
    found = audited(target, version, workspace, console, headers=False)
    console.result({**_made(target, version, report), "audit": found})
    if report.conflicts:
        console.event(
            f"{report.conflicts} pictures had the opposite label in a later dataset; the first label stays"
        )
    if found["leaks"]:
        console.event("training refuses a version with a leak; ingest the sources into one dataset instead")


@app.command()
def export(
    uri: Uri,
    to: Annotated[Path, typer.Option("--to", help="New folder; appears when the export is whole.")],
    format: Annotated[
        Literal["parquet", "webdataset", "folder"], typer.Option("--format", help="What to write.")
    ] = "parquet",
    splits: Annotated[
        list[str] | None, typer.Option("--split", help="Only this one; may be repeated.")
    ] = None,
    allow_research: Annotated[
        bool, typer.Option("--allow-research", help="Also rows of sources with consent research; recorded.")
    ] = False,
    home: Home = None,
    storage: Storage = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """A version as files for other tools. Stopped, the same command goes on where it ended."""
    from counterfake.export import export as write

    console, dataset = Console(as_json=as_json, quiet=quiet), _open(uri, home, storage)
    version = dataset.version()
    rows = sum(version.rows(split) for split in splits or version.splits)
    with console.progress("exporting", rows) as advance:
        manifest = write(
            dataset, version, to, format, splits=splits or [], allow_research=allow_research, progress=advance
        )
    console.result(manifest if as_json else {**manifest, "files": len(manifest["files"]), "folder": str(to)})
    for source, count in manifest["left_out"].items():
        console.event(
            f"{count} rows of source {source} were left out: its terms forbid it (consent, export: false)"
        )


@app.command()
def gc(
    uri: Uri,
    yes: Annotated[bool, typer.Option("--yes", help="Delete; without it only the plan is shown.")] = False,
    hours: Annotated[float, typer.Option(min=24, help="Leave everything that is younger.")] = 24,
    home: Home = None,
    storage: Storage = None,
    as_json: Json = False,
) -> None:
    """Shards that no version reaches, abandoned ingests and uploads: shown, with --yes deleted. No version is touched."""
    from counterfake import curation

    console, dataset = Console(as_json=as_json), _open(uri, home, storage)
    plan = curation.gc_plan(dataset, older_than_s=3600 * hours)
    facts = {"shards": len(plan.shards), "staging": len(plan.staging), "bytes": plan.bytes}
    if not yes:
        console.result({"dataset": dataset.store.uri, "would delete": facts})
        return console.event(
            "nothing was deleted; add --yes to delete" if plan.bytes else "nothing to delete"
        )
    with console.progress("deleting", facts["shards"] + facts["staging"]) as advance:
        gone = curation.collect(dataset, plan, progress=advance)
    uploads = dataset.store.abort_stale_uploads(3600 * hours)
    return console.result({"dataset": dataset.store.uri, "deleted": {**gone, "uploads": uploads}})


@app.command()
def lock(
    uri: Uri,
    splits: Annotated[list[str], typer.Option("--split", help="Lock this one; may be repeated.")],
    home: Home = None,
    storage: Storage = None,
    as_json: Json = False,
) -> None:
    """Lock splits for good: judged as a whole, every look counted, but never exported, copied, scored or trained on."""
    from counterfake import locks

    dataset = _open(uri, home, storage)
    found = locks.lock(dataset, dataset.version(), splits)
    Console(as_json=as_json).result(
        {"dataset": f"{dataset.store.uri}@{dataset.version().number}", "locked": found}
    )


@app.command()
def audit(uri: Uri, home: Home = None, storage: Storage = None, as_json: Json = False) -> None:
    """Leaks between splits, duplicates, balance, and what file headers alone betray. Exit status 1 for a leak."""
    from counterfake import audit as auditing

    console, dataset = Console(as_json=as_json), _open(uri, home, storage)
    version = dataset.version()
    with console.progress("auditing", version.rows()) as advance:
        found = auditing.audit(dataset, version, progress=advance)
    console.result(found.to_dict() if as_json else found.lines())
    if found.leaks:
        raise typer.Exit(1)


# -- private --------------------------------------------------------------------------------------------------------


def _open(uri: str, home: Path | None, storage: str | None) -> Dataset:
    from counterfake.records import Dataset

    workspace = open_workspace(home, storage)
    return Dataset.open(workspace.dataset(uri), cache=workspace.cache)


def _at_least(text: str) -> str:
    """sharpness=100 -> the condition attributes.sharpness>=100. ConfigError for what ingest does not measure."""
    from counterfake.quality import NAMES

    name, equals, value = text.partition("=")
    if not equals or name.strip() not in NAMES:
        raise ConfigError(
            f"--min {text!r} is no measured quality; one is {', '.join(NAMES)}, as in sharpness=100"
        )
    return f"attributes.{name.strip()}>={value}"


def _parent(version: Version, name: str) -> int:
    if version.parent is None:
        raise ConfigError(f"version {version.number} adds to none; name two versions: data diff {name} OTHER")
    return version.parent


def _entry(version: Version) -> dict[str, Any]:
    writer = version.writer
    origin = writer.get("derived_from") or " + ".join(writer.get("merged_from", []))
    made = " ".join(str(part) for part in (writer.get("job", ""), origin and f"from {origin}") if part)
    return {
        "version": version.number,
        "created_at": version.created_at,
        "parent": version.parent,
        "rows": version.rows(),
        "splits": {name: version.rows(name) for name in version.splits},
        "made by": " ".join([made, *writer.get("where", [])]),
        "writer": writer,
        "digest": version.digest[:12],
    }


def _made(uri: str, version: Version, report: Report) -> dict[str, Any]:
    splits = {name: version.rows(name) for name in version.splits}
    facts = {"dataset": f"{uri}@{version.number}", "rows": version.rows(), "splits": splits}
    counts = {
        "duplicates": report.duplicates,
        "conflicts": report.conflicts,
        "skipped": dict(report.skipped),
    }
    return {**facts, **counts, "sources": version.sources, "digest": version.digest}


def _rows_by_maker(counts: list[dict[str, Any]]) -> list[tuple[str, str, str, int, int]]:
    groups: dict[tuple[str, str, str], tuple[set[str], int]] = {}
    for row in counts:
        key = (row["split"], {0: "real", 1: "fake"}.get(row["fake"], "unknown"), row["maker"])
        people, rows = groups.get(key, (set(), 0))
        groups[key] = (people | {row["identity"]} - {None}, rows + row["rows"])
    return [(*key, len(people), rows) for key, (people, rows) in sorted(groups.items())]


@contextmanager
def _counting(console: Console, description: str) -> Iterator[Callable[[int], None]]:
    """A bar for work that says how many inputs it has seen so far."""
    seen = 0
    with console.progress(description, None) as advance:

        def progress(count: int) -> None:
            nonlocal seen
            advance(count - seen)
            seen = count

        yield progress


def _complain(console: Console, problems: list[str]) -> None:
    """Each problem of what is stored as an error line, and exit status 1 if there is one."""
    for problem in problems:
        console.error(problem)
    if problems:
        raise typer.Exit(1)
