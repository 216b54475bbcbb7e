"""What can happen to a job. Each fault does its worst, heals what does not heal by itself, and says what it did."""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from tests.soak import file_faults, network_faults, number_faults, process_faults
from tests.soak.cluster import Cluster


@dataclass(frozen=True)
class Fault:
    """One kind of event.

    Attributes:
        name: for the table.
        inject: does it and returns what it did, or "" if there was nothing to do it to.
        is_felt: whether training is expected to stop and to begin again.
        needs_disk: whether it needs a run folder on a disk of its own.
    """

    name: str
    inject: Callable[[Cluster, Random], str]
    is_felt: bool = True
    needs_disk: bool = False


FAULTS = (
    Fault("machine lost and back", process_faults.lose_machine),
    Fault("worker killed", process_faults.kill_worker),
    Fault("worker frozen", process_faults.freeze_worker),
    Fault("worker killed as it starts", process_faults.kill_starting_worker),
    Fault("launcher killed", process_faults.kill_launcher),
    Fault("asked to stop", process_faults.stop_machine),
    Fault("all asked to stop, twice", process_faults.stop_twice),
    Fault("torchrun asked to stop", process_faults.stop_torchrun),
    Fault("second job on the folder", process_faults.start_second_job, is_felt=False),
    # How it is felt depends on what the job is to do then, and is the fault's own to await.
    Fault("loss not finite", number_faults.spoil_losses, is_felt=False),
    Fault("checkpoint damaged", file_faults.damage_checkpoint),
    Fault("disk full", file_faults.fill_disk, needs_disk=True),
    Fault("run folder read-only", file_faults.close_folder, needs_disk=True),
    Fault("image unreadable", file_faults.hide_image),
    Fault("image damaged", file_faults.damage_image),
    Fault("shard lost and back", file_faults.lose_shard),
    Fault("cable pulled", network_faults.pull_cable),
    Fault("rendezvous killed", network_faults.kill_rendezvous),
    Fault("tracking server killed", network_faults.kill_server, is_felt=False),
    Fault("tracking server frozen", network_faults.freeze_server, is_felt=False),
    Fault("tracking server failing", network_faults.fail_server, is_felt=False),
    Fault("tracking server slow", network_faults.slow_server, is_felt=False),
)
