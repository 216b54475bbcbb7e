"""ResNet-18 for 32 px images: torchvision's, but for a 3 x 3 stem of stride 1 and no max-pooling.

What CIFAR papers call ResNet-18: torchvision's five halvings would leave a single pixel of a 32 px image. LoRot's
out-of-distribution code takes pre-activation blocks instead.
"""

from torch import nn
from torchvision.models import resnet as torchvision_resnet

from service.config import ModelConfig
from service.models.resnet import stages


def trunk(config: ModelConfig) -> tuple[dict[str, nn.Module], int]:
    """Stages by torchvision's names, and their channels. 32 px in, 4 x 4 maps out."""
    network = torchvision_resnet.resnet18(weights=None, zero_init_residual=config.zero_init)
    network.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
    kept = stages(network)
    del kept["maxpool"]
    return kept, network.fc.in_features
