"""From what a network costs and what machines can do to the time of a step and of a run. Arithmetic; no torch.

One step on each of W workers is `accumulation` forward and backward passes, the averaging of the gradients, which the
last backward pass hides as far as it can, and the optimizer's update. It is not shorter than the loading of its images.
"""

from dataclasses import dataclass

from service.config import JobConfig
from service.planning.network import Network

_FLOAT = 4
# Share of a link's peak that averaging reaches.
LINK_SHARE = 0.8
# Times an optimizer reads or writes an array as large as the weights.
_TOUCHES = {"sgd": 5, "adamw": 7, "lamb": 10}
# Elements of the last bucket to be averaged, which no backward pass hides any more (service/training/averaging.py).
LAST_BUCKET = 2_000_000


@dataclass(frozen=True)
class Machines:
    """What a run is to have.

    Attributes:
        gpus, nodes: workers of each node, and nodes.
        forwarded_per_s: images a worker trains on in a second, forward and backward, by size of the input.
        interconnect, network: bytes/s between the workers of a node, in one direction, and of a node to the others.
        memory_bytes_per_s: of a worker's memory, for the optimizer's update; infinite if that is in the rate already.
        hides: averaging runs beside the backward pass. On a CPU whose cores are all busy it does not.
        core_s_per_image: CPU time that loading an image takes.
        cores: of each node for loading; 0: as many as it takes.
    """

    gpus: int
    nodes: int
    forwarded_per_s: dict[int, float]
    interconnect: float
    network: float
    memory_bytes_per_s: float
    hides: bool
    core_s_per_image: float
    cores: int = 0

    @property
    def world(self) -> int:
        return self.gpus * self.nodes


@dataclass(frozen=True)
class Step:
    """Seconds of one optimizer step, by what for; `averaging` whether hidden or not, `exposed` what is not.

    Attributes:
        loading: to load its images on the cores there are; 0 if these are not given.
    """

    computing: float
    averaging: float
    exposed: float
    updating: float
    loading: float
    global_batch: int

    @property
    def seconds(self) -> float:
        return max(self.computing + self.exposed + self.updating, self.loading)

    @property
    def images_per_s(self) -> float:
        return self.global_batch / self.seconds

    @property
    def averaging_share(self) -> float:
        """Share of the step that waits for gradients, 0 to 1."""
        return self.exposed / self.seconds


def forwarded_images(job: JobConfig, images: int) -> int:
    """Images that pass through the network for a batch of `images`: parallel_task forwards turned copies as well."""
    if job.objective.name != "parallel_task":
        return images
    return images * {"all": 4, "one": 2}[job.objective.turns]


def averaged_bytes(job: JobConfig, network: Network, world: int, accumulation: int) -> float:
    """Bytes that each worker sends, and receives, in a step.

    Ring all-reduce: 2 (W - 1) / W of the gradients, in float32 (Patarasuk and Yuan 2009). ZeRO 1 scatters them and
    gathers the weights, which is as much; stage 2 scatters those of every micro-batch, and stage 3 also gathers the
    weights for each forward and each backward pass (Rajbhandari et al. 2020, https://arxiv.org/abs/1910.02054).
    """
    if world == 1:
        return 0.0
    shares = {0: 2, 1: 2, 2: accumulation + 1, 3: 3 * accumulation}[job.zero_stage]
    # BatchNorm's statistics travel in a message of their own, whatever the stage.
    return (world - 1) / world * _FLOAT * (shares * network.parameters + 2 * network.buffers)


def slowest_link(machines: Machines) -> float:
    """Bytes/s of the narrowest place of a ring through all workers."""
    links = [machines.interconnect] if machines.gpus > 1 else []
    return min(links + ([machines.network] if machines.nodes > 1 else [])) if machines.world > 1 else float("inf")


def step(job: JobConfig, network: Network, machines: Machines, accumulation: int, size: int) -> Step:
    """One optimizer step at an input of `size` pixels, of which `network` was counted."""
    rate = machines.forwarded_per_s[size]
    pass_s = forwarded_images(job, job.micro_batch) / rate
    volume = averaged_bytes(job, network, machines.world, accumulation)
    averaging = volume / (LINK_SHARE * slowest_link(machines)) if volume else 0.0
    # Of a pass the backward part is what remains of the operations.
    backward_s = pass_s * (1 - network.forward_flops / network.training_flops)
    last = averaging * min(1.0, LAST_BUCKET / network.parameters)
    touched = _TOUCHES[job.optimizer.name] + (3 / job.ema.every if job.ema is not None else 0)
    share = machines.world if job.zero_stage else 1
    cores = machines.cores * machines.nodes
    return Step(
        computing=pass_s * accumulation,
        averaging=averaging,
        exposed=max(last, averaging - backward_s) if machines.hides else averaging,
        updating=touched * network.parameters * _FLOAT / share / machines.memory_bytes_per_s,
        loading=job.global_batch * machines.core_s_per_image / cores if cores else 0.0,
        global_batch=job.global_batch,
    )


def evaluation_seconds(network: Network, machines: Machines, size: int, samples: int) -> float:
    """One evaluation: forward passes only, and loading on the cores there are."""
    computing = samples * network.forward_flops / network.training_flops
    loading = samples * machines.core_s_per_image / (machines.cores * machines.nodes) if machines.cores else 0.0
    return max(computing / (machines.forwarded_per_s[size] * machines.world), loading)
