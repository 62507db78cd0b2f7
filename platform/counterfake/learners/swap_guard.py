"""Notices when a face swap stops learning: everybody grey, or one person left behind.

Errors are plain mean absolute errors of the painted face, whatever the losses of the phase. They are summed on the device
and looked at once per tick, over all ranks, so that every rank comes to the same verdict and no step waits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from counterfake import dist
from counterfake.errors import CollapseError

GREY = 0.1  # spread of the painted faces / that of the pictures, below which they are one grey face
ALIVE = 0.4  # the same, above which they count as faces; only what was alive can collapse
STUCK = 0.95  # of its first error; a person above has learned nothing …
LEARNED = 0.5  # … while half of the people are below this …
PATIENCE = 3  # … for so many ticks in a row


class Guard:
    """Watches the errors of I people."""

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        self.names = list(names)
        self._sums = torch.zeros(2 * len(names) + 3, device=device)  # errors, rows, spreads of both, steps
        self._first = [0.0] * len(
            names
        )  # mean error of each person in the first tick that had them; 0 = not yet
        self._alive = False
        self._behind = [0] * len(names)  # ticks in a row

    @torch.no_grad()
    def observe(self, painted: Tensor, target: Tensor, errors: Tensor, identity: Tensor) -> None:
        """painted, target (N, 3, S, S), mean absolute errors (N,), people (N,) of one step."""
        people = len(self.names)
        self._sums[:people].index_add_(0, identity, errors)
        self._sums[people : 2 * people].index_add_(0, identity, torch.ones_like(errors))
        spreads = [pictures.float().std(dim=(2, 3)).mean() for pictures in (painted, target)]
        self._sums[2 * people :] += torch.stack([*spreads, torch.ones_like(spreads[0])])

    def check(self) -> None:
        """The verdict on what was seen since the last call. Raises CollapseError."""
        sums = dist.sum_over_ranks(self._sums).tolist()
        self._sums.zero_()
        people = len(self.names)
        painted, target, steps = sums[2 * people :]
        if steps:
            self._look_for_grey(painted / max(target, 1e-9))
            self._look_for_the_left_behind(sums[:people], sums[people : 2 * people])

    def forgive(self) -> None:
        """After going back: nobody is left behind yet, though the checkpoint may be of a tick that was bad already. What
        is learned slower has PATIENCE ticks again before it counts as lost."""
        self._behind = [0] * len(self.names)

    def state_dict(self) -> dict[str, Any]:
        return {"first": list(self._first), "alive": self._alive, "behind": list(self._behind)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._first, self._behind = list(state["first"]), list(state["behind"])
        self._alive = bool(state["alive"])
        self._sums.zero_()

    def _look_for_grey(self, spread: float) -> None:
        if self._alive and spread < GREY:
            raise CollapseError(
                f"the painted faces became grey: they vary {spread:.1%} as much as the pictures; lower learner.lr, or "
                "train with loop.precision=fp32"
            )
        self._alive = self._alive or spread > ALIVE

    def _look_for_the_left_behind(self, errors: list[float], rows: list[float]) -> None:
        means = [error / count if count else 0.0 for error, count in zip(errors, rows, strict=True)]
        self._first = [first or mean for first, mean in zip(self._first, means, strict=True)]
        shares = [mean / max(first, 1e-9) for first, mean in zip(self._first, means, strict=True)]
        seen = sorted(share for share, count in zip(shares, rows, strict=True) if count)
        others_learn = bool(seen) and seen[(len(seen) - 1) // 2] < LEARNED
        for person, share in enumerate(shares):
            stuck = others_learn and bool(rows[person]) and share > STUCK
            self._behind[person] = self._behind[person] + 1 if stuck else 0
            if self._behind[person] >= PATIENCE:
                raise CollapseError(
                    f"the error of {self.names[person]} stays at {share:.0%} of its first value while others learn: that "
                    "decoder is lost; lower learner.lr, or look at this person's pictures"
                )
