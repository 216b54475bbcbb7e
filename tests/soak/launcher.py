"""`lorot`, but for the workers of its jobs: they are those of `tests.soak.worker`, whose losses may not be finite."""

import sys

from service import cli
from service.jobs import local

if __name__ == "__main__":
    local.WORKER = "tests.soak.worker"
    sys.exit(cli.main(sys.argv[1:]))
