"""Half an hour of training under a random schedule of faults: `make soak`, or `python -m tests.soak --help`.

Two machines with addresses of their own (network namespaces) train one job that is to end as if nothing had happened.
Needs root, as `make test-integration` does for its machines.
"""
