"""O-Net, the last of MTCNN's three networks: face or not, a better box, and five points, from a crop of 48 pixels.

Zhang et al. 2016, https://arxiv.org/abs/1604.02878, figure 2. State-dict names are those of the widespread PyTorch port (facenet-pytorch,
MIT), so that its public weights load by name. They were trained on columns before rows: the maps are transposed before the
dense layer. The first two networks only propose boxes, which any of faces.METHODS does better. Not trained here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from counterfake.nets import NetConfig
from counterfake.nets.backbone import EVERY, load_weights

SIDE = 48  # pixels of the crop
CHANNELS = (32, 64, 64, 128)


@dataclass(frozen=True, kw_only=True)
class OnetConfig(NetConfig):
    """Crops (N, 3, 48, 48), RGB minus 127.5 over 128 -> face scores (N,), box moves (N, 4), points (N, 5, 2); in sides of the crop."""

    weights: str = ""  # file of public weights (onet.pt); "" = random, for tests

    def build(self) -> Onet:
        """The network in evaluation mode. Raises CheckpointError if the weights cannot be used."""
        net = Onet()
        if self.weights:
            load_weights(net, self.weights, names=EVERY)
        return net.eval()

    @classmethod
    def tiny(cls) -> OnetConfig:
        return cls()  # it is tiny


class Onet(nn.Module):
    """389,040 weights; names as published."""

    def __init__(self) -> None:
        super().__init__()
        a, b, c, d = CHANNELS
        self.conv1, self.prelu1 = nn.Conv2d(3, a, 3), nn.PReLU(a)
        self.conv2, self.prelu2 = nn.Conv2d(a, b, 3), nn.PReLU(b)
        self.conv3, self.prelu3 = nn.Conv2d(b, c, 3), nn.PReLU(c)
        self.conv4, self.prelu4 = nn.Conv2d(c, d, 2), nn.PReLU(d)
        self.dense5, self.prelu5 = nn.Linear(d * 9, 256), nn.PReLU(256)
        self.dense6_1, self.dense6_2, self.dense6_3 = nn.Linear(256, 2), nn.Linear(256, 4), nn.Linear(256, 10)

    def forward(self, crops: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """crops (N, 3, 48, 48) -> scores (N,) in [0, 1]; moves (N, 4) of left, top, right, bottom; points (N, 5, 2) x, y."""
        x = F.max_pool2d(self.prelu1(self.conv1(crops)), 3, 2, ceil_mode=True)
        x = F.max_pool2d(self.prelu2(self.conv2(x)), 3, 2, ceil_mode=True)
        x = F.max_pool2d(self.prelu3(self.conv3(x)), 2, 2, ceil_mode=True)
        x = self.prelu4(self.conv4(x)).permute(0, 3, 2, 1).flatten(1)
        x = self.prelu5(self.dense5(x))
        points = self.dense6_3(x).view(-1, 2, 5).transpose(1, 2)  # published as five x, then five y
        return self.dense6_1(x).softmax(1)[:, 1], self.dense6_2(x), points
