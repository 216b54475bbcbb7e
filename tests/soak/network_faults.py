"""What can happen to what machines reach over the network: each other, the rendezvous, the tracking server."""

import signal
import time
from random import Random

from tests.soak.cluster import TIMEOUT_S, Cluster


def pull_cable(made: Cluster, dice: Random) -> str:
    """One machine is cut off from all others, for longer than they wait for it."""
    machine, pause_s = dice.choice(made.machines), dice.uniform(TIMEOUT_S, 2.5 * TIMEOUT_S)
    machine.set_link("down")
    time.sleep(pause_s)
    machine.set_link("up")
    return f"{machine.address} for {pause_s:.0f} s"


def kill_rendezvous(made: Cluster, dice: Random) -> str:
    """The place where the machines meet is gone with all that it knew, and is started again at its address."""
    pause_s = dice.uniform(1, 20)
    made.kill_rendezvous()
    time.sleep(pause_s)
    made.start_rendezvous()
    return f"for {pause_s:.0f} s"


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


def slow_server(made: Cluster, dice: Random) -> str:
    """The tracking server answers every request right, and late."""
    delay_s, pause_s = dice.uniform(1, 8), dice.uniform(15, 45)
    made.slow_server_down(delay_s)
    time.sleep(pause_s)
    made.signal_server(signal.SIGKILL)
    made.start_server()
    return f"by {delay_s:.1f} s for {pause_s:.0f} s"
