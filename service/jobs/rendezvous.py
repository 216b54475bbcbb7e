"""Where the machines of a job meet, kept outside of them so that none of them can take it along. Imports torch late."""

import contextlib
import signal
import socket
from collections.abc import Callable
from datetime import timedelta

from service.errors import ConfigError
from service.jobs.nodes import PORT

_STOPS = (signal.SIGINT, signal.SIGTERM)
# For this process's own connection to the store; it says nothing of the machines.
_TIMEOUT_S = 30


def serve(host: str | None, port: int = PORT, say: Callable[[str], object] = print) -> None:
    """Keep torch's store for rendezvous until SIGTERM or SIGINT comes; any number of jobs may meet there.

    A script's background processes have SIGINT ignored, and that is to last: Ctrl-C there is for the jobs, which need
    this place until they have ended.

    It holds who takes part, and nothing of the training. It listens on all addresses of this machine, without a
    password: it belongs into the jobs' own network.

    Args:
        host: how the other machines call this one; None: its address in the network.
        port: 0 chooses a free one.
        say: is told the address once the store is there.

    Raises:
        ConfigError: the port is taken, or the host is not this machine.
    """
    stops = [number for number in _STOPS if signal.getsignal(number) != signal.SIG_IGN]
    # Blocked in the store's threads as well, so that the wait below gets them.
    signal.pthread_sigmask(signal.SIG_BLOCK, stops)
    from torch.distributed import DistError, TCPStore

    name = host or _own_address()
    try:
        store = TCPStore(
            name,
            port,
            is_master=True,
            wait_for_workers=False,
            multi_tenant=True,
            timeout=timedelta(seconds=_TIMEOUT_S),
        )
    except (DistError, RuntimeError) as error:
        raise ConfigError(
            f"no rendezvous at {name}:{port}: {str(error).splitlines()[0]}; is the port taken (--port 0 chooses a "
            "free one), and is --host this machine's own name?"
        ) from None
    where = f"[{name}]:{store.port}" if ":" in name else f"{name}:{store.port}"
    say(f"rendezvous ready at {where}\non each machine: lorot train CONFIG --nnodes MIN:MAX --rdzv {where}")
    signal.sigwait(stops)


def _own_address() -> str:
    """This machine's address in its network; the loopback's if it is in none."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        # A datagram socket only chooses its address; nothing is sent. The address is one kept for documentation.
        probe.connect(("192.0.2.1", 9))
        return str(probe.getsockname()[0])
    return "127.0.0.1"
