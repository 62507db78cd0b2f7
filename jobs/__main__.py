"""The `counterfake` command: run, submit, data, models, serve, detect, doctor.

Every command takes `--json` where a machine may read. A user's mistake is one line on standard error and exit status 2;
anything else keeps its traceback. This file only parses and prints: what happens is in the jobs and the library.
`counterfake data …` is data_commands.py.
"""

from __future__ import annotations

import dataclasses
import sys
import warnings
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

import jobs
from counterfake import config
from counterfake.errors import ConfigError, CounterfakeError, MediaError
from counterfake.workspace import Workspace
from jobs import data_commands
from jobs.console import Console
from jobs.options import Home, Json, Storage, Tracking, open_workspace

app = typer.Typer(
    name="counterfake",
    help="Make fakes to catch fakes: train generators and deepfake detectors on a Ray cluster, serve their verdicts.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
models_app = typer.Typer(no_args_is_help=True, help="Registered models, their versions and aliases.")
app.add_typer(data_commands.app, name="data")
app.add_typer(models_app, name="models")

# jobs that go on where a stopped one ended; the others begin anew
RESUMED = {
    "convert", "demo", "evaluate", "evaluate-cross", "ingest", "score", "study-augment", "study-benford", "study-blur",
    "study-detector", "study-folds", "study-gan", "train-autoencoder", "train-classifier", "train-detector", "train-gan",
    "train-swap", "tune-detector",
}  # fmt: skip

Sets = Annotated[list[str] | None, typer.Option("--set", help="path=value; may be repeated.")]
Settings = Annotated[
    list[Path] | None, typer.Option(help="YAML, TOML or JSON file of settings by dotted path.")
]


@app.command()
def run(
    job: Annotated[str | None, typer.Argument(help="What to run; leave out to list all jobs.")] = None,
    preset: Annotated[str | None, typer.Argument(help="Named settings; leave out to list them.")] = None,
    sets: Sets = None,
    settings: Settings = None,
    workers: Annotated[int | None, typer.Option(help="Ray Train workers; 0 trains in this process.")] = None,
    home: Home = None,
    storage: Storage = None,
    tracking: Tracking = None,
    as_json: Json = False,
    show: Annotated[bool, typer.Option("--print", help="Print the resolved job and stop.")] = False,
    listing: Annotated[bool, typer.Option("--list", help="List presets and stop.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no events.")] = False,
    gpu: Annotated[
        bool, typer.Option("--gpu", help="Of a benchmark: its steps on the GPU; gpu=true.")
    ] = False,
) -> None:
    """Run a job here, or inside the cluster when Ray submitted it."""
    console = Console(quiet=quiet, as_json=as_json)
    if job is None:
        return _list_jobs(console)
    module = jobs.load(job)
    if listing:
        return console.result([name.replace("_", "-") for name in module.PRESETS])
    resolved = resolve(module, preset, [*(sets or []), *(["gpu=true"] if gpu else [])], settings, workers)
    if show:
        return console.result(config.to_dict(resolved))
    workspace = open_workspace(home, storage, tracking)
    try:
        outcome = module.run(resolved, workspace, console=console)
    except KeyboardInterrupt:
        console.error(_stopped(job))
        sys.exit(130)
    short = getattr(module, "headline", None)  # of a job whose result is long
    console.result(short(outcome) if short and not as_json else outcome)
    return None


def _stopped(job: str) -> str:
    if job.replace("_", "-") in RESUMED:
        return "stopped; the same command continues where this one ended"
    return f"stopped; {job} begins anew when it is run again"


def resolve(
    module: Any, preset: str | None, sets: list[str] | None, settings: list[Path] | None, workers: int | None
) -> Any:
    """Preset, then settings files in order, then --set, then --workers: all applied at once."""
    job = jobs.preset(module, preset)
    changes: dict[str, Any] = {}
    for path in settings or []:
        changes.update(config.load_file(path))
    changes.update(config.parse_assignments(sets or []))
    if workers is not None:
        changes[_workers_path(job)] = workers
    return config.override(job, changes)


def _workers_path(job: Any) -> str:
    for field in dataclasses.fields(job):
        if field.name == "workers":
            return "workers"
        if hasattr(getattr(job, field.name), "workers"):
            return f"{field.name}.workers"
    raise ConfigError(f"{type(job).__name__} runs in one process; leave --workers out")


def _list_jobs(console: Console) -> None:
    rows = []
    for name in jobs.names():
        module = jobs.load(name)
        summary = (module.__doc__ or "").strip().splitlines()[0]
        rows.append((name, ", ".join(key.replace("_", "-") for key in module.PRESETS), summary))
    if console.as_json:
        console.result([{"job": n, "presets": p.split(", "), "summary": s} for n, p, s in rows])
    else:
        console.table("counterfake run JOB PRESET", ("job", "presets", "what it does"), rows)


@app.command()
def submit(
    job: Annotated[str, typer.Argument(help="As for run.")],
    preset: Annotated[str | None, typer.Argument(help="As for run.")] = None,
    address: Annotated[
        str, typer.Option(help="Ray dashboard.", envvar="RAY_API_SERVER_ADDRESS")
    ] = "http://127.0.0.1:8265",
    sets: Sets = None,
    settings: Settings = None,
    workers: Annotated[int | None, typer.Option(help="Ray Train workers.")] = None,
    home: Home = None,
    storage: Storage = None,
    tracking: Tracking = None,
    follow: Annotated[bool, typer.Option(help="Follow the log and exit with the job's status.")] = True,
    working_dir: Annotated[
        Path | None, typer.Option(help="Upload this source tree to a cluster that has no install of it.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Send the same job to a Ray cluster through its Jobs API."""
    from jobs import submit as submission

    resolved = resolve(jobs.load(job), preset, sets, settings, workers)  # mistakes are found here, not there
    workspace = open_workspace(home, storage, tracking)
    command = submission.entrypoint(job, preset, resolved, jobs.preset(jobs.load(job), preset), workspace)
    status = submission.submit(
        command, address=address, follow=follow, working_dir=working_dir, console=Console(as_json=as_json)
    )
    sys.exit(status)  # not typer.Exit: after Ctrl-C the job goes on, which has been said already


@app.command()
def doctor(
    home: Home = None,
    storage: Storage = None,
    tracking: Tracking = None,
    as_json: Json = False,
) -> None:
    """Check this machine: versions, disk, shared memory, ports, storage, tokens."""
    from jobs import doctor as checks

    console = Console(as_json=as_json)
    results = checks.examine(open_workspace(home, storage, tracking))
    if as_json:
        console.result([dataclasses.asdict(result) for result in results])
    else:
        console.table(
            "counterfake doctor", ("check", "state", "found", "what to do"), [r.row() for r in results]
        )
    raise typer.Exit(1 if any(r.state == "bad" for r in results) else 0)


@models_app.command("list")
def models_list(
    name: Annotated[str | None, typer.Argument(help="Only this model.")] = None,
    home: Home = None,
    storage: Storage = None,
    tracking: Tracking = None,
    as_json: Json = False,
) -> None:
    """Registered versions with aliases and lineage."""
    console = Console(as_json=as_json)
    versions = _registry(home, storage, tracking).list(name)
    if as_json:
        console.result([dataclasses.asdict(v) for v in versions])
    else:
        rows = [
            (v.name, v.version, " ".join(f"@{a}" for a in v.aliases), v.digest[:12], v.run_id)
            for v in versions
        ]
        console.table("models", ("name", "version", "aliases", "digest", "run"), rows)


@models_app.command("show")
def models_show(
    reference: Annotated[str, typer.Argument(help="name@alias, name/3 or name")],
    home: Home = None,
    storage: Storage = None,
    tracking: Tracking = None,
    as_json: Json = False,
) -> None:
    """One version: digest, lineage, evaluation."""
    version = _registry(home, storage, tracking).get(reference)
    Console(as_json=as_json).result(dataclasses.asdict(version))


@models_app.command("promote")
def models_promote(
    reference: Annotated[str, typer.Argument(help="name/3")],
    alias: Annotated[str, typer.Option(help="champion, challenger or shadow")] = "champion",
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", help="A gate setting: min_auc=0.9, licence=commercial, or none"),
    ] = None,
    expect: Annotated[
        int | None, typer.Option(help="Only if the alias points to this version now; 0 = to none.")
    ] = None,
    home: Home = None,
    storage: Storage = None,
    tracking: Tracking = None,
    as_json: Json = False,
) -> None:
    """Move an alias, through the gate (of @champion: AUC 0.75, recall on real pictures 0.7; bounds on worst group, calibration
    error, worst robustness cell and latency where they were measured). What fails is named. Serving follows @champion;
    challenger and shadow are names to fetch and compare by."""
    from counterfake.gate import usual

    gate = config.override(usual(alias), config.parse_assignments(sets or []))
    registry = _registry(home, storage, tracking)
    version = registry.get(reference)
    moved = registry.promote(version.name, version.version, alias=alias, gate=gate, expected=expect)
    Console(as_json=as_json).result(dataclasses.asdict(moved))


@models_app.command("rollback")
def models_rollback(
    name: Annotated[str, typer.Argument(help="The model.")],
    alias: Annotated[str, typer.Option(help="champion, challenger or shadow")] = "champion",
    expect: Annotated[int | None, typer.Option(help="Only if the alias points to this version now.")] = None,
    home: Home = None,
    storage: Storage = None,
    tracking: Tracking = None,
    as_json: Json = False,
) -> None:
    """Move an alias back to the version before the current one, without a gate: it has passed already."""
    moved = _registry(home, storage, tracking).rollback(name, alias=alias, expected=expect)
    Console(as_json=as_json).result(dataclasses.asdict(moved))


@models_app.command("compare")
def models_compare(
    first: Annotated[str, typer.Argument(help="name@alias, name/3, name, or a bundle folder")],
    second: Annotated[str, typer.Argument(help="The one to compare it with.")],
    data: Annotated[str, typer.Option(help="Dataset that both are judged on: faces@3")],
    split: Annotated[str, typer.Option(help="Of the dataset.")] = "test",
    sets: Sets = None,
    home: Home = None,
    storage: Storage = None,
    tracking: Tracking = None,
    as_json: Json = False,
) -> None:
    """Two models on the same pictures: every figure, its difference with a 95 % interval, and a paired bootstrap test."""
    from jobs import compare

    console = Console(as_json=as_json)
    changes = {"first": first, "second": second, "data.uri": data, "data.split": split}
    job = config.override(compare.CompareJob(), {**changes, **config.parse_assignments(sets or [])})
    found = compare.run(job, open_workspace(home, storage, tracking), console=console)
    if as_json:
        return console.result(found)
    title = f"{first} and {second} on {found['n']} pictures of {found['dataset']}, split {split}"
    console.table(title, ("metric", "first", "second", "difference", "p"), compare.lines(found))
    return None


def _registry(home: Path | None, storage: str | None, tracking: str | None) -> Any:
    from counterfake.registry import Registry

    return Registry.at(open_workspace(home, storage, tracking))


@app.command()
def serve(
    model: Annotated[str, typer.Option(help="Registered ensemble.")] = "ensemble@champion",
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="HTTP port.")] = 8000,
    sets: Sets = None,
    home: Home = None,
    storage: Storage = None,
    tracking: Tracking = None,
) -> None:
    """Serve verdicts over HTTP until interrupted; follows the alias while it runs."""
    from serving import app as serving

    changes = {"model": model, "host": host, "port": port, **config.parse_assignments(sets or [])}
    settings = config.override(serving.Settings(), changes)
    console = Console()
    console.event(f"starting {settings.model} on {settings.host}:{settings.port} …")
    serving.start(
        settings,
        open_workspace(home, storage, tracking),
        blocking=True,
        on_ready=lambda url: console.event(
            f"the page: {url}   API: {url}/docs   metrics: {url}/metrics   (Ctrl-C ends it)"
        ),
    )


@app.command()
def detect(
    files: Annotated[list[Path], typer.Argument(help="Pictures: JPEG, PNG or WEBP.")],
    url: Annotated[str | None, typer.Option(help="A running service; left out, the model runs here.")] = None,
    model: Annotated[str, typer.Option(help="Registered ensemble, when it runs here.")] = "ensemble@champion",
    home: Home = None,
    storage: Storage = None,
    tracking: Tracking = None,
    as_json: Json = False,
) -> None:
    """Real, fake or uncertain: a verdict for each picture. Exit status 1 if a picture could not be judged."""
    console = Console(as_json=as_json)
    for path in files:
        if not path.is_file():  # before a model is loaded
            raise ConfigError(f"{path} is {'a folder' if path.is_dir() else 'not there'}; name picture files")
    judge = _remote_judge(url) if url else _local_judge(model, open_workspace(home, storage, tracking))
    results, refused = [], 0
    with console.progress("detecting", len(files)) as advance:
        for path in files:
            verdict, ok = _judge_file(judge, path)
            refused += not ok
            results.append({"file": str(path), **verdict})
            advance(1)
    if as_json:
        console.result(results)
    else:
        rows = [(r["file"], r["verdict"], r.get("probability_fake"), _why(r)) for r in results]
        console.table("verdicts", ("file", "verdict", "probability fake", "reason"), rows)
    raise typer.Exit(1 if refused else 0)


def _why(verdict: dict[str, Any]) -> str:
    """The reason in a word, and in a sentence where there is one."""
    return ": ".join(str(verdict[key]) for key in ("reason", "detail") if verdict.get(key))


def _judge_file(judge: Callable[[bytes], dict[str, Any]], path: Path) -> tuple[dict[str, Any], bool]:
    try:
        verdict = judge(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except MediaError as error:
        return {"verdict": "no_verdict", "reason": error.reason, "detail": str(error)}, False
    return verdict, verdict["verdict"] != "no_verdict"


def _remote_judge(url: str) -> Callable[[bytes], dict[str, Any]]:
    from serving import client

    return lambda data: client.detect(url, data)


def _local_judge(model: str, workspace: Workspace) -> Callable[[bytes], dict[str, Any]]:
    from counterfake import predictor
    from counterfake.registry import Registry

    folder = Registry.at(workspace).fetch(model, workspace.cache)
    loaded = predictor.load(folder)
    if not isinstance(loaded, predictor.EnsemblePredictor):
        raise ConfigError(
            f"{model} is a {type(loaded).__name__}, not an ensemble; only an ensemble gives a verdict"
        )
    return loaded.verdict


def reports_errors(call: Callable[[], None]) -> Callable[[], None]:
    """A user's mistake becomes one line and status 2, an interrupt one word and 130."""

    @wraps(call)
    def wrapped() -> None:
        try:
            call()
        except CounterfakeError as error:
            Console().error(" ".join(str(error).split()))
            sys.exit(2)
        except typer.TyperException as error:
            _usage(error)
            sys.exit(2)
        except KeyboardInterrupt:
            Console().error("stopped")
            sys.exit(130)

    return wrapped


def _usage(error: typer.TyperException) -> None:
    """An unknown command, a missing argument, a wrong option: one line. Help that was asked for is printed already."""
    text = " ".join(str(getattr(error, "format_message", error.__str__)()).split())
    context = getattr(error, "ctx", None)
    if text:
        path = context.command_path if context else "counterfake"
        Console().error(f"{text.rstrip('.')}; see {path} --help")


@reports_errors
def main() -> None:
    """Entry point of the `counterfake` script."""
    warnings.filterwarnings(
        "ignore", category=UserWarning, module="PIL"
    )  # odd pictures get a verdict or a reason
    status = app(prog_name="counterfake", standalone_mode=False)
    if status == 130:  # typer's word for an interrupt
        raise KeyboardInterrupt
    sys.exit(status or 0)


if __name__ == "__main__":
    main()
