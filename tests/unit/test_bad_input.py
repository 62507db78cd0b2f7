"""A user's mistake at the command: one line that says what to do, exit status 2, nothing written; `--json` stays pure."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import jobs
from counterfake import media
from counterfake.errors import CheckpointError, ConfigError, DataError, StorageError
from counterfake.gate import CHAMPION, Gate
from counterfake.nets.mobilenetv2 import MobileNetV2Config
from counterfake.scoring import Scored
from counterfake.storage import open_store
from counterfake.workspace import Workspace
from jobs import __main__ as command
from jobs import data_commands
from jobs.console import Console

Call = Callable[..., tuple[int, str, str]]
ROOT = Path(__file__).resolve().parents[2]
RIGHTS = ("--set", "source.licence=CC0-1.0", "--set", "source.consent=none")


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """The command as a shell calls it -> (exit status, standard output, standard error)."""
    monkeypatch.setenv("COUNTERFAKE_HOME", str(tmp_path / "runs"))
    for name in ("COUNTERFAKE_STORAGE", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["counterfake", *words])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            command.main()
        return int(ended.value.code or 0), *capsys.readouterr()

    return run


def mistake(result: tuple[int, str, str]) -> str:
    """The one error line of a call that must have failed as a user's mistake; headings above it are allowed."""
    status, out, err = result
    lines = [line for line in err.splitlines() if not line.startswith("▸")]
    assert (status, out, len(lines)) == (2, "", 1), result
    assert lines[0].startswith("error: ")
    return lines[0]


def draw(folder: Path, count: int, seed: int = 0) -> Path:
    """`count` small PNG files that are all different."""
    folder.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng([seed, *folder.name.encode()])
    for index in range(count):
        pixels = noise.integers(0, 256, (40, 40, 3), dtype=np.uint8)
        (folder / f"{index:03d}.png").write_bytes(media.encode(pixels, "png"))
    return folder


def ingest(call: Call, folder: Path, into: str, *words: str) -> tuple[int, str, str]:
    return call(
        "run", "ingest", "folder", "--set", f"source.path={folder}", "--set", f"into={into}", *RIGHTS, *words
    )


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("frob", "No such command 'frob'; see counterfake --help"),
        ("detect", "Missing argument 'files'; see counterfake detect --help"),
        ("serve --port abc", "--port"),
        ("models show x --frob", "--frob"),
        ("run train-gan dcgan-mnist-s4 --set loop.epochs=.inf", "loop.epochs must be a finite number"),
        ("run train-gan dcgan-mnist-s4 --set learner.g_lr=.nan", "learner.g_lr must be a finite number"),
        ("run ingest folder --set source.consent=perhaps", "expected one of research, subjects"),
        ("run train-gan dcgan-faces-demo --set loop.images=9", "set the others to 0"),
        ("data show ../faces", "'../faces' names no dataset"),
        ("data show faces@9", "has no version 9"),
        ("detect nowhere.jpg", "nowhere.jpg is not there"),
        ("detect /", "/ is a folder"),
        ("submit train-gan dcgan-mnist-s4 --working-dir /nowhere", "/nowhere is no folder"),
        ("data list --storage gs://bucket", "is neither file:///absolute/folder nor s3://bucket/prefix"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_mistake_is_one_line_with_status_2(call: Call, words: str, says: str) -> None:
    assert says in mistake(call(*words.split()))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("data list", "stopped"),
        ("run ingest folder", "the same command continues"),
        ("run fit_ensemble demo", "fit_ensemble begins anew"),
    ],
    ids=["no job", "resumed", "not resumed"],
)
def test_an_interrupt_says_whether_a_job_goes_on(
    call: Call, monkeypatch: pytest.MonkeyPatch, words: str, says: str
) -> None:
    def interrupted(*_: object, **__: object) -> Workspace:
        raise KeyboardInterrupt

    monkeypatch.setattr(data_commands, "open_workspace", interrupted)
    for job in ("ingest", "fit-ensemble"):
        monkeypatch.setattr(jobs.load(job), "run", interrupted)
    status, out, err = call(*words.split())
    assert (status, out) == (130, "")
    assert says in err
    assert len(err.splitlines()) == 1


def test_jobs_that_are_said_to_go_on_exist() -> None:
    assert set(jobs.names()) >= command.RESUMED


def test_settings_that_are_no_text_are_refused(call: Call, tmp_path: Path) -> None:
    picture = draw(tmp_path / "a", 1) / "000.png"
    assert "is no text" in mistake(call("run", "ingest", "folder", "--settings", str(picture)))


def test_a_url_that_is_none_is_refused(call: Call, tmp_path: Path) -> None:
    picture = draw(tmp_path / "a", 1) / "000.png"
    assert "write http://host:port" in mistake(call("detect", str(picture), "--url", "nonsense"))


def test_a_version_cannot_be_written_to(call: Call, tmp_path: Path) -> None:
    draw(tmp_path / "in" / "real", 2)
    assert "names a version" in mistake(ingest(call, tmp_path / "in", "faces@3"))
    assert not (tmp_path / "runs").exists()


def test_pictures_without_a_label_are_refused_and_nothing_is_written(call: Call, tmp_path: Path) -> None:
    draw(tmp_path / "flat", 3)
    said = mistake(ingest(call, tmp_path / "flat", "flat"))
    assert "3 pictures" in said
    assert "--set source.fake=0 (real) or 1 (fake)" in said
    assert not [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    assert ingest(call, tmp_path / "flat", "flat", "--set", "source.fake=0")[0] == 0
    assert ingest(call, tmp_path / "flat", "unlabelled", "--set", "source.layout=flat")[0] == 0


def test_people_without_a_label_are_kept_with_a_word_about_it(call: Call, tmp_path: Path) -> None:
    for name in ("anna", "bob"):
        draw(tmp_path / "people" / name, 3)
    status, _, err = ingest(call, tmp_path / "people", "people")
    assert status == 0
    assert "6 of its pictures have no label" in err
    trained = call(
        "run", "train-detector", "mobilenetv2-demo", "--workers", "0", "--set", "data.uri=people",
        "--set", "validation=none",
    )  # fmt: skip
    assert "without a label; ingest them again with --set append=false" in mistake(trained)
    again = ingest(call, tmp_path / "people", "people", "--set", "append=false", "--set", "source.fake=0")
    assert "no label" not in again[2]


@pytest.mark.parametrize(
    ("job", "data"),
    [
        ("train-detector mobilenetv2-demo --workers 0", "data"),
        ("train-benford benford-demo", "data"),
        ("tune-detector detector-demo", "train.data"),
    ],
    ids=["detector", "benford", "search"],
)
def test_one_class_is_refused_before_anything_starts(call: Call, tmp_path: Path, job: str, data: str) -> None:
    draw(tmp_path / "in" / "real", 12)
    assert ingest(call, tmp_path / "in", "reals")[0] == 0
    said = mistake(call("run", *job.split(), "--set", f"{data}.uri=reals"))
    assert "real and 0 fake pictures" in said
    assert "counterfake run generate" in said
    assert not (tmp_path / "runs" / "mlflow.db").exists()


def test_a_split_that_does_not_exist_is_named(call: Call, tmp_path: Path) -> None:
    for kind in ("real", "fake"):
        draw(tmp_path / "in" / kind, 8)
    assert ingest(call, tmp_path / "in", "both")[0] == 0
    sets = ("--set", "data.uri=both", "--set", "data.split=trian")
    said = mistake(call("run", "train-detector", "mobilenetv2-demo", *sets))
    assert "no split 'trian'; it has train" in said


def test_an_mlflow_that_is_away_is_told_before_anything_is_trained(
    call: Call, tmp_path: Path, free_port: int
) -> None:
    for kind in ("real", "fake"):
        draw(tmp_path / "in" / kind, 8)
    assert ingest(call, tmp_path / "in", "both")[0] == 0
    sets = ("--set", "data.uri=both", "--set", "validation=none", "--set", "data.batch_size=4")
    away = f"http://127.0.0.1:{free_port}"
    words = ("run", "train-detector", "mobilenetv2-demo", "--workers", "0", "--tracking", away, *sets)
    status, out, err = call(*words)
    assert (status, out) == (2, "")
    *_, last = err.splitlines()
    assert last.startswith(f"error: MLflow at {away} does not answer")
    assert "start it with `mlflow server`, correct --tracking" in last
    assert err.count("error: ") == 1
    assert not list((tmp_path / "runs").rglob("*.safetensors"))


def test_weights_that_are_no_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / "w.pth").write_text("hello")
    with pytest.raises(CheckpointError, match="no PyTorch file of tensors; get the right file"):
        MobileNetV2Config(weights=str(tmp_path / "w.pth")).build()


def test_an_altered_shard_is_named_and_gives_status_1(call: Call, tmp_path: Path) -> None:
    draw(tmp_path / "in" / "real", 4)
    assert ingest(call, tmp_path / "in", "faces")[0] == 0
    shard = next((tmp_path / "runs" / "datasets" / "faces" / "shards").iterdir())
    shard.chmod(0o644)
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    status, out, err = call("data", "verify", "faces", "--json")
    assert (status, len(json.loads(out)["problems"]), err.count("error: ")) == (1, 1, 1)
    assert "restore it from a copy" in err


def test_a_broken_dataset_does_not_hide_the_others(call: Call, tmp_path: Path) -> None:
    draw(tmp_path / "in" / "real", 4)
    for name in ("good", "broken"):
        assert ingest(call, tmp_path / "in", name)[0] == 0
    manifest = tmp_path / "runs" / "datasets" / "broken" / "versions" / "000001.json"
    manifest.chmod(0o644)
    manifest.write_text(manifest.read_text().replace("CC0", "CC1"))
    status, out, err = call("data", "list", "--json")
    assert (status, [row["name"] for row in json.loads(out)]) == (1, ["good"])
    assert re.match(r"error: the manifest of .*broken@1 was altered", err)


def test_no_datasets_and_no_models_say_so(call: Call) -> None:
    status, out, err = call("data", "list", "--json")
    assert (status, json.loads(out)) == (0, [])
    assert "counterfake run ingest" in err
    assert "no model 'absent'" in mistake(call("models", "list", "absent"))
    assert "fit-ensemble" in mistake(call("models", "promote", "ensemble/1"))


def test_promoting_to_champion_asks_the_usual_gate(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    class Recorder:
        """A registry that refuses every promotion and remembers its gate."""

        def get(self, reference: str) -> SimpleNamespace:
            return SimpleNamespace(name="ensemble", version=1)

        def promote(self, name: str, version: int, *, alias: str, gate: Gate, expected: int | None) -> None:
            asked[alias], asked["expected"] = gate, expected
            raise ConfigError("refused")

        def rollback(self, name: str, *, alias: str, expected: int | None) -> None:
            asked["back"] = (name, alias, expected)
            raise ConfigError("refused")

    monkeypatch.setattr(command, "_registry", lambda *_: Recorder())
    call("models", "promote", "ensemble/1")
    call("models", "promote", "ensemble/1", "--alias", "shadow")
    assert (asked["champion"], asked["shadow"]) == (CHAMPION, Gate())
    call("models", "promote", "ensemble/1", "--set", "min_auc=none", "--expect", "3")
    assert asked["champion"] == dataclasses.replace(CHAMPION, min_auc=None)
    assert asked["expected"] == 3
    call("models", "rollback", "ensemble", "--expect", "2")
    assert asked["back"] == ("ensemble", "champion", 2)


def test_one_class_of_answers_says_how_many_of_each() -> None:
    scored = Scored(
        uri="faces@1", version=None, ids=["a", "b"], fake=np.array([0, 0]), groups={}, keys=[(), ()], videos=["", ""],
        probabilities={"d": np.array([0.1, 0.2])}, refused={"d": {}}, images_per_second=1.0,
    )  # fmt: skip
    with pytest.raises(DataError, match="of 2 labelled ones 2 could be answered, 2 real and 0 fake; choose"):
        scored.answered()


def test_a_home_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = open_store((tmp_path / "file" / "x").as_uri())
    for write in (store.put, store.put_if_absent):
        with pytest.raises(StorageError, match=r"cannot be made: .*; choose a place that can be written"):
            write("a", b"")


@pytest.mark.parametrize("name", ["faces", "faces@3", "a.b-c_1", "file:///data/faces", "s3://bucket/faces@2"])
def test_names_and_uris_are_datasets(name: str) -> None:
    assert Workspace.at("/w").dataset(name).endswith(name.rpartition("/")[2])


@pytest.mark.parametrize("name", ["", "../x", "a/b", "/abs", "@3", ".hidden"])
def test_anything_else_is_no_dataset(name: str) -> None:
    with pytest.raises(ConfigError, match="names no dataset"):
        Workspace.at("/w").dataset(name)


def test_json_has_no_nan(capsys: pytest.CaptureFixture[str]) -> None:
    Console(as_json=True).result({"a": float("nan"), "b": [float("inf"), 1.5], "c": {"d": (1, "x")}})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [None, 1.5], "c": {"d": [1, "x"]}}


def test_a_table_in_a_pipe_is_not_cut_off(capsys: pytest.CaptureFixture[str]) -> None:
    Console().table("t", ("path",), [("x" * 150,)])
    assert "x" * 150 in capsys.readouterr().out


def documented() -> list[str]:
    """Every `counterfake run …` and `submit …` of the README and of the jobs' docstrings."""
    texts = [(ROOT / "README.md").read_text(), *(jobs.load(name).__doc__ or "" for name in jobs.names())]
    lines = [line for text in texts for line in text.replace("\\\n", " ").splitlines()]
    found = (re.match(r"\s*counterfake ((?:run|submit) .*)", line) for line in lines)
    commands = {re.split(r"\s{3,}(?!--)|\s+#", match[1])[0].strip() for match in found if match}
    return sorted(commands - {"run JOB PRESET"})


@pytest.mark.parametrize("text", documented())
def test_documented_commands_parse(text: str) -> None:
    words = shlex.split(text)[1:]
    for option in ("--address", "--storage", "--tracking"):  # of submit
        if option in words:
            del words[words.index(option) : words.index(option) + 2]
    if "--settings" in words or "PRESET" in words:
        pytest.skip("names a file that a search writes")
    result = CliRunner().invoke(command.app, ["run", *words, "--print", "--json"])
    assert result.exception is None, f"counterfake {text}: {result.exception}"
    json.loads(result.stdout)
