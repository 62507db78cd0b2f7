"""The benchmark job: turns, medians, ratios, absent peers, and that ours and a peer do the same work."""

from __future__ import annotations

import dataclasses
import json
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import jobs
from counterfake.errors import ConfigError
from counterfake.workspace import Workspace
from jobs import benchmark
from jobs.benchmark import BenchmarkJob
from jobs.benchmarks import (
    detector,
    forensics,
    gan,
    gan_dense,
    harness,
    loader,
    process,
    scratch,
    serving,
    storage,
    training,
)
from jobs.benchmarks.harness import Contestant, ContestantFailed, Spec


def spec(**changes: Any) -> Spec:
    values: dict[str, Any] = {
        "benchmark": "gan",
        "contestant": "counterfake",
        "folder": "",
        "inputs": {},
        "batch_size": 8,
        "size": 28,
        "threads": 1,
        "precision": "fp32",
        "matmul": "highest",
        "seed": 0,
        "seconds": 0.01,
    }
    return Spec(**values | changes)


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Every process replaced by a table: ours 300/s, a limit of 400/s, one peer that fails in the second turn."""
    asked: list[tuple[str, str]] = []
    rates = {"counterfake": 300.0, "decode-only": 400.0, "torch-image-folder": 150.0, "litdata": 100.0}

    def run_process(order: Spec, action: str, *python: Path) -> dict[str, Any]:
        asked.append((order.contestant, action))
        if order.contestant == "webdataset" and order.seed == 1:
            raise ContestantFailed("out of memory")
        return {"rate": rates.get(order.contestant, 50.0), "per_cpu_second": None, "facts": {}}

    monkeypatch.setattr(harness, "run_process", run_process)
    monkeypatch.setattr(loader, "setting_up", lambda job, folder, console: {})
    monkeypatch.setattr(scratch, "python_with", _install_all_but_mosaicml)
    return asked


def _install_all_but_mosaicml(packages: tuple[str, ...], root: Path) -> Path:
    if packages == ("mosaicml-streaming",):
        raise ContestantFailed("cannot be installed: no matching distribution")
    return Path("python")


def test_the_benchmarks_are_presets_of_one_job_and_their_folder_is_none() -> None:
    assert list(benchmark.PRESETS) == [
        "loader",
        "storage",
        "gan",
        "gan_dense",
        "swap",
        "autoencoder",
        "training",
        "detector",
        "serving",
        "inference",
        "forensics",
        "growth",
    ]
    assert "benchmark" in jobs.names()
    assert "benchmarks" not in jobs.names()


@pytest.mark.parametrize("name", benchmark.PRESETS)
def test_a_preset_is_the_benchmark_of_its_name(name: str) -> None:
    assert jobs.preset(benchmark, name).name == name


def test_an_unknown_peer_is_named_with_those_there_are(workspace: Workspace) -> None:
    job = dataclasses.replace(benchmark.loader(), peers=("keras",))
    with pytest.raises(ConfigError, match="no peer 'keras' here; peers are torch-image-folder, litdata"):
        benchmark.run(job, workspace)


def test_a_batch_larger_than_the_input_is_refused() -> None:
    with pytest.raises(ConfigError, match="batch_size 64 is more than the 8 pictures"):
        BenchmarkJob(name="serving", pictures=8, size=224, batch_size=64)


def test_figures_are_ratios_and_an_absent_peer_is_null_with_its_reason(
    answers: list[tuple[str, str]], workspace: Workspace
) -> None:
    result = benchmark.run(dataclasses.replace(benchmark.loader(), repeats=2), workspace)
    assert (result["ours"], result["limit"], result["unit"]) == (300, 400, "pictures/s")
    assert (result["ratio_to_best_peer"], result["ratio_to_limit"]) == (2.0, 0.75)
    assert result["peers"]["mosaicml-streaming"] is None
    assert result["peers"]["webdataset"] is None
    assert result["absent"] == {
        "mosaicml-streaming": "cannot be installed: no matching distribution",
        "webdataset": "out of memory",
    }
    assert result["settings"]["batch_size"] == 256
    assert {"cpu", "cores", "load", "torch"} <= set(result["machine"])
    assert json.loads(json.dumps(result)) == result


def test_only_the_chosen_peers_take_part(answers: list[tuple[str, str]], workspace: Workspace) -> None:
    job = dataclasses.replace(benchmark.loader(), peers=("litdata",), repeats=1)
    assert list(benchmark.run(job, workspace)["peers"]) == ["litdata"]
    assert answers == [
        ("litdata", "write"),
        ("counterfake", "measure"),
        ("litdata", "measure"),
        ("decode-only", "measure"),
    ]


def test_our_own_failure_is_no_absence(monkeypatch: pytest.MonkeyPatch, workspace: Workspace) -> None:
    def run_process(order: Spec, action: str, *python: Path) -> dict[str, Any]:
        raise ContestantFailed("broken")

    monkeypatch.setattr(harness, "run_process", run_process)
    monkeypatch.setattr(forensics, "setting_up", lambda job, folder, console: {})
    with pytest.raises(ContestantFailed, match="broken"):
        benchmark.run(benchmark.forensics(), workspace)


def test_turns_go_forth_and_back_so_that_drift_favours_nobody() -> None:
    order: list[tuple[str, int]] = []
    harness.interleaved(
        ["a", "b"], 2, lambda name, repeat: order.append((name, repeat)) or {}, lambda _: None
    )
    assert order == [("a", 0), ("b", 0), ("b", 1), ("a", 1)]


def test_medians_ignore_one_slow_turn_and_turns_without_a_figure() -> None:
    assert harness.median([{"rate": 10.0}, {"rate": 1.0}, {"rate": 11.0}, {}]) == 10
    assert harness.median([{}]) is None


def test_the_clock_runs_over_whole_rounds_after_the_warm_up() -> None:
    rounds: list[int] = []
    found = process.timed(Contestant(lambda: rounds.append(7) or 7, warmup=2), seconds=0.0)
    assert len(rounds) == 3
    assert found["rate"] > 0


def test_processor_time_grows_while_we_work() -> None:
    before = process.cpu_seconds()
    matrix = np.ones((400, 400))
    for _ in range(60):
        matrix = matrix @ matrix / 400
    assert process.cpu_seconds() > before


def test_a_peer_without_its_package_says_so_in_one_line(tmp_path: Path) -> None:
    order = spec(benchmark="serving", contestant="onnxruntime", inputs={"onnx": str(tmp_path / "none.onnx")})
    with pytest.raises(ContestantFailed, match=r"^onnx is not installed, so the network cannot be exported$"):
        harness.run_process(order, "measure")


def test_a_scratch_environment_sees_the_packages_of_this_one(tmp_path: Path) -> None:
    python = scratch.python_with(("numpy",), tmp_path)
    assert python == scratch.python_with(("numpy",), tmp_path)
    assert not list(python.parent.parent.rglob("site-packages/numpy")), "numpy was installed a second time"


def test_a_package_that_does_not_exist_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ContestantFailed, match="cannot be installed: "):
        scratch.python_with(("no/such folder",), tmp_path)


def test_the_loader_benchmark_measures_real_batches(workspace: Workspace) -> None:
    job = BenchmarkJob(
        name="loader",
        pictures=64,
        size=32,
        batch_size=16,
        repeats=1,
        seconds=0.05,
        peers=("torch-image-folder",),
    )
    result = benchmark.run(job, workspace)
    assert result["absent"] == {}
    assert min(result["ours"], result["limit"], result["peers"]["torch-image-folder"]) > 0
    assert result["batch"] == [16, 3, 32, 32]
    assert 0 < result["first_batch_s"] < 60
    assert len(result["resident_mib"]) == loader.EPOCHS


def test_the_storage_benchmark_holds_cold_and_cached_against_local_files_and_plain_requests(
    workspace: Workspace,
) -> None:
    job = BenchmarkJob(
        name="storage", pictures=64, size=32, batch_size=16, repeats=1, seconds=0.05, peers=("local",)
    )
    result = benchmark.run(job, workspace)
    assert result["absent"] == {}
    assert set(result["comparisons"]) == set(storage.COMPARISONS)
    assert result["comparisons"]["warm_to_local"] is None, "not asked for"
    assert result["comparisons"]["cold_to_ranged_get"] > 0
    assert result["comparisons"]["cold_to_slower_of_decoding_and_get"] > 0


def test_our_gan_step_and_the_plain_one_lose_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gan, "LOSS_STEPS", 4)
    job = types.SimpleNamespace(pictures=32, size=28)
    inputs = gan.setting_up(job, tmp_path, None)
    facts: dict[str, list[dict[str, Any]]] = {}
    for name in ("counterfake", "torch-eager"):
        runs = [gan.CONTESTANTS[name](spec(inputs=inputs, seed=seed)) for seed in (0, 1)]
        facts[name] = [run.facts() for run in runs]
    found = gan.conclusions(facts)
    assert found["losses_agree"] == {"torch-eager": True}
    assert found["matmul_error"] < 1e-5


def test_the_dense_gan_and_the_plain_one_lose_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gan, "LOSS_STEPS", 4)
    inputs = gan_dense.setting_up(types.SimpleNamespace(pictures=32, size=28), tmp_path, None)
    facts: dict[str, list[dict[str, Any]]] = {}
    for name in ("counterfake", "torch-eager"):
        runs = [gan_dense.CONTESTANTS[name](spec(inputs=inputs, seed=seed)) for seed in (0, 1)]
        facts[name] = [run.facts() for run in runs]
    assert gan_dense.conclusions(facts)["losses_agree"] == {"torch-eager": True}


def test_rates_count_from_the_first_tick_to_the_last() -> None:
    seen = [(100.0, 50.0, 64), (104.0, 51.0, 128), (108.0, 54.0, 192)]
    found = training.between(seen)
    assert found == {"rate": 16.0, "per_cpu_second": 32.0, "facts": {"ticks": 2, "seconds": 8.0}}


@pytest.mark.parametrize(("module", "size"), [(training, 28), (detector, 32)], ids=["gan", "detector"])
def test_a_job_through_the_platform_is_held_against_its_bare_steps(
    module: types.ModuleType, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "TICK_STEPS", 1)
    inputs = module.setting_up(types.SimpleNamespace(pictures=16, size=size), tmp_path, None)
    order = spec(benchmark="training", inputs=inputs, batch_size=8, size=size)
    job = module.train_job(order, 0)  # in this process: Ray is started by the tests of the cluster
    platform = process.timed(training.through_platform(job, dataclasses.replace(order, seconds=0)), 0)
    assert platform["facts"]["ticks"] == 1
    bare = process.timed(module.CONTESTANTS["bare"](order), 0)
    assert min(platform["rate"], bare["rate"]) > 0


def test_a_benchmark_with_a_part_for_gpus_refuses_where_there_is_none(workspace: Workspace) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    with pytest.raises(ConfigError, match="there is no CUDA device here"):
        benchmark.run(dataclasses.replace(benchmark.gan(), gpu=True), workspace)
    with pytest.raises(ConfigError, match="'loader' has no part for a GPU"):
        benchmark.run(dataclasses.replace(benchmark.loader(), gpu=True), workspace)


def test_losses_that_differ_by_more_than_the_seeds_do_are_told() -> None:
    def runs(*values: float) -> list[dict[str, float]]:
        return [{"d_loss": value} for value in values]

    assert gan.agree(runs(1.0, 1.02), runs(1.01, 1.03))
    assert not gan.agree(runs(1.0, 1.01), runs(2.0, 2.01))


def test_the_served_network_and_the_plain_one_answer_alike(tmp_path: Path) -> None:
    job = types.SimpleNamespace(pictures=4, size=64)
    inputs = serving.setting_up(job, tmp_path, None)
    order = spec(inputs=inputs, size=64, batch_size=4)
    facts = {name: [serving.CONTESTANTS[name](order).facts()] for name in ("counterfake", "torch-eager")}
    found = serving.conclusions(facts)
    assert found["probability_differences"]["counterfake"] < 1e-4
    assert np.ptp(facts["counterfake"][0]["probabilities"]) > 1e-3, "every picture gets the same answer"
    assert found["batch_of_1"]["ratios"]["torch-eager"] > 0


@pytest.mark.parametrize(("base", "expected"), [(10, [1, 9, 1, 1, 2]), (20, [1, 9, 10, 6, 13])])
def test_first_digits_of_the_reference(base: int, expected: list[int]) -> None:
    magnitudes = np.array([0, 1, 9, 10, 123, 263])
    assert forensics.first_digits(magnitudes, base).tolist() == expected


def test_the_reference_measures_what_the_detector_does() -> None:
    from counterfake.forensics import benford

    rng = np.random.default_rng(0)
    magnitudes = np.round(np.exp(rng.exponential(1.5, 4000))).astype(np.int64)
    digits = forensics.first_digits(magnitudes, 10)
    counts = np.bincount(digits, minlength=10)[None, 1:].astype(np.float32)
    found = benford._divergences(counts, 10)[0][0]
    np.testing.assert_allclose(forensics._divergences(digits, 10), found, rtol=0.05, atol=2e-3)
