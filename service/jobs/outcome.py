"""How a job's end gets into the record when its workers could not say it: the launcher, which outlives them, does."""

from service import recovery
from service.errors import REQUEUE, JobError
from service.run_folder import RunFolder


def settle(folder: RunFolder, error: JobError) -> None:
    """Mark the run as its launcher saw it end, unless the workers have done so; takes some seconds at most."""
    stopped = error.exit_code == REQUEUE or error.exit_code > 128
    recovery.settle(folder.path, "KILLED" if stopped else "FAILED", str(error).splitlines()[0])
