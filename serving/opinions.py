"""Asking every detector of an ensemble about one picture. A detector that is lost or breaks is a missing member, counted
in counterfake_detector_errors_total: the ensemble has a fit for those that are left.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import BackPressureError, RayServeException

from counterfake.errors import MediaError
from counterfake.telemetry import Telemetry
from serving.gateway import Overloaded, Unavailable
from serving.verdicts import Score

logger = logging.getLogger(__name__)

ATTEMPTS = 3  # per detector and picture, when a replica dies under it; judging twice is harmless
ERRORS = "counterfake_detector_errors_total"
OURS = ("unavailable", "failed")  # reasons of a Score that no picture is to blame for


def begin(telemetry: Telemetry, names: Iterable[str]) -> None:
    """Every series of the errors at 0: Prometheus sees no increase in a series whose first value is 1."""
    for name in names:
        for reason in (*OURS, "overloaded"):
            telemetry.count(ERRORS, 0, detector=name, reason=reason)


async def gather(
    handles: Mapping[str, Any], names: Sequence[str], digest: str, data: bytes, telemetry: Telemetry
) -> dict[str, Score]:
    """The Score of each name, all asked at once. MediaError where one finds the picture unsound, Overloaded where too many
    wait, Unavailable where no detector is left that answers."""
    answers = await asyncio.gather(*(ask(handles[name], name, digest, data, telemetry) for name in names))
    if all(score.reason in OURS for score in answers):
        raise Unavailable(f"none of {', '.join(names)} answers")
    return dict(zip(names, answers, strict=True))


async def ask(handle: Any, name: str, digest: str, data: bytes, telemetry: Telemetry) -> Score:
    """One detector's Score; again when its replica dies, `unavailable` after that, `failed` when its code raises."""
    for attempt in range(ATTEMPTS):
        try:
            score: Score = await handle.judge.remote(digest, data)
            return score
        except BackPressureError:
            _count(telemetry, name, "overloaded")
            raise Overloaded(name) from None
        except (RayActorError, RayServeException) as error:
            logger.warning("%s was lost under a picture: %s", name, type(error).__name__)
            await asyncio.sleep(0.1 * (attempt + 1))
        except RayError as error:
            cause = getattr(error, "cause", None)
            if isinstance(cause, MediaError):
                raise cause from None
            logger.exception("%s fails on a picture; the other detectors judge it", name)
            return _missing(telemetry, name, "failed")
    return _missing(telemetry, name, "unavailable")


def _missing(telemetry: Telemetry, name: str, reason: str) -> Score:
    _count(telemetry, name, reason)
    return Score(probability=None, reason=reason)


def _count(telemetry: Telemetry, name: str, reason: str) -> None:
    telemetry.count(ERRORS, detector=name, reason=reason)
