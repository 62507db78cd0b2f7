"""What a network is asked for: a class, or a vector that describes it (an embedding of a word or a picture).

Both become one float vector (N, K): a one-hot row, a row of a table of embeddings, or the vector that was given. A linear
layer on a one-hot row is an embedding, so the networks know one kind of condition only.
Letters: N batch, K numbers of a condition.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from counterfake.errors import ConfigError, DataError

TABLE_SEED = 512  # of the stand-in table where no embeddings are given


class Condition(nn.Module):
    """Classes (N,) int64 or vectors (N, K) float -> vectors (N, K) float32.

    `embedding` = 0: K is `classes`, rows are one-hot. Otherwise K is `embedding` and `table` (classes, K) holds one vector
    per class: fixed random unit vectors until real ones are copied in. It is a buffer: saved, never trained."""

    table: Tensor

    def __init__(self, classes: int, embedding: int = 0) -> None:
        super().__init__()
        if classes < 0 or embedding < 0 or (embedding and not classes):
            raise ConfigError(f"a condition needs classes >= 1, got classes={classes}, embedding={embedding}")
        self.classes, self.embedding, self.width = classes, embedding, embedding or classes
        if embedding:
            source = torch.Generator().manual_seed(TABLE_SEED)
            self.register_buffer(
                "table", F.normalize(torch.randn(classes, embedding, generator=source), dim=1)
            )

    def forward(self, condition: Tensor | None) -> Tensor:
        if condition is None:
            raise ConfigError(
                f"this network draws one of {self.classes} classes; give it classes (N,) or vectors (N, {self.width})"
            )
        if condition.is_floating_point():
            if condition.dim() != 2 or condition.shape[1] != self.width:
                raise DataError(
                    f"a condition must be vectors (N, {self.width}), got shape {tuple(condition.shape)}"
                )
            return condition
        if self.embedding:
            return self.table[condition]
        return F.one_hot(condition, self.classes).float()


def check_classes(class_id: Tensor, classes: int) -> None:
    """Raises DataError unless every row of `class_id` (N,) lies in 0 … classes - 1; waits for the device."""
    unknown = int((class_id < 0).sum())
    if unknown:
        raise DataError(
            f"{unknown} of {len(class_id)} pictures have no class; a conditional model needs class_id in every row: "
            "ingest a labelled set, or train without classes"
        )
    if len(class_id) and int(class_id.max()) >= classes:
        raise DataError(
            f"the data has class {int(class_id.max())} but the networks know 0 to {classes - 1}; "
            f"set classes={int(class_id.max()) + 1} in learner.generator and learner.discriminator"
        )
