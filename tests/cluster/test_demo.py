"""The main job, small: every stage of `make demo` in order, then again from what it left."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest

from counterfake.gate import Gate
from counterfake.registry import Registry
from counterfake.workspace import Workspace
from jobs import demo

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

STAGES = [
    "dataset",
    "gan",
    "swap",
    "fakes",
    "tune",
    "detector",
    "benford",
    "ensemble",
    "champion",
    "served",
    "metrics",
]


def test_the_main_job_walks_from_pictures_to_verdicts_and_resumes(
    workspace: Workspace, ray_local: object, free_port: int
) -> None:
    job = demo.DemoJob(
        scale=0.02, identities=40, per_identity=10, pictures=4, port=free_port, gate=Gate(min_auc=0.0)
    )
    summary = demo.run(job, workspace)
    assert list(summary["stages"]) == STAGES
    saved = json.loads((workspace.home / "demo" / "summary.json").read_text())
    assert saved["stages"]["gan"]["steps"] == 18
    served = summary["stages"]["served"]
    champion = Registry.at(workspace).get("ensemble@champion")
    assert served["requests"] == 4
    assert served["model"]["digest"] == champion.digest
    assert summary["stages"]["metrics"]["series"] > 20
    assert demo.headline(summary)["gate"] == "passed"
    page = (workspace.home / "demo" / "report.html").read_text()
    assert not re.search(r'(src|href)="https?:', page), "the report must be self-contained"
    assert page.count("data:image/") > 8

    again = demo.run(dataclasses.replace(job, pictures=2), workspace)
    assert [again["stages"][name]["reused"] for name in ("gan", "swap", "detector")] == [True] * 3
    assert again["stages"]["served"]["model"]["calibration_id"] == served["model"]["calibration_id"]
