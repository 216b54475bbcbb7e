"""What can happen to processes: workers, launchers, torchruns, whole machines."""

import contextlib
import os
import signal
import time
from collections.abc import Iterable
from random import Random

from service.errors import TakenError
from tests.integration.processes import await_, family
from tests.soak import checks
from tests.soak.cluster import Cluster

# Under nohup SIGHUP is ignored, and `lorot train` leaves it so.
STOPS = tuple(number for number in checks.STOPS if signal.getsignal(number) != signal.SIG_IGN)


def lose_machine(made: Cluster, dice: Random) -> str:
    """All of its processes are gone at once; later it comes back."""
    machine, pause_s = dice.choice(made.machines), dice.uniform(1, 20)
    with made.away([machine]):
        machine.kill()
        time.sleep(pause_s)
    return f"{machine.address} for {pause_s:.0f} s"


def kill_worker(made: Cluster, dice: Random) -> str:
    """By SIGKILL, as the kernel does when memory runs out."""
    return _to_a_worker(made, dice, signal.SIGKILL)


def freeze_worker(made: Cluster, dice: Random) -> str:
    """It stays, and does nothing any more."""
    return _to_a_worker(made, dice, signal.SIGSTOP)


def kill_launcher(made: Cluster, dice: Random) -> str:
    """`lorot train` dies; its torchrun and workers have to end by themselves."""
    machine = dice.choice(made.machines)
    job = made.job_on(machine)
    if job is None:
        return ""
    job.kill()
    return f"process {job.pid} on {machine.address}"


def stop_machine(made: Cluster, dice: Random) -> str:
    """One machine is reclaimed: its launcher, or a worker, is asked to stop; it comes back at once."""
    machine, number = dice.choice(made.machines), dice.choice(STOPS)
    job = made.job_on(machine)
    if dice.random() < 0.5 and machine.workers():
        return _to_a_worker(made, dice, number)
    if job is None:
        return ""
    job.send_signal(number)
    return f"{number.name} to the launcher on {machine.address}"


def stop_twice(made: Cluster, dice: Random) -> str:
    """All machines are asked to stop, and again while they save."""
    with made.away(made.machines):
        ends = made.stop_all((dice.choice(STOPS), dice.choice(STOPS)), dice.uniform(0, 1))
    return f"exit codes {ends}"


def stop_torchrun(made: Cluster, dice: Random) -> str:
    """A torchrun is asked to stop, and not the launcher above it."""
    machine, number = dice.choice(made.machines), dice.choice(STOPS)
    job = made.job_on(machine)
    found = family(job.pid)[1:2] if job is not None else []
    for torchrun in found:
        torchrun.send_signal(number)
    return f"{number.name} to torchrun on {machine.address}" if found else ""


def kill_starting_worker(made: Cluster, dice: Random) -> str:
    """A worker is killed, and so is the one that takes its place, before it trains."""
    machine = dice.choice(made.machines)
    killed = machine.workers()
    if not killed:
        return ""
    _send(killed, signal.SIGKILL)
    await_(lambda: set(machine.workers()) - set(killed) or made.is_done(), "workers are started again", 120, made.told)
    pause_s = dice.uniform(0, 8)
    time.sleep(pause_s)
    again = sorted(set(machine.workers()) - set(killed))
    _send(again, signal.SIGKILL)
    return f"worker {killed} on {machine.address}, and {again} {pause_s:.0f} s after it was there"


def start_second_job(made: Cluster, _dice: Random) -> str:
    """Somebody starts the same run once more, elsewhere. He is refused, and the machines notice nothing."""
    if not made.is_complete():
        # Between two attempts the folder is whose hand is quicker.
        return ""
    code = made.hub.start(*made.line).wait(300)
    if made.has_ended():
        # It came when the job was over.
        return ""
    assert code == TakenError.exit_code, f"a second job on the folder ended with {code}\n{made.told()}"
    return f"it ended with {code}"


def _to_a_worker(made: Cluster, dice: Random, number: signal.Signals) -> str:
    """Send a worker on some machine the signal."""
    found = [(machine, pid) for machine in made.machines for pid in machine.workers()]
    if not found:
        return ""
    machine, pid = dice.choice(found)
    return f"{number.name} to worker {pid} on {machine.address}" if _send([pid], number) else ""


def _send(pids: Iterable[int], number: signal.Signals) -> list[int]:
    """Send processes a signal; those that were still there."""
    reached = []
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
            reached.append(pid)
    return reached
