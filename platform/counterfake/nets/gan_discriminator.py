"""A GAN's own discriminator as a detector of fakes, shown for what it is.

It was trained against one generator, in step with it, and says how real a picture looks to that one opponent. Its logit is
high for real; a detector's is high for fake, so the sign is turned. Letters: N batch, C channels, H W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Self

from torch import Tensor, nn

from counterfake.errors import ConfigError
from counterfake.nets import NetConfig
from counterfake.nets.dcgan import DcganDiscriminator


@dataclass(frozen=True, kw_only=True)
class GanDiscriminatorConfig(NetConfig):
    """Images (N, C, H, W) in [-1, 1], as the GAN saw them -> fakeness logits (N,)."""

    discriminator: NetConfig = field(default_factory=DcganDiscriminator)

    def __post_init__(self) -> None:
        if getattr(self.discriminator, "classes", 0):
            raise ConfigError(
                "a discriminator that is told the class cannot judge a picture of unknown class; use a GAN without classes"
            )

    def build(self) -> GanDiscriminator:
        return GanDiscriminator(self.discriminator.build())

    @classmethod
    def tiny(cls) -> Self:
        return cls(discriminator=DcganDiscriminator.tiny())


class GanDiscriminator(nn.Module):
    """`discriminator` with the sign of its answer turned around."""

    def __init__(self, discriminator: nn.Module) -> None:
        super().__init__()
        self.discriminator = discriminator

    def forward(self, images: Tensor) -> Tensor:
        """images (N, C, H, W) in [-1, 1] -> fakeness logits (N,)."""
        logits: Tensor = self.discriminator(images)
        return -logits.flatten()
