"""A controller of jobs as a process of its own, to be killed: `python -m tests.integration.job_controller SETTINGS`."""

import sys
import time
from pathlib import Path

from service.jobs import settings_file
from service.jobs.controller import Controller
from service.jobs.desk import Desk

if __name__ == "__main__":
    controller = Controller(Desk(settings_file.load(Path(sys.argv[1]))))
    controller.start()
    print("begun", flush=True)
    while True:
        time.sleep(60)
