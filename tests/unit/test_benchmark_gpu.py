"""The steps that a GPU is measured with, dry on the CPU: that they run, count rightly and train as the learners do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from counterfake import images
from counterfake.data import Batch
from counterfake.errors import ConfigError
from counterfake.learners import LearnerContext
from counterfake.learners.gan import GanConfig
from counterfake.nets.dcgan import DcganDiscriminator, DcganGenerator
from jobs.benchmarks import gpu, gpu_cases

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
TORCH_ALONE = """
import sys
absent = "ray mlflow pyarrow boto3 safetensors PIL simplejpeg av cv2 sklearn scipy yaml typer rich pydantic".split()
sys.modules.update(dict.fromkeys(absent))
from jobs.benchmarks import gpu
sys.exit(gpu.main(["swap", "--device", "cpu", "--only", "swap-64"]))
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_without_a_cuda_device_one_line_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["gan"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: there is no CUDA device here; ")
    assert error.count("\n") == 1


def test_unknown_suites_and_cases_name_those_there_are() -> None:
    with pytest.raises(
        ConfigError, match="'serving' has no part for a GPU; those that have are gan, swap, detector"
    ):
        gpu.run("serving")
    with pytest.raises(ConfigError, match="swap has no case 'swap-63'; it has swap-64"):
        gpu.run("swap", only="swap-63")


@pytest.mark.parametrize(
    ("suite", "name"),
    [
        (suite, name)
        for suite, cases in gpu_cases.SUITES.items()
        for name in cases
        if "-inference" not in name
    ],
)
def test_every_training_step_moves_all_its_networks(suite: str, name: str) -> None:
    ready = gpu_cases.SUITES[suite][name].tiny(CPU)
    before = [[p.detach().clone() for p in net.parameters()] for net in ready.nets]
    ready.step()
    for net, weights in zip(ready.nets, before, strict=True):
        assert any(not torch.equal(p, w) for p, w in zip(net.parameters(), weights, strict=True)), type(net)
        assert all(p.isfinite().all() for p in net.parameters())


def test_inference_leaves_the_network_alone_and_is_counted() -> None:
    found = gpu.run("detector", "cpu", only="mobilenetv2-224-inference", tell=lambda _: None)
    case = found["cases"]["mobilenetv2-224-inference"]
    assert min(case["images_per_second"], case["share_of_peak"], case["share_of_bandwidth"]) > 0
    assert case["ratio_to_goal"] is None, "a dry run says nothing about a goal"


def test_flops_and_bytes_of_a_product_are_those_of_the_formula() -> None:
    a, b = torch.ones(3, 5), torch.ones(5, 7)
    flops, moved = gpu.counted(gpu_cases.Ready(lambda: torch.mm(a, b).t()[0], 1))
    assert flops == 2 * 3 * 5 * 7
    assert moved == 4 * (3 * 5 + 5 * 7 + 3 * 7)


def test_rows_drawn_from_a_pool_are_counted_not_the_pool() -> None:
    pool, rows = torch.zeros(1000, 10), torch.tensor([1, 2])
    assert gpu.counted(gpu_cases.Ready(lambda: pool[rows], 2))[1] == 4 * 2 * (2 * 10)


def test_the_step_moves_the_weights_as_the_learner_does() -> None:
    made, read = DcganGenerator.tiny(), DcganDiscriminator(width=2, dropout=0.0)
    pixels = torch.randint(0, 256, (6, 1, 28, 28), dtype=torch.uint8)
    noise = torch.randn(6, made.noise_size)
    context = LearnerContext(batch_size=6, images_per_epoch=6, total_images=60, channels=1, size=28)
    learner = GanConfig(generator=made, discriminator=read).build(device=CPU, context=context)
    learner._noise = lambda rows, source=None: noise
    ready = gpu_cases.shared_pass_gan(made, read, 6, CPU, given=lambda: (images.to_float(pixels), noise))
    ours = (learner.generator, learner.discriminator)
    for net, copy in zip(ours, ready.nets, strict=True):
        copy.load_state_dict(net.state_dict())
    unknown = torch.full((6,), -1)
    batch = Batch(images=pixels, fake=unknown, class_id=unknown, identity=unknown, maker=unknown, ids=[""] * 6, step=0, epoch=0)  # fmt: skip
    for _ in range(2):
        learner.step(batch)
        ready.step()
    for net, copy in zip(ours, ready.nets, strict=True):
        for weight, other in zip(net.parameters(), copy.parameters(), strict=True):
            torch.testing.assert_close(weight, other, rtol=1e-4, atol=1e-6)


def test_it_runs_where_there_is_only_torch() -> None:
    done = subprocess.run(
        [sys.executable, "-c", TORCH_ALONE],
        env={"PYTHONPATH": f"{ROOT / 'platform'}:{ROOT}", "OMP_NUM_THREADS": "1", "PATH": ""},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr.strip().splitlines()[-1]
    assert '"swap-64"' in done.stdout
