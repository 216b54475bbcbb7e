"""Networks. `build` makes one from its configuration; the family modules say what each name is."""

from service.config import ModelConfig
from service.models import cifar_resnet, resnet, resnet_small
from service.models.heads import Classifier, Outputs

_TRUNKS = {
    "resnet18": resnet.trunk,
    "resnet34": resnet.trunk,
    "resnet50": resnet.trunk,
    "resnet101": resnet.trunk,
    "cifar_resnet18": cifar_resnet.trunk,
    "resnet_small": resnet_small.trunk,
}


def build(config: ModelConfig, num_classes: int, num_pretext: int) -> Classifier:
    """The network `config` describes, freshly initialised from torch's global random state.

    Args:
        config: `init_from` is left to the caller, who knows where weights are kept.
        num_classes: outputs of `fc`.
        num_pretext: outputs of `pretext_fc`; 0 for no pretext head. Trunk and `fc` are drawn before it, so a seed
            gives them the same start with and without one.
    """
    stages, num_channels = _TRUNKS[config.name](config)
    return Classifier(stages, num_channels, num_classes, num_pretext)


__all__ = ["Classifier", "Outputs", "build"]
