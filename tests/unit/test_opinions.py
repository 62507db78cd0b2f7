"""Asking the detectors: one that is lost or breaks is a missing member and counted; a picture's own fault stays its own."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from types import SimpleNamespace

import pytest
from ray.exceptions import ActorDiedError, RayTaskError
from ray.serve.exceptions import BackPressureError

from counterfake.errors import MediaError
from counterfake.telemetry import Telemetry
from serving import opinions
from serving.gateway import Overloaded, Unavailable
from serving.verdicts import Score

GOOD = Score(probability=0.8)
LOST = ActorDiedError()
BUSY = BackPressureError(num_queued_requests=64, max_queued_requests=64)


def raised(cause: Exception) -> Exception:
    """An exception of a replica's code as Ray brings it to the caller."""
    return RayTaskError("judge", "Traceback …", cause).as_instanceof_cause()


class Replica:
    """A handle whose `judge.remote` gives one answer after the other, the last one for ever."""

    def __init__(self, *answers: Score | Exception) -> None:
        self.answers, self.asked = answers, 0
        self.judge = SimpleNamespace(remote=self._remote)

    async def _remote(self, digest: str, data: bytes) -> Score:
        answer = self.answers[min(self.asked, len(self.answers) - 1)]
        self.asked += 1
        if isinstance(answer, Exception):
            raise answer
        return answer


def ask(handles: Mapping[str, Replica]) -> tuple[dict[str, Score], dict[tuple[str, ...], float]]:
    """(opinions, errors counted by (detector, reason))."""
    telemetry = Telemetry()
    try:
        found = asyncio.run(opinions.gather(handles, list(handles), "digest", b"picture", telemetry))
    except Exception as error:
        error.counted = counted(telemetry)  # type: ignore[attr-defined]
        raise
    return found, counted(telemetry)


def counted(telemetry: Telemetry) -> dict[tuple[str, ...], float]:
    rows = telemetry.snapshot()
    return {labels: value for name, _, labels, value in rows if name == "counterfake_detector_errors_total"}


def test_errors_are_there_as_zero_before_the_first() -> None:
    telemetry = Telemetry()
    opinions.begin(telemetry, ["cnn"])
    assert counted(telemetry) == {("cnn", why): 0 for why in ("unavailable", "failed", "overloaded")}


def test_a_detector_whose_code_raises_is_a_missing_member() -> None:
    cnn = Replica(raised(RuntimeError("shapes differ")))
    found, errors = ask({"cnn": cnn, "benford": Replica(GOOD)})
    assert found == {"cnn": Score(probability=None, reason="failed"), "benford": GOOD}
    assert errors == {("cnn", "failed"): 1}
    assert cnn.asked == 1, "the same code would raise again"


def test_a_detector_that_comes_back_in_time_is_asked_again_and_no_error() -> None:
    assert ask({"cnn": Replica(LOST, LOST, GOOD)}) == ({"cnn": GOOD}, {})


def test_a_detector_that_stays_away_is_unavailable() -> None:
    away = Replica(LOST)
    found, errors = ask({"cnn": away, "benford": Replica(GOOD)})
    assert found["cnn"] == Score(probability=None, reason="unavailable")
    assert errors == {("cnn", "unavailable"): 1}
    assert away.asked == opinions.ATTEMPTS


@pytest.mark.parametrize(
    ("answer", "error", "errors"),
    [
        (BUSY, Overloaded, {("cnn", "overloaded"): 1}),
        (raised(MediaError("too_small", "the face is too small")), MediaError, {}),
    ],
    ids=["busy", "unsound picture"],
)
def test_what_concerns_the_whole_request_reaches_the_gateway(
    answer: Exception, error: type[Exception], errors: dict[tuple[str, ...], float]
) -> None:
    with pytest.raises(error) as caught:
        ask({"cnn": Replica(answer), "benford": Replica(GOOD)})
    assert caught.value.counted == errors  # type: ignore[attr-defined]
    assert not isinstance(caught.value, RayTaskError)


def test_no_detector_left_is_no_verdict_of_half_a_guess() -> None:
    refuses = Score(probability=None, reason="no_face")
    broken = raised(ValueError("inside"))
    with pytest.raises(Unavailable, match="none of cnn, benford answers") as caught:
        ask({"cnn": Replica(broken), "benford": Replica(LOST)})
    assert caught.value.counted == {("cnn", "failed"): 1, ("benford", "unavailable"): 1}  # type: ignore[attr-defined]
    found, _ = ask({"cnn": Replica(broken), "benford": Replica(refuses)})
    assert found["benford"] == refuses
