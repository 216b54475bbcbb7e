"""What can happen to a job. Each fault does its worst, heals what does not heal by itself, and says what it did."""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from random import Random

from service.errors import TakenError
from tests.integration.processes import await_, family
from tests.soak.cluster import TIMEOUT_S, Cluster

# Under nohup SIGHUP is ignored, and `lorot train` leaves it so.
STOPS = tuple(
    number for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP) if signal.getsignal(number) != signal.SIG_IGN
)


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
        ends = _stop_all(made, (dice.choice(STOPS), dice.choice(STOPS)), dice.uniform(0, 1))
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


def damage_checkpoint(made: Cluster, dice: Random) -> str:
    """All machines die, and of the newest checkpoint a file has lost bytes, or has a bit turned."""
    with made.away(made.machines):
        for machine in made.machines:
            machine.kill()
        found = made.checkpoints()
        if len(found) < 2:
            return "no second checkpoint yet, so none was damaged; all machines died"
        file = dice.choice(sorted(path for path in found[0].iterdir() if path.stat().st_size))
        content = bytearray(file.read_bytes())
        if dice.random() < 0.5:
            del content[dice.randrange(len(content)) :]
            how = f"cut to {len(content)} bytes"
        else:
            place = dice.randrange(len(content))
            content[place] ^= 1 << dice.randrange(8)
            how = f"a bit of byte {place} turned"
        file.write_bytes(content)
    return f"{found[0].name}/{file.name}: {how}"


def fill_disk(made: Cluster, dice: Random) -> str:
    """Nothing can be written, for longer than a checkpoint takes to be due."""
    pause_s = dice.uniform(10, 25)
    ballast = made.disk / "ballast"
    deadline = time.monotonic() + pause_s
    try:
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), ballast.open("ab") as file:
                while True:
                    file.write(bytes(4096))
                    file.flush()
            time.sleep(0.5)
    finally:
        ballast.unlink()
    return f"for {pause_s:.0f} s"


def hide_image(made: Cluster, dice: Random) -> str:
    """A file of the data set is not there for a while."""
    pause_s = dice.uniform(5, 15)
    # Which are trained on: a file of the other split is read at an evaluation only.
    image = dice.choice(sorted((made.folder / "demo").rglob("train/**/*.jpg")))
    away = image.with_suffix(".away")
    image.rename(away)
    time.sleep(pause_s)
    away.rename(image)
    return f"{image.name} for {pause_s:.0f} s"


def damage_image(made: Cluster, dice: Random) -> str:
    """An image of the evaluation has lost its content, in a job that may leave such images out; later it is well again.

    Training would put another in the place of one of its own, which this job's account of samples does not allow for.
    """
    image = dice.choice(sorted((made.folder / "demo").rglob("val/**/*.jpg")))
    content, times = image.read_bytes(), image.stat()
    # Of the same size and time, or it would be taken for another data set.
    _exchange(made, image, bytes(len(content)), times, ["data.on_bad_image=skip"])
    reached = made.evaluated()
    await_(lambda: made.evaluated() > reached or made.is_done(), "an evaluation", 300, made.told)
    made.left_out.add(image.name)
    _exchange(made, image, content, times, [])
    return f"{image.name}, for an evaluation"


def pull_cable(made: Cluster, dice: Random) -> str:
    """One machine is cut off from all others, for longer than they wait for it."""
    machine, pause_s = dice.choice(made.machines), dice.uniform(TIMEOUT_S, 2.5 * TIMEOUT_S)
    machine.set_link("down")
    time.sleep(pause_s)
    machine.set_link("up")
    return f"{machine.address} for {pause_s:.0f} s"


def kill_server(made: Cluster, dice: Random) -> str:
    """The tracking server is gone, and is started again."""
    pause_s = dice.uniform(5, 40)
    made.signal_server(signal.SIGKILL)
    time.sleep(pause_s)
    made.start_server()
    return f"for {pause_s:.0f} s"


def freeze_server(made: Cluster, dice: Random) -> str:
    """The tracking server takes connections and does not answer."""
    pause_s = dice.uniform(5, 40)
    made.signal_server(signal.SIGSTOP)
    time.sleep(pause_s)
    made.signal_server(signal.SIGCONT)
    return f"for {pause_s:.0f} s"


def fail_server(made: Cluster, dice: Random) -> str:
    """The tracking server answers everything with errors."""
    pause_s = dice.uniform(5, 40)
    made.signal_server(signal.SIGKILL)
    made.start_failing_server()
    time.sleep(pause_s)
    made.signal_server(signal.SIGKILL)
    made.start_server()
    return f"for {pause_s:.0f} s"


FAULTS = (
    Fault("machine lost and back", lose_machine),
    Fault("worker killed", kill_worker),
    Fault("worker frozen", freeze_worker),
    Fault("worker killed as it starts", kill_starting_worker),
    Fault("launcher killed", kill_launcher),
    Fault("asked to stop", stop_machine),
    Fault("all asked to stop, twice", stop_twice),
    Fault("torchrun asked to stop", stop_torchrun),
    Fault("second job on the folder", start_second_job, is_felt=False),
    Fault("checkpoint damaged", damage_checkpoint),
    Fault("disk full", fill_disk, needs_disk=True),
    Fault("image missing", hide_image),
    Fault("image damaged", damage_image),
    Fault("cable pulled", pull_cable),
    Fault("tracking server killed", kill_server, is_felt=False),
    Fault("tracking server frozen", freeze_server, is_felt=False),
    Fault("tracking server failing", fail_server, is_felt=False),
)


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


def _stop_all(made: Cluster, numbers: Iterable[signal.Signals], pause_s: float = 0.0) -> list[int]:
    """Send all launchers these signals, one after the other; their exit codes."""
    jobs = [job for machine in made.machines if (job := made.job_on(machine))]
    for number in numbers:
        for job in jobs:
            job.send_signal(number)
        time.sleep(pause_s)
    return [job.wait(180) for job in jobs]


def _exchange(made: Cluster, image: Path, content: bytes, times: os.stat_result, options: list[str]) -> None:
    """Give an image other content while the job is stopped in order; it goes on with these overrides."""
    with made.away(made.machines):
        _stop_all(made, [signal.SIGTERM])
        image.write_bytes(content)
        os.utime(image, ns=(times.st_atime_ns, times.st_mtime_ns))
        made.options = options
    stopped_ns = time.time_ns()
    await_(lambda: made.latest().attempt_ns > stopped_ns or made.is_done(), "the job goes on", 300, made.told)
