"""torchvision's ImageNet ResNets (He et al. 2016, https://arxiv.org/abs/1512.03385, tables 1; stride in the 3 x 3)."""

from torch import nn
from torchvision.models import resnet as torchvision_resnet

from service.config import ModelConfig


def trunk(config: ModelConfig) -> tuple[dict[str, nn.Module], int]:
    """Stages by torchvision's names, and their channels. 224 px in, 7 x 7 maps out."""
    network = getattr(torchvision_resnet, config.name)(weights=None, zero_init_residual=config.zero_init)
    return stages(network), network.fc.in_features


def stages(network: nn.Module) -> dict[str, nn.Module]:
    """All of a torchvision ResNet that comes before its pooling, in order."""
    return {name: stage for name, stage in network.named_children() if name not in ("avgpool", "fc")}
