"""How a job's end gets into the record when its workers could not say it: the launcher, which outlives them, does."""

import math
import threading

from service import recovery
from service.errors import REQUEUE, JobError
from service.run_folder import RunFolder


def settle(folder: RunFolder, error: JobError, within_s: float = math.inf) -> None:
    """Mark the run as its launcher saw it end, unless the workers have done so; takes some seconds at most.

    Args:
        within_s: to wait for that. What the server was not told by then waits in the spool.
    """
    stopped = error.exit_code == REQUEUE or error.exit_code > 128
    said = (folder.path, "KILLED" if stopped else "FAILED", str(error).splitlines()[0])
    # What is imported for it, or a lock on a disk, has no time limit of its own.
    thread = threading.Thread(target=recovery.settle, args=said, name="outcome", daemon=True)
    thread.start()
    thread.join(None if math.isinf(within_s) else within_s)
