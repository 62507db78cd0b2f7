"""Model versions in a real SQLite-backed MLflow, with bundles on a real file store."""

from __future__ import annotations

import dataclasses
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from counterfake import bundle, tracking
from counterfake.errors import CheckpointError, ConfigError, GateError, RegistryError, TrackingError
from counterfake.gate import CHAMPION, Gate
from counterfake.nets import NetConfig
from counterfake.registry import ModelVersion, Registry
from counterfake.tracking import Tracker

OPEN = Gate()  # asks nothing


@dataclasses.dataclass(frozen=True, kw_only=True)
class RegistryLineConfig(NetConfig):
    """A net of three numbers."""

    def build(self) -> torch.nn.Module:
        return torch.nn.Linear(2, 1)

    @classmethod
    def tiny(cls) -> RegistryLineConfig:
        return cls()


def figures(auc: float, worst: float | None = None) -> dict[str, Any]:
    return {
        "auc": {"value": auc, "low": auc - 0.1, "high": min(1.0, auc + 0.1)},
        "recall_real": {"value": 0.8, "low": 0.7, "high": 0.9},
        "ece": {"value": 0.05, "low": 0.02, "high": 0.09},
        "n_real": 40,
        "n_fake": 60,
        "groups": {},
        "worst_group": None
        if worst is None
        else {"group": "maker", "name": "swap@2", "n": 20, "auc": {"value": worst}},
    }


def made(folder: Path, weight: float, evaluation: dict[str, Any] | None = None) -> Path:
    net = torch.nn.Linear(2, 1)
    torch.nn.init.constant_(net.weight, weight)
    torch.nn.init.zeros_(net.bias)
    provenance = {"dataset": {"uri": "file:///data/faces", "version": 3, "digest": "ab"}, "commit": "c0ffee"}
    return bundle.write_nets(
        folder / f"bundle-{weight}",
        kind="detector",
        name="line",
        nets={"detector": (RegistryLineConfig(), net.state_dict())},
        preprocess={"size": 2},
        provenance=provenance,
        evaluation=evaluation,
    ).folder


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    home = tmp_path_factory.mktemp("registry")
    return Registry(f"sqlite:///{home}/mlflow.db", (home / "bundles").as_uri(), (home / "artifacts").as_uri())


@pytest.fixture
def three(registry: Registry, tmp_path: Path, request: pytest.FixtureRequest) -> str:
    """A model of three versions with AUC 0.6, 0.8, 0.9."""
    name = request.node.name.partition("[")[0][-60:]
    for i, auc in enumerate((0.6, 0.8, 0.9)):
        registry.register(made(tmp_path, float(i), figures(auc, worst=auc - 0.2)), name)
    return name


def test_a_version_carries_its_lineage(registry: Registry, tmp_path: Path) -> None:
    run = Tracker(registry.tracking_uri, registry.artifacts).start("detector", "line")
    run.finish()
    version = registry.register(
        made(tmp_path, 5.0, figures(0.9)), "lineage", run_id=run.id, tags={"preset": "tiny"}
    )
    assert (version.name, version.version, version.run_id, version.aliases) == ("lineage", 1, run.id, ())
    assert version.tags["dataset"] == "file:///data/faces@3"
    assert version.tags["dataset_digest"] == "ab"
    assert version.tags["commit"] == "c0ffee"
    assert version.tags["auc"] == "0.9000"
    assert version.tags["preset"] == "tiny"
    assert version.bundle_uri == f"{registry.bundles_uri}/{version.digest}"


def test_the_same_bundle_twice_is_one_version(registry: Registry, tmp_path: Path) -> None:
    folder = made(tmp_path, 7.0)
    assert registry.register(folder, "twice") == registry.register(folder, "twice")
    assert [v.version for v in registry.list("twice")] == [1]


def test_a_version_is_found_by_alias_number_and_name(registry: Registry, three: str) -> None:
    registry.promote(three, 2, gate=OPEN)
    assert registry.get(f"{three}@champion").version == 2
    assert registry.get(f"models:/{three}@champion").version == 2
    assert registry.get(f"{three}/1").version == 1
    assert registry.get(three).version == 3
    assert registry.get(f"{three}/2").aliases == ("champion",)
    assert three in {v.name for v in registry.list()}


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("{}@shadow", "no alias @shadow; versions: 1, 2, 3"),
        ("{}/9", "no version 9"),
        ("nobody", "no model 'nobody'"),
        ("a b", "names no model"),
    ],
    ids=["alias", "version", "name", "syntax"],
)
def test_what_does_not_exist_is_told_with_what_does(
    registry: Registry, three: str, reference: str, message: str
) -> None:
    with pytest.raises(RegistryError, match=message):
        registry.get(reference.format(three))


def test_the_fetched_bundle_is_the_registered_one(registry: Registry, three: str, tmp_path: Path) -> None:
    folder = registry.fetch(f"{three}/2", tmp_path / "cache")
    assert bundle.read(folder).digest == registry.get(f"{three}/2").digest
    (folder / "weights.safetensors").write_bytes(b"altered")
    again = registry.fetch(f"{three}/2", tmp_path / "cache")  # a damaged cache heals
    assert bundle.read(again).digest == registry.get(f"{three}/2").digest


def test_a_bundle_altered_in_storage_is_never_served(registry: Registry, three: str, tmp_path: Path) -> None:
    version = registry.get(three)
    stored = Path(version.bundle_uri.removeprefix("file://")) / "evaluation.json"
    good = stored.read_bytes()
    stored.write_bytes(good.replace(b"0.9", b"0.8"))
    with pytest.raises(CheckpointError, match=r"evaluation\.json was altered"):
        registry.fetch(three, tmp_path / "cache")
    stored.write_bytes(good)


def test_an_alias_is_fetched_while_mlflow_is_away(
    registry: Registry, three: str, tmp_path: Path, free_port: int
) -> None:
    registry.promote(three, 2, gate=OPEN)
    away = Registry(f"http://127.0.0.1:{free_port}", registry.bundles_uri)
    folder = away.fetch(f"{three}@champion", tmp_path / "cache")
    assert bundle.read(folder).digest == registry.get(f"{three}/2").digest
    with pytest.raises(TrackingError, match="does not answer"):
        away.fetch(f"{three}/2", tmp_path / "cache")


def test_a_gate_names_every_failed_condition_with_both_numbers(registry: Registry, three: str) -> None:
    gate = Gate(min_auc=0.7, min_worst_group_auc=0.5, min_recall_real=0.75, max_ece=0.01, max_latency_ms=50)
    with pytest.raises(GateError) as caught:
        registry.promote(three, 1, gate=gate)
    message = str(caught.value)
    assert "auc is 0.6, must be at least 0.7" in message
    assert "worst_group_auc is 0.4, must be at least 0.5" in message
    assert "ece is 0.05, must be at most 0.01" in message
    assert "latency_ms was not measured" in message
    assert "recall_real" not in message
    with pytest.raises(RegistryError, match="no alias @champion"):
        registry.get(f"{three}@champion")


def test_a_gate_may_ask_the_pessimistic_end_of_the_interval() -> None:
    assert Gate(min_auc=0.85).check(figures(0.9)) == []
    assert Gate(min_auc=0.85, interval=True).check(figures(0.9)) == [
        "auc is 0.8 (low end of its interval), must be at least 0.85"
    ]
    assert Gate(min_rows=50).check(figures(0.9)) == ["rows is 40, must be at least 50"]
    assert Gate(min_auc=0.5).check(None) == ["the bundle has no evaluation.json; evaluate it first"]
    assert Gate().check(None) == []


def test_a_bound_if_measured_passes_a_missing_figure_and_holds_a_measured_one() -> None:
    gate = Gate(min_auc=0.5, if_measured={"max_latency_ms": 100.0, "min_worst_group_auc": 0.6})
    assert gate.check(figures(0.9)) == []
    slow = {**figures(0.9, worst=0.5), "latency_ms": 250.0}
    assert gate.check(slow) == [
        "latency_ms is 250, must be at most 100",
        "worst_group_auc is 0.5, must be at least 0.6",
    ]
    asked = dataclasses.replace(gate, max_latency_ms=300.0)
    assert len(asked.check(slow)) == 1
    assert "latency_ms was not measured" in asked.check(figures(0.9))[0]
    with pytest.raises(ConfigError, match="no bound 'min_luck'"):
        Gate(if_measured={"min_luck": 1.0})


def test_the_champions_gate_covers_group_damage_calibration_and_latency() -> None:
    good = {
        **figures(0.9, worst=0.7), "latency_ms": 40.0,
        "robustness": {"worst": {"cell": "jpeg 30", "auc": {"value": 0.6}}},
    }  # fmt: skip
    assert CHAMPION.check(good) == []
    assert CHAMPION.check(figures(0.9)) == []
    bad: list[tuple[str, dict[str, Any]]] = [
        ("worst_group_auc", figures(0.9, worst=0.5)),
        ("robustness_auc", {"robustness": {"worst": {"auc": {"value": 0.5}}}}),
        ("ece", {"ece": {"value": 0.3}}),
        ("latency_ms", {"latency_ms": 9_000.0}),
        ("recall_real", {"recall_real": {"value": 0.6}}),
    ]
    for name, change in bad:
        (line,) = CHAMPION.check({**good, **change})
        assert line.startswith(f"{name} is ")


def test_commercial_use_is_refused_where_a_licence_or_consent_rules_it_out() -> None:
    gate = Gate(licence="commercial")
    fine = {"a": {"licence": "CC-BY-4.0", "consent": "subjects"}, "b": {"licence": "MIT", "consent": "none"}}
    assert gate.check(None, sources=fine) == []
    for licence, consent, why in (
        ("CC-BY-NC-SA-4.0", "none", "says 'NC'"),
        ("model output; trained on research only", "synthetic", "says 'research'"),
        ("non-commercial", "none", "says 'non-commercial'"),
        ("", "none", "is not stated"),
        ("unstated", "none", "is not stated"),
        ("CC-BY-4.0", "research", "consent of source 'c' is 'research'"),
    ):
        (line,) = gate.check(None, sources={**fine, "c": {"licence": licence, "consent": consent}})
        assert why in line
    assert "does not record" in gate.check(None, sources={})[0]
    assert Gate().check(None, sources={}) == []


def test_a_promotion_reads_the_licences_of_the_bundle(registry: Registry, three: str) -> None:
    with pytest.raises(GateError, match="does not record the sources"):
        registry.promote(three, 3, gate=Gate(licence="commercial"))


def test_without_a_gate_the_champions_own_is_asked_and_other_aliases_ask_nothing(
    registry: Registry, three: str
) -> None:
    with pytest.raises(GateError, match=r"auc is 0.6, must be at least 0.75"):
        registry.promote(three, 1)
    assert registry.promote(three, 1, "challenger").aliases == ("challenger",)
    assert registry.promote(three, 3).aliases == ("champion",)  # AUC 0.9, worst group 0.7


def test_a_worse_model_does_not_follow_a_better_one(registry: Registry, three: str) -> None:
    gate = Gate(max_auc_drop=0.02)
    registry.promote(three, 3, gate=gate)
    with pytest.raises(GateError, match=r"auc is 0.8, must be at least 0.88"):
        registry.promote(three, 2, gate=gate)
    assert registry.get(f"{three}@champion").version == 3


def test_a_drop_is_told_only_between_figures_of_one_split() -> None:
    before = {**figures(0.9), "dataset": {"uri": "s3://b/faces", "digest": "a" * 64}, "split": "test"}
    same, other = {**before, **figures(0.89)}, {**before, **figures(0.99), "split": "train"}
    assert Gate(max_auc_drop=0.02).check(same, before) == []
    (line,) = Gate(max_auc_drop=0.02).check(other, before)
    assert "split train" in line
    assert "split test" in line


def test_rollback_walks_back_through_what_was_champion(registry: Registry, three: str) -> None:
    for version in (1, 2, 3):
        registry.promote(three, version, gate=OPEN)
    assert registry.rollback(three).version == 2
    assert registry.rollback(three).version == 1
    with pytest.raises(RegistryError, match="no earlier version"):
        registry.rollback(three)
    with pytest.raises(RegistryError, match=r"is version 1, not 3 as expected.*roll back again"):
        registry.rollback(three, expected=3)
    assert [record["version"] for record in registry.promotions(three)] == [1, 2, 3, 2, 1]


def test_of_two_promotions_that_expect_the_same_one_wins(registry: Registry, three: str) -> None:
    def attempt(version: int, now: int, barrier: threading.Barrier) -> ModelVersion | RegistryError:
        barrier.wait()
        try:
            return registry.promote(three, version, gate=OPEN, expected=now)
        except RegistryError as error:
            return error

    now = registry.promote(three, 1, gate=OPEN).version
    with ThreadPoolExecutor(2) as pool:
        for _ in range(25):
            barrier, others = threading.Barrier(2), [v for v in (1, 2, 3) if v != now]
            outcome = list(pool.map(attempt, others, (now, now), (barrier, barrier)))
            lost = [o for o in outcome if isinstance(o, RegistryError)]
            won = [o for o in outcome if isinstance(o, ModelVersion)]
            assert (len(lost), len(won)) == (1, 1)
            assert "somebody" in str(lost[0])
            now = registry.get(f"{three}@champion").version
            assert now == won[0].version


def test_bundles_and_promotions_live_on_object_storage(registry: Registry, tmp_path: Path, s3: Any) -> None:
    remote = Registry(registry.tracking_uri, f"{s3.uri}/bundles", registry.artifacts)
    for weight in (1.0, 2.0):
        remote.register(made(tmp_path, weight, figures(0.9)), "on-s3")
    remote.promote("on-s3", 1, gate=Gate(min_auc=0.8))
    with pytest.raises(RegistryError, match="version 1, not none as expected"):
        remote.promote("on-s3", 2, expected=0)
    folder = remote.fetch("on-s3@champion", tmp_path / "cache")
    assert bundle.read(folder).digest == remote.get("on-s3/1").digest


def test_an_alias_moved_by_hand_is_repaired_by_the_next_promotion(registry: Registry, three: str) -> None:
    registry.promote(three, 1, gate=OPEN)
    tracking.connect(registry.tracking_uri).set_registered_model_alias(three, "champion", "3")
    assert registry.get(f"{three}@champion").version == 3
    assert registry.promote(three, 2, gate=OPEN).aliases == ("champion",)


def test_no_artefact_of_a_version_is_a_pickle(registry: Registry, three: str) -> None:
    home = Path(registry.artifacts.removeprefix("file://"))  # type: ignore[union-attr]
    files = [path for path in home.rglob("*") if path.is_file()]
    assert any(path.name == "MLmodel" for path in files)
    assert {path.suffix for path in files} <= {
        "",
        ".py",
        ".yaml",
        ".txt",
        ".json",
        ".safetensors",
        ".md",
        ".png",
    }
    assert not [
        path
        for path in files
        if path.read_bytes()[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
    ]


@pytest.mark.parametrize("name", ["", "a/b", "..", "a b", "x@y"])
def test_a_name_that_is_no_name_is_refused(registry: Registry, tmp_path: Path, name: str) -> None:
    with pytest.raises(RegistryError, match="must be letters"):
        registry.register(tmp_path, name)


def test_the_registered_pyfunc_gives_the_predictors_probabilities(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow
    import numpy as np

    from counterfake import media, predictor
    from counterfake.images import Preprocess
    from counterfake.nets.mobilenetv2 import MobileNetV2Config

    config = MobileNetV2Config.tiny()
    folder = bundle.write_nets(
        tmp_path / "detector",
        kind="detector",
        name="tiny",
        nets={"detector": (config, config.build().state_dict())},
        preprocess=Preprocess(size=32),
        provenance={},
    ).folder
    registry.register(folder, "pyfunc")
    registry.promote("pyfunc", 1, gate=OPEN)
    noise = np.random.default_rng(0).integers(0, 255, (2, 40, 40, 3), dtype=np.uint8)
    pictures = [media.encode(pixels, "png") for pixels in noise]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", registry.tracking_uri)
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", registry.tracking_uri)
    loaded = mlflow.pyfunc.load_model("models:/pyfunc@champion")
    assert loaded.predict(pictures) == pytest.approx(predictor.load(folder).predict_bytes(pictures), abs=1e-6)
    assert json.loads(json.dumps(loaded.metadata.metadata))["kind"] == "detector"


def test_a_registered_generator_paints_one_picture_per_seed(registry: Registry, tmp_path: Path) -> None:
    from counterfake import media
    from counterfake.images import Preprocess
    from counterfake.nets.dcgan import DcganGenerator
    from counterfake.registry import opened

    config = DcganGenerator.tiny()
    nets = {"generator": (config, config.build().state_dict())}
    folder = bundle.write_nets(
        tmp_path / "g", kind="generator", name="tiny", nets=nets, preprocess=Preprocess(), provenance={}
    ).folder
    registry.register(folder, "generator")
    paint = opened(folder)
    first, second = paint([1, 2])
    assert media.sniff(first) == "png"
    assert paint([1]) == [first]
    assert first != second


def test_of_a_conditional_generator_the_seed_draws_the_class_and_a_key_signs(
    registry: Registry, tmp_path: Path, credentials: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow.pyfunc
    import numpy as np

    from counterfake import media, provenance
    from counterfake.images import Preprocess
    from counterfake.nets.dcgan import DcganGenerator
    from counterfake.registry import _paint, opened

    class Told(torch.nn.Module):
        """Paints the class it is asked for as grey."""

        def forward(self, noise: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
            return (classes.float() / 2 - 1)[:, None, None, None].expand(-1, 3, 4, 4)

    config = dataclasses.replace(DcganGenerator.tiny(), classes=4)
    nets = {"generator": (config, config.build().state_dict())}
    folder = bundle.write_nets(
        tmp_path / "g", kind="generator", name="tiny", nets=nets, preprocess=Preprocess(), provenance={}
    ).folder
    files = credentials()
    paint = opened(folder, provenance.Signing(certificate=files.certificate, key=files.key))
    found = provenance.read(paint([1])[0])
    assert (found.c2pa_state, found.digital_source_type) == ("Valid", "trainedAlgorithmicMedia")
    registry.register(folder, "told")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", registry.tracking_uri)
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", registry.tracking_uri)
    monkeypatch.setenv("COUNTERFAKE_C2PA_CERT", files.certificate)
    monkeypatch.setenv("COUNTERFAKE_C2PA_KEY", files.key)
    served = mlflow.pyfunc.load_model("models:/told/1").predict([1, 2])  # what `mlflow models serve` answers
    assert [provenance.read(data).c2pa_state for data in served] == ["Valid", "Valid"]
    unsigned = opened(folder)
    assert unsigned([7]) == unsigned([3, 7])[1:]  # a seed means the same picture in any company
    drawn = [
        int(media.decode_trusted(png)[0, 0, 0])
        for png in _paint(bundle.read(folder), Told(), None, range(400))
    ]
    shares = np.unique(drawn, return_counts=True)[1] / 400
    assert len(shares) == 4
    assert ((shares > 0.17) & (shares < 0.33)).all()
