"""The benchmark's steps as CUDA graphs, on a real device."""

from __future__ import annotations

import pytest
import torch

from jobs.benchmarks import gpu, gpu_cases

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, torch finds none"),
]


def test_a_short_case_reports_its_share_of_the_limits() -> None:
    found = gpu.run("gan", only="dcgan-mnist", seconds=0.5, tell=lambda _: None)
    case = found["cases"]["dcgan-mnist"]
    assert case["images_per_second"] > 1000
    assert 0 < case["share_of_peak"] < 1
    assert found["matrix_tflops"] > 1


@pytest.mark.parametrize(
    "name", ["sngan-128", "swap-64", "mobilenetv2-224-training", "xception-299-inference"]
)
def test_a_replayed_graph_goes_on_training(name: str) -> None:
    case = next(cases[name] for cases in gpu_cases.SUITES.values() if name in cases)
    ready = case.tiny(torch.device("cuda"))
    replay = gpu.captured(ready.step)
    before = [p.detach().clone() for net in ready.nets for p in net.parameters()]
    replay()
    torch.cuda.synchronize()
    after = [p.detach() for net in ready.nets for p in net.parameters()]
    assert all(p.isfinite().all() for p in after)
    moved = any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert moved == ("inference" not in name)
