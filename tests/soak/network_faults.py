"""What can happen to what machines reach over the network: each other, the rendezvous, the tracking server."""

import signal
import time
from collections.abc import Callable
from random import Random

from tests.soak.cluster import TIMEOUT_S, Cluster


def pull_cable(made: Cluster, dice: Random) -> str:
    """One machine is cut off from all others, for longer than they wait for it."""
    machine, pause_s = dice.choice(made.machines), dice.uniform(TIMEOUT_S, 2.5 * TIMEOUT_S)
    told = _for(pause_s, lambda: machine.set_link("down"), lambda: machine.set_link("up"))
    return f"{machine.address} {told}"


def kill_rendezvous(made: Cluster, dice: Random) -> str:
    """The place where the machines meet is gone with all that it knew, and is started again at its address."""
    return _for(dice.uniform(1, 20), made.kill_rendezvous, made.start_rendezvous)


def kill_server(made: Cluster, dice: Random) -> str:
    """The tracking server is gone, and is started again."""
    return _for(dice.uniform(5, 40), made.kill_server, made.start_server)


def freeze_server(made: Cluster, dice: Random) -> str:
    """The tracking server takes connections and does not answer."""
    send = made.signal_server
    return _for(dice.uniform(5, 40), lambda: send(signal.SIGSTOP), lambda: send(signal.SIGCONT))


def fail_server(made: Cluster, dice: Random) -> str:
    """The tracking server answers everything with errors."""
    return _for(dice.uniform(5, 40), made.start_failing_server, made.start_server)


def slow_server(made: Cluster, dice: Random) -> str:
    """The tracking server answers every request right, and late."""
    delay_s, pause_s = dice.uniform(1, 8), dice.uniform(15, 45)
    told = _for(pause_s, lambda: made.slow_server_down(delay_s), made.start_server)
    return f"by {delay_s:.1f} s {told}"


def _for(pause_s: float, harm: Callable[[], None], heal: Callable[[], None]) -> str:
    """Do harm, and heal it after a while."""
    harm()
    time.sleep(pause_s)
    heal()
    return f"for {pause_s:.0f} s"
