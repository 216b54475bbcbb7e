"""The learning rate as a pure function of the optimizer step, so that a resumed run needs no scheduler state."""

import math

from service.config import ScheduleConfig

# OneCycleLR's `div_factor`: the rate at step 0 is the peak divided by this.
_ONE_CYCLE_START = 25.0


def learning_rate(
    config: ScheduleConfig, peak: float, step: int, total_steps: int, samples_per_epoch: int, global_batch: int
) -> float:
    """The rate for optimizer step `step`, counted from 0.

    cosine, linear and step rise linearly over the `warmup` of w steps, the first of them at peak / (w + 1), and reach
    the peak at step w. cosine and linear then fall to `final * peak` at `total_steps`, one step after the last; step
    multiplies by `gamma` at every milestone, counted from the start of training. one_cycle is torch's OneCycleLR
    (Smith and Topin 2018, https://arxiv.org/abs/1708.07120): along half a cosine from peak / 25 to the peak at the
    last warm-up step, and along another to `final * peak` at the last step.

    Args:
        peak: the highest rate.
        total_steps: optimizer steps of the whole run; a step beyond them has the last one's rate.
        samples_per_epoch: length of the training set, for durations in epochs.
        global_batch: samples per optimizer step.
    """
    sizes = {"samples_per_epoch": samples_per_epoch, "global_batch": global_batch, "total_steps": total_steps}
    warmup = config.warmup.steps(**sizes)
    step = min(step, total_steps - 1)
    if config.name == "one_cycle":
        return peak * _one_cycle(step, warmup, total_steps, config.final)
    rise = min(1.0, (step + 1) / (warmup + 1))
    if config.name == "step":
        return peak * rise * config.gamma ** sum(step >= milestone.steps(**sizes) for milestone in config.milestones)
    if step < warmup:
        return peak * rise
    done = (step - warmup) / max(1, total_steps - warmup)
    if config.name == "cosine":
        return peak * _cosine(1.0, config.final, done)
    return peak * (1 + (config.final - 1) * done)


def _one_cycle(step: int, warmup: int, total_steps: int, final: float) -> float:
    top, last = max(0, warmup - 1), total_steps - 1
    if step < top:
        return _cosine(1 / _ONE_CYCLE_START, 1.0, step / top)
    return _cosine(1.0, final, (step - top) / max(1, last - top))


def _cosine(start: float, end: float, share: float) -> float:
    """From `start` at share 0 to `end` at share 1 along half a cosine."""
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2
