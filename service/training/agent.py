"""torchrun on one of several machines, as `lorot train` starts it: the same lines go on with the job, whatever happens.

    python -m service.training.agent ...                with torchrun's options

Two things are not as torch has them. A torchrun that ends by an error of its own, as one that waited too long for
others or met one that had died, closes the job's meeting at the rendezvous for good; here only the job's end does. And
a machine whose sign of life was late is struck off without being told, and never learns it as long as its workers do
not fail, as frozen ones; here it finds that the others have formed anew without it, starts its workers again and joins.
"""

import sys

from torch.distributed import run
from torch.distributed.elastic.rendezvous import RendezvousInfo, dynamic_rendezvous
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler


class Meeting(DynamicRendezvousHandler):
    """This machine's part at the rendezvous."""

    _joined = -1

    def next_rendezvous(self) -> RendezvousInfo:
        """Meet the others."""
        found = super().next_rendezvous()
        self._joined = self._state_holder.state.round
        return found

    def num_nodes_waiting(self) -> int:
        """Machines to be taken in, this one among them if the others have formed anew without it."""
        waiting = super().num_nodes_waiting()
        state = self._state_holder.state
        # Struck off alone it may train on; so may all, after a pause of theirs or of the rendezvous.
        others_met = state.round != self._joined and bool(state.participants)
        return max(waiting, int(others_met and self._this_node not in state.participants))

    def shutdown(self) -> bool:
        """Leave, and close the meeting unless an error is the reason."""
        if sys.exc_info()[0] is None:
            return super().shutdown()
        self._stop_heartbeats()
        return False


def main() -> None:
    """Be torchrun."""
    dynamic_rendezvous.DynamicRendezvousHandler = Meeting  # type: ignore[misc]
    run.main()


if __name__ == "__main__":
    main()
