"""GPUs by their published peak numbers, and how much of these the training of ResNets reaches. Imports no torch.

Peaks are per GPU, dense (without structured sparsity). Where they were read:
- H100 SXM5, A100 SXM4: NVIDIA's data sheets as tabulated at https://glennklockwood.com/garden/processors/h100 and
  .../A100 (NVLink: 900 and 600 GB/s, both directions together);
- V100 SXM2, P100 SXM2: NVIDIA's launch table (15 and 10.6 TFLOP/s fp32, 120 for tensor cores), as at
  http://www.xenon.com.au/nvidia-tesla-volta-worlds-advanced-data-center-gpu/; memory 900 and 732 GB/s, and NVLink 150
  and 80 GB/s in one direction, from Dell EMC's "Ready Solutions for AI: Deep Learning with NVIDIA", page 17.
"""

from dataclasses import dataclass

from service.errors import ConfigError

# Of the peaks, fitted once to all of PUBLISHED together: a roofline of two constants, whatever the GPU and precision.
COMPUTE_SHARE = 0.60
MEMORY_SHARE = 0.44
# The prediction is within this factor of every row of PUBLISHED; a test holds it.
WITHIN = 1.4


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Attributes:
        name: as `--gpu` takes it.
        half, single: peak TFLOP/s with 16-bit inputs, and of float32 code as torch runs convolutions by default: in
            TF32 where the GPU has it.
        memory_gb, memory_gb_per_s: size of its memory, and how fast it is.
        link_gb_per_s: to the other GPUs of its node, in one direction.
        has_bf16: fp16 otherwise, if 16 bits at all.
    """

    name: str
    half: float
    single: float
    memory_gb: float
    memory_gb_per_s: float
    link_gb_per_s: float
    has_bf16: bool


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("H100", 989.4, 494.7, 80, 3350, 450, True),
        Gpu("A100", 312, 156, 80, 2039, 300, True),
        Gpu("A100-40GB", 312, 156, 40, 1555, 300, True),
        Gpu("V100", 120, 15, 32, 900, 150, False),
        Gpu("V100-16GB", 120, 15, 16, 900, 150, False),
        Gpu("P100", 21.2, 10.6, 16, 732, 80, False),
    )
}


@dataclass(frozen=True)
class Published:
    """A measured training rate of ResNet-50 v1.5 at 224 pixels, images/s over `count` GPUs of one machine."""

    gpu: str
    half: bool
    count: int
    images_per_s: float
    source: str


_TORCH = "NVIDIA DeepLearningExamples, PyTorch/Classification/ConvNets/resnet50v1.5/README.md (container 21.03)"
_MXNET = "NVIDIA DeepLearningExamples, MxNet/Classification/RN50v1.5/README.md (container 20.12)"
PUBLISHED = (
    Published("A100", True, 1, 2470, _TORCH),
    Published("A100", True, 8, 16621, _TORCH),
    Published("A100", False, 1, 938, _TORCH),
    Published("A100", False, 8, 7248, _TORCH),
    Published("V100-16GB", True, 1, 1200, _TORCH),
    Published("V100-16GB", True, 8, 8322, _TORCH),
    Published("V100-16GB", False, 1, 367, _TORCH),
    Published("V100-16GB", False, 8, 2855, _TORCH),
    Published("V100", True, 1, 1156, _TORCH),
    Published("V100", True, 8, 8056, _TORCH),
    Published("V100", False, 1, 356, _TORCH),
    Published("V100", False, 8, 2766, _TORCH),
    Published("A100", True, 1, 2180, _MXNET),
    Published("A100", True, 8, 16925, _MXNET),
    Published("A100", False, 1, 1022, _MXNET),
    Published("A100", False, 8, 8001, _MXNET),
    Published("V100-16GB", True, 1, 1376, _MXNET),
    Published("V100-16GB", True, 8, 10723, _MXNET),
    Published("V100-16GB", False, 1, 384, _MXNET),
    Published("V100-16GB", False, 8, 3005, _MXNET),
    Published("V100", True, 1, 1492, _MXNET),
    Published("V100", True, 16, 21484, _MXNET),
    Published("V100", False, 1, 417, _MXNET),
    Published("V100", False, 16, 6338, _MXNET),
)


def find(name: str) -> Gpu:
    """The GPU of that name, in any case of letters; raises ConfigError with those that are known."""
    for gpu in GPUS.values():
        if gpu.name.lower() == name.lower():
            return gpu
    raise ConfigError(
        f"--gpu {name}: its peak numbers are not known here; known are {', '.join(GPUS)}. For another give its own "
        "rate: --images-per-s of this network, or --flops that it sustains in TFLOP/s"
    )


def precision_on(gpu: Gpu, asked: str) -> str:
    """What `precision` becomes on that GPU: fp32, bf16 or fp16; raises ConfigError as training would."""
    if asked == "auto":
        return "bf16" if gpu.has_bf16 else "fp32"
    if asked == "bf16" and not gpu.has_bf16:
        raise ConfigError(f"precision: {gpu.name} has no bf16; use precision=fp16 or precision=fp32")
    return asked


def seconds(gpu: Gpu, half: bool, flops: float, traffic: float) -> float:
    """How long it takes: the slower of computing `flops` operations and of moving `traffic` elements."""
    peak = (gpu.half if half else gpu.single) * 1e12
    computing = flops / (COMPUTE_SHARE * peak)
    moving = traffic * (2 if half else 4) / (MEMORY_SHARE * gpu.memory_gb_per_s * 1e9)
    return max(computing, moving)
