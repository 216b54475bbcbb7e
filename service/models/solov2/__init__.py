"""SOLOv2 (Wang et al. 2020, "SOLOv2: Dynamic and Fast Instance Segmentation", https://arxiv.org/abs/2003.10152).

The image is cut into S x S cells. For each cell one branch tells the class of the object whose centre lies there, and
another the weights of a 1 x 1 convolution that draws this object's mask from feature maps shared by all.

    options.py      every number of the published configuration, by name
    branches.py     the networks: towers over the grids, unified mask features, dynamic convolution
    assignment.py   which cell answers for which object
    losses.py       focal loss of the classes, dice loss of the masks
    suppression.py  points NMS, matrix NMS
    decoding.py     from what the branches say to objects
    network.py      all of it together
"""

from service.models.solov2.network import SOLOv2
from service.models.solov2.options import Options

__all__ = ["Options", "SOLOv2"]
