"""The loop where a signal, a failed write or an abandoned evaluation comes into it: what is saved and what is owed."""

from collections.abc import Callable, Mapping

import pytest

from service.errors import JobError, StorageError
from service.training import loop
from service.training.watch import Watch
from tests.service.test_nonfinite import LENGTHS, STEPS, Keeper, Trained, batches, job

EVERY_TWO = LENGTHS.__class__(1000, total=STEPS, record=STEPS, evaluate=2, save=0)


class Heard:
    """A signal that comes after so many steps were asked about it."""

    def __init__(self, number: int, after: int) -> None:
        self.number, self.left = number, after

    def __call__(self) -> int:
        self.left -= 1
        return self.number if self.left < 0 else 0


def run(trained: Trained, evaluate: Callable[[], Mapping[str, float] | None], first_step: int = 0) -> None:
    given = batches(first_step, spoil=False)
    loop.train(
        trained.config,
        EVERY_TWO,
        trained.engine,
        trained.ema,
        given,
        trained.meters,
        evaluate,
        trained.keeper,
        trained.watch,
        first_step,
    )


@pytest.mark.parametrize(("number", "code"), [(2, 130), (15, 75), (10, 75)])
def test_a_signal_saves_after_the_step_and_leaves_the_evaluation_for_later(number: int, code: int) -> None:
    trained = Trained(job())
    trained.watch = Watch(trained.config, trained.engine, trained.keeper, Heard(number, 1))
    with pytest.raises(JobError, match="stopped after step 2; checkpoint 7 is saved") as caught:
        run(trained, lambda: pytest.fail("it was evaluated"))
    trained.engine.close()
    assert caught.value.exit_code == code
    assert trained.keeper.saved == [2]
    assert trained.watch.state() == {"left_out": [], "nonfinite_steps": [], "owes_evaluation": True}


def test_an_evaluation_that_gave_up_is_owed_and_made_up_for_before_the_next_step() -> None:
    trained = Trained(job())
    trained.watch = Watch(trained.config, trained.engine, trained.keeper, Heard(15, 2))

    def give_up() -> None:
        assert trained.watch.asked_to_stop()

    with pytest.raises(JobError, match="stopped after step 2"):
        run(trained, give_up)
    state = trained.watch.state()
    assert state["owes_evaluation"]
    assert [record for _, record in trained.keeper.records if "val/top1" in record] == []
    trained.engine.close()

    resumed = Trained(job())
    resumed.watch.load_state(state)
    seen: list[int] = []

    def evaluate() -> Mapping[str, float]:
        seen.append(len(resumed.keeper.saved))
        return {"val/top1": 0.25}

    run(resumed, evaluate, first_step=2)
    resumed.engine.close()
    assert [step for step, record in resumed.keeper.records if "val/top1" in record] == [2, 4, 5]
    # The checkpoint of step 2 is written again, now with what was measured, or it would be owed once more.
    assert resumed.keeper.saved[0] == 2
    assert seen[0] == 0
    assert resumed.watch.state()["owes_evaluation"] is False


def test_a_signal_at_the_last_step_saves_and_leaves_the_last_evaluation_to_the_resumed_run() -> None:
    trained = Trained(job())
    trained.watch = Watch(trained.config, trained.engine, trained.keeper, Heard(15, STEPS - 1))
    with pytest.raises(JobError, match=f"stopped after step {STEPS}") as caught:
        run(trained, lambda: {"val/top1": 0.5})
    trained.engine.close()
    assert caught.value.exit_code == 75
    assert trained.keeper.saved == [STEPS]
    assert trained.watch.owes_evaluation


def test_a_checkpoint_that_could_not_be_written_ends_the_run_at_the_next_step() -> None:
    class Failing(Keeper):
        def write_failed(self) -> bool:
            return True

        def finish_writing(self) -> None:
            raise StorageError("the disk is full")

    trained = Trained(job())
    trained.keeper = Failing()
    trained.watch = Watch(trained.config, trained.engine, trained.keeper)
    with pytest.raises(StorageError, match="the disk is full"):
        run(trained, lambda: {"val/top1": 0.5})
    trained.engine.close()
    assert trained.keeper.records == []
