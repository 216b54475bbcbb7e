"""What a tiny job runs in place of training: it notes that it begins and ends, and writes some lines meanwhile.

    python -I -S tiny_job.py LEDGER

Job and attempt are those that the service names in its environment. TINY_LINES and TINY_SECONDS say how many lines,
over how long. A second start of the same attempt would be noted too.
"""

import os
import sys
import time


def main() -> None:
    (ledger,) = sys.argv[1:]
    job, attempt = os.environ["LOROT_RUN_ID"], os.environ["LOROT_JOB_ATTEMPT"]
    lines, seconds = int(os.environ.get("TINY_LINES", "1")), float(os.environ.get("TINY_SECONDS", "0"))
    note(ledger, f"begin {job} {attempt}")
    began = time.monotonic()
    for number in range(lines):
        print(f"line {number} of {job}", flush=True)
        time.sleep(max(0.0, began + seconds * (number + 1) / lines - time.monotonic()))
    note(ledger, f"end {job} {attempt}")


def note(ledger: str, text: str) -> None:
    """One write, which the kernel puts at the end of the file whoever else does the same."""
    descriptor = os.open(ledger, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.write(descriptor, f"{text}\n".encode())
    os.close(descriptor)


if __name__ == "__main__":
    main()
