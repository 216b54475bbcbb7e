"""What can happen to the numbers: losses that are not finite, under each policy that a job may have for them."""

from random import Random

from service.errors import NonFiniteLossError
from tests.integration.processes import await_
from tests.soak.cluster import Cluster

# From the farthest step so far to the first bad one: time to name it before any worker is there.
_AHEAD = 20
POLICIES = ("skip", "rewind", "stop", "limit")


def spoil_losses(made: Cluster, dice: Random) -> str:
    """Losses are not finite, for good. The job leaves them out, goes back first, ends, or ends beyond its limit.

    One that has ended is started again by the lines that leave them out, as its last words advise.
    """
    policy, before = dice.choice(POLICIES), len(made.bad_steps())
    options, count = {
        "skip": ([], dice.randint(1, 3)),
        "rewind": (["on_nonfinite=rewind"], 1),
        "stop": (["on_nonfinite=stop"], 1),
        # As many as were left out already may be.
        "limit": ([f"nonfinite_limit={max(1, before)}"], max(1, before) - before + 1),
    }[policy]
    if options:
        made.go_on_with(options)
        # For whoever starts after that.
        made.options = []
    first = made.farthest() + _AHEAD + dice.randrange(_AHEAD)
    steps = list(range(first, first + count))
    if steps[-1] >= made.steps or made.is_done():
        return ""
    ended = made.ends[NonFiniteLossError.exit_code]
    made.spoil(steps)
    if policy in ("stop", "limit"):
        code = NonFiniteLossError.exit_code
        await_(lambda: made.ends[code] > ended, f"a launcher ends with {code}: {policy}, {steps}", 300, made.told)
    await_(lambda: made.latest().step > steps[-1] or made.is_done(), f"steps after {steps}", 300, made.told)
    return f"at steps {', '.join(map(str, steps))}, {policy}"
