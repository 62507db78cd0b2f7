"""What goes over the wire: verdicts, models, problems (RFC 9457). `/v1` only ever grows fields; it never renames one."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

PROBLEM_JSON = "application/problem+json"

STATUS_OF_REASON = {
    "empty": 400,
    "too_large": 413,
    "unsupported": 415,
    "undecodable": 422,
    "bomb": 422,
    "too_small": 422,
    "too_slow": 422,
}

TITLES = {
    400: "The request has no picture in it",
    404: "There is nothing at this address",
    405: "This address does not take that method",
    408: "The picture arrived too slowly",
    413: "The picture is too large",
    415: "This is not a picture we read",
    422: "The picture cannot be judged",
    500: "An error of ours",
    503: "The service cannot answer right now",
    504: "The detectors took too long",
}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Problem(BaseModel):
    """An error a program can branch on (`reason`) and a person can act on (`detail`). RFC 9457."""

    type: str = Field(examples=["about:blank#too_large"])
    title: str
    status: int
    detail: str
    reason: str = Field(description="One short word that stays the same for this kind of error.")
    request_id: str


class Member(_Strict):
    """One detector of an ensemble."""

    name: str
    kind: str
    version: str = Field(description="First 12 digits of its digest.")
    digest: str
    runtime: str = Field(
        default="", description="What runs its network, such as openvino-bf16 or torch-fp32; empty for none."
    )
    runtime_reason: str = Field(
        default="", description="Why: the bundle's record, or what is not installed here."
    )


class Model(_Strict):
    """A registered ensemble as it is served: what a verdict needs beside the detectors themselves."""

    name: str
    alias: str = Field(description="The alias or version that is followed, such as champion.")
    version: int
    digest: str = Field(description="SHA-256 over weights, settings, calibration and evaluation together.")
    uri: str = Field(description="Where the bundle lies on object storage.")
    members: tuple[Member, ...]
    ensemble: dict[str, Any] = Field(description="Weights, temperatures, conformal thresholds.")
    calibration_id: str | None = None
    dataset: dict[str, Any] | None = None
    run_id: str | None = None
    commit: str | None = None
    created_at: str | None = None
    evaluation: dict[str, Any] = Field(default_factory=dict, description="Held-out figures with intervals.")


class Following(_Strict):
    """How the followed alias stands: what is live, and what became of the last move."""

    reference: str = Field(examples=["ensemble@champion"])
    state: Literal["live", "staging", "switching", "refused", "unreachable"]
    detail: str = ""
    candidate: str | None = Field(
        default=None, description="Digest of the bundle being tested, or refused last."
    )
    polled_at: float | None = Field(default=None, description="Unix time of the last successful poll.")
    swapped_at: float | None = Field(default=None, description="Unix time at which the live model went live.")


class Models(BaseModel):
    """Answer of GET /v1/models."""

    models: tuple[Model, ...]
    following: Following | None


class DetectorScore(BaseModel):
    """One detector's own opinion."""

    name: str
    kind: str
    version: str
    probability: float | None = Field(description="Of fake, before calibration; None if it did not answer.")
    weight: float = Field(description="Its weight in the ensemble's logistic stack; 0 if it did not answer.")
    reason: str | None = Field(
        default=None, description="Why it did not answer: no_face, too_small, unavailable, failed."
    )


class ModelReference(BaseModel):
    """Which model gave a verdict, exactly."""

    name: str
    version: int
    digest: str
    calibration_id: str | None
    dataset_version: int | str | None = Field(description="Of the data it was trained and calibrated on.")


class Verdict(BaseModel):
    """Answer of POST /v1/detect."""

    verdict: Literal["real", "fake", "uncertain", "no_verdict"]
    reason: str | None = Field(
        default=None, description="Why there is no verdict: no_face, out_of_domain, ..."
    )
    probability_fake: float | None = Field(description="Calibrated; None when there is no verdict.")
    error_rate: float = Field(
        description="At most this share of real pictures, and of fakes, is misjudged, for data like the calibration data."
    )
    detectors: list[DetectorScore]
    faces: list[dict[str, Any]] = Field(default_factory=list)
    frames: list[dict[str, Any]] = Field(default_factory=list)
    heatmap: str | None = None
    provenance: dict[str, Any] = Field(
        default_factory=dict, description="What the file itself says of its origin."
    )
    model: ModelReference
    request_id: str
    timings: dict[str, float] = Field(
        description="Milliseconds: receive_ms, decode_ms, detectors_ms, total_ms."
    )
