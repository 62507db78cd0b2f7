"""The demo's report: what was done, what it looks like, how good it is, where to look next. One self-contained page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from counterfake import images, media, provenance
from counterfake.evaluation import report as page
from counterfake.records import Dataset
from counterfake.tracking import Tracker
from counterfake.workspace import Workspace

DATA = {"faces": "procedural faces", "own": "your own pictures"}
FIGURES = {
    "auc": "AUC",
    "average_precision": "average precision",
    "accuracy": "accuracy",
    "recall_real": "recall on real pictures",
    "recall_fake": "recall on fakes",
    "eer": "equal error rate",
    "ece": "calibration error (ECE)",
    "brier": "Brier score",
}


def build(summary: Mapping[str, Any], extras: Mapping[str, Any], workspace: Workspace) -> str:
    """HTML of the whole walk."""
    stages = summary["stages"]
    sections = [
        _overview(summary, extras),
        _made(extras, workspace),
        _generators(stages, extras, workspace),
        _detectors(stages, extras, workspace),
        _verdicts(stages, extras),
        _next(stages, workspace),
        page.Section("Everything, as JSON", [page.Json("summary.json", summary)]),
    ]
    lead = "Fakes were made to train the detectors that catch them: every figure below is from this run, on this machine."
    return page.html("Make fakes to catch fakes", sections, subtitle=lead)


def _overview(summary: Mapping[str, Any], extras: Mapping[str, Any]) -> page.Section:
    stages = summary["stages"]
    test = _evaluation(stages["ensemble"])
    auc, served = test.get("auc") or {}, stages["served"]
    figures = [
        ("whole walk", f"{summary['seconds'] / 60:.1f} min", f"{len(stages)} stages"),
        (
            "test AUC",
            _number(auc.get("value")),
            f"95 % interval {_number(auc.get('low'))} to {_number(auc.get('high'))}",
        ),
        ("real passed as real", _percent(test.get("recall_real")), "at the served threshold"),
        (
            "pictures judged",
            f"{served['requests']}",
            f"{served['right']} of {served['decided']} decided ones right",
        ),
        ("answer time", f"{served['median_milliseconds']:.0f} ms", "median over HTTP"),
    ]
    rows = [[name, f"{stage['seconds']:.1f}", _what(name, stage)] for name, stage in stages.items()]
    return page.Section(
        "What was done", [page.KeyFigures(figures), page.Table(("stage", "seconds", "what came of it"), rows)]
    )


def _what(name: str, stage: Mapping[str, Any]) -> str:
    if name == "dataset":
        return "; ".join(
            f"{DATA[k]}: {v['rows']} rows, version {v['version']}" for k, v in stage.items() if k in DATA
        )
    if name in ("gan", "swap", "detector"):
        again = " (finished before, reused)" if stage.get("reused") else ""
        return f"{stage['registered']}: {stage['steps']} steps, {stage['images_per_second']:.0f} pictures/s{again}"
    if name == "fakes":
        return "; ".join(
            f"{v['report']['rows']} by {v['maker']} in version {v['version']}"
            for v in (stage["gan"], stage["swap"])
        )
    if name == "tune":
        return f"{len(stage['trials'])} trials, best {stage['metric']} {_number(stage['best']['value'])}"
    if name == "champion":
        outcome = "passed the gate" if stage["promoted"] else f"refused by the gate: {stage['refused']}"
        return f"{stage['name']} version {stage['version']}, digest {stage['digest'][:12]}, {outcome}"
    if name == "served":
        return f"{stage['requests']} pictures, {stage['right']} of {stage['decided']} decided ones right"
    if name == "metrics":
        return f"{stage['series']} series on {stage['page']}"
    return str(stage.get("registered", ""))


def _made(extras: Mapping[str, Any], workspace: Workspace) -> page.Section:
    """Samples of each maker, side by side."""
    dataset = Dataset.open(workspace.dataset("demo-faces"), cache=workspace.cache)
    names = {"camera": "procedural people, the real ones of this demo"}
    pictures = []
    found: dict[str, list[Any]] = {maker: [] for maker in extras["makers"]}
    for sample in dataset.samples(dataset.version(), "train"):
        tiles = found.get(sample.maker if sample.fake else "camera")
        if tiles is not None and len(tiles) < 18:
            tiles.append(media.decode_trusted(sample.media))
    for maker, tiles in found.items():
        if tiles:
            sheet = media.encode(images.grid(tiles, 6), "png")
            shown = sheet if maker == "camera" else provenance.mark(sheet, maker=maker)
            pictures.append((names.get(maker, f"made by {maker}"), shown))
    text = (
        "Real here means: drawn by the platform's own face painter, so that the demo needs no download. GAN and "
        "face swap were trained for a minute or two on some hundreds of pictures, and are as good as that allows. "
        "Every generated file carries an IPTC digital source type, and every row its maker."
    )
    return page.Section("Who made what", [page.Text(text), page.Pictures(pictures, size="samples")])


def _generators(stages: Mapping[str, Any], extras: Mapping[str, Any], workspace: Workspace) -> page.Section:
    blocks: list[page.Block] = []
    for name, key in (("GAN", "gan_run"), ("face swap", "swap_run")):
        blocks += _curves(name, extras[key], workspace)
    previews = [
        *_artifacts(extras["gan_run"], workspace, "GAN, from fixed noise"),
        *_artifacts(extras["swap_run"], workspace, "face swap"),
    ]
    if previews:
        blocks.append(page.Pictures(previews, size="samples"))
    return page.Section("How the generators learned", blocks)


def _curves(title: str, run_id: str, workspace: Workspace) -> list[page.Block]:
    tracker = Tracker.at(workspace)
    metrics = tracker.read(run_id)["metrics"]
    losses = {
        name: tracker.history(run_id, name) for name in sorted(metrics) if name.endswith(("loss", "accuracy"))
    }
    groups = {
        "loss": {name: points for name, points in losses.items() if name.endswith("loss")},
        "accuracy": {name: points for name, points in losses.items() if name.endswith("accuracy")},
    }
    plots = [
        (f"{title}: {kind} over steps", page.curves_plot(curves, y=kind, title=f"{title}: {kind}"))
        for kind, curves in groups.items()
        if curves
    ]
    return [page.Pictures(plots)] if plots else []


def _artifacts(run_id: str, workspace: Workspace, caption: str) -> list[tuple[str, bytes]]:
    """The newest preview of each kind that a run kept."""
    tracker = Tracker.at(workspace)
    newest: dict[str, str] = {}
    for path in sorted(tracker.files(run_id, "previews")):
        newest[path.rsplit("/", 1)[0] if path.count("/") > 1 else path.rsplit("-", 1)[0]] = path
    return [
        (f"{caption}: {key.rsplit('/', 1)[-1]}", tracker.load(run_id, path)) for key, path in newest.items()
    ]


def _detectors(stages: Mapping[str, Any], extras: Mapping[str, Any], workspace: Workspace) -> page.Section:
    test = _evaluation(stages["ensemble"])
    blocks: list[page.Block] = [
        page.Text(
            "Measured on the **test** split: people and pictures that no generator of training rows, no training and no "
            "calibration has seen. Intervals are 95 %, bootstrapped by person."
        ),
        page.Table(
            ("figure", "value", "low", "high"),
            page.metric_rows(test, FIGURES),
            caption="the ensemble on test",
        ),
    ]
    blocks.append(_promise(test))
    for group, members in (test.get("groups") or {}).items():
        rows = page.group_rows(members)
        blocks.append(page.Table(("", "n", "AUC", "recall real", "recall fake"), rows, caption=f"by {group}"))
    plots = _plots(extras.get("ensemble_run"), workspace)
    if plots:
        blocks.append(page.Pictures(plots))
    trials = [
        [t["name"], t["state"], t["steps"], _number(t["value"]), ", ".join(f"{k.rsplit('.', 1)[-1]}={_short(v)}" for k, v in t["settings"].items())]
        for t in stages["tune"]["trials"]
    ]  # fmt: skip
    blocks.append(
        page.Table(
            ("trial", "state", "steps", stages["tune"]["metric"], "settings"), trials, caption="the search"
        )
    )
    return page.Section("How well fakes are caught", blocks)


def _promise(test: Mapping[str, Any]) -> page.Block:
    """What the verdicts did to each class, beside what was promised."""
    words = ("real", "fake", "uncertain", "out_of_domain", "lost")
    rows = [
        [truth, found["n"], *(f"{100 * found[word]:.1f} %" for word in words)]
        for truth, found in test["verdicts"].items()
    ]
    caption = (
        f"Verdicts on test. Lost: the true label was excluded; {100 * test['alpha']:.0f} % of each class was promised for pictures "
        "like the calibration's. With this few people and pictures the two splits differ, and the share with them."
    )
    head = ("truth", "n", "called real", "called fake", "uncertain", "out of domain", "lost")
    return page.Table(head, rows, caption=caption)


def _plots(run_id: str | None, workspace: Workspace) -> list[tuple[str, bytes]]:
    if not run_id:
        return []
    tracker = Tracker.at(workspace)
    paths = [path for path in tracker.files(run_id) if path.endswith(".png")]
    return [
        (path.rsplit("/", 1)[-1].removesuffix(".png"), tracker.load(run_id, path)) for path in sorted(paths)
    ]


def _verdicts(stages: Mapping[str, Any], extras: Mapping[str, Any]) -> page.Section:
    answers = extras["answers"]
    captions = [
        f"{a['verdict']} · {a['probability_fake']:.2f}" + f" · truth: {a['truth']} ({a['maker']})"
        if a.get("probability_fake") is not None
        else f"{a['verdict']} ({a.get('reason')}) · truth: {a['truth']}"
        for a in answers
    ]
    pictures = list(zip(captions, extras["pictures"], strict=True))
    text = (
        "Each picture was posted to `/v1/detect`. A verdict is *uncertain* where neither answer can be given at the stated "
        "error rate: at most that share of real pictures is called fake, and of fakes real, on pictures like the calibration's."
    ).replace("*", "")
    return page.Section(
        "Verdicts over HTTP",
        [
            page.Text(text),
            page.Pictures(pictures, size="small"),
            page.Json(
                "the first answer, whole", {k: v for k, v in answers[0].items() if k != "heatmap"}, open=True
            ),
            page.Json("counters of /metrics", extras["metrics"]),
        ],
    )


def _next(stages: Mapping[str, Any], workspace: Workspace) -> page.Section:
    home = "" if workspace.home.name == "runs" else f" --home {workspace.home}"
    commands = f"""mlflow ui --backend-store-uri {workspace.tracking_uri}     # every run, curve, picture and model
counterfake serve{home}                                 # the page, where a picture can be dropped
counterfake detect PICTURE …{home}                      # the same verdict, without a service
counterfake data show demo-faces{home}                  # splits, makers, licences of the newest version
counterfake models list{home}                           # versions, aliases, digests
counterfake run --help                                  # the jobs behind each stage, with their settings"""
    return page.Section("Where to look next", [page.Code(commands)])


def _evaluation(stage: Mapping[str, Any]) -> Mapping[str, Any]:
    return stage.get("evaluation") or {}


def _number(value: Any) -> str:
    return "–" if value is None else f"{value:.3f}"


def _percent(metric: Any) -> str:
    return "–" if not metric or metric.get("value") is None else f"{100 * metric['value']:.1f} %"


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
