"""For all tests: what the program that started them has left behind."""

import signal

# Under nohup SIGHUP is ignored, and so it would be by every process that a test starts.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
