"""Stands in for `lorot`, `ssh`, `srun`, `scontrol` and `hostname`: says how it was called, and ends as it is told to.

CALLS: the file for the calls, a line of JSON each. CODE: what a training ends with; "stopped": 75, after a SIGTERM.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

name, arguments = Path(sys.argv[0]).name, sys.argv[1:]


def note(*what: object) -> None:
    with open(os.environ["CALLS"], "a") as file:
        file.write(json.dumps(what) + "\n")


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def train() -> int:
    # The rendezvous is beside it, and may be slow to come.
    while '"rendezvous"' not in Path(os.environ["CALLS"]).read_text() and "MEET" not in os.environ:
        time.sleep(0.01)
    print("trained", flush=True)
    if os.environ["CODE"] != "stopped":
        return int(os.environ["CODE"])
    signal.sigwait([signal.SIGTERM])
    print("stopped", flush=True)
    note("stopped")
    return 75


signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
if name == "hostname":
    print("login1.example")
elif name == "ssh":
    note(name, *arguments[:2])
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    line = ["bash", "-c", arguments[2]]
    if arguments[2].startswith("kill"):
        # A slow one: the training has ended before the script looks again.
        subprocess.run(line, check=True)
        while lives(int(arguments[2].split()[-1])):
            time.sleep(0.01)
    else:
        os.execvp("bash", line)
else:
    note(name, *arguments)
    if arguments[0] == "rendezvous":
        note("heeds Ctrl-C" if signal.getsignal(signal.SIGINT) != signal.SIG_IGN else "leaves Ctrl-C to others")
        signal.sigwait([signal.SIGTERM])
        note("rendezvous ended")
    elif "train" in arguments:
        sys.exit(train())
