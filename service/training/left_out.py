"""The samples that a run left out as unreadable: over all workers, and over all the parts of an interrupted run."""

from collections.abc import Mapping
from typing import Any

from pipelines.manifest import Manifest
from service.run_folder import RunFolder
from service.training import distributed
from service.training.distributed import World

NAME = "left_out.json"


class LeftOut:
    """One on every worker.

    Args:
        splits: "train" and "eval", as they are counted, with their samples.
    """

    def __init__(self, splits: Mapping[str, Manifest], world: World) -> None:
        self._splits, self._world = dict(splits), world
        self._earlier: dict[str, set[int]] = {split: set() for split in splits}
        self._followed: dict[str, list[Mapping[int, str]]] = {split: [] for split in splits}

    def follow(self, split: str, skipped: Mapping[int, str]) -> None:
        """Count what a loader leaves out from now on: id -> where it lies and why it is bad."""
        self._followed[split].append(skipped)

    def state(self) -> dict[str, list[int]]:
        """The ids so far, by split, over all workers; all of them call it."""
        return {split: sorted(distributed.union(self._own(split), self._world)) for split in self._splits}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Count what an earlier part of the run left out, too."""
        for split, ids in self._earlier.items():
            ids |= {int(sample) for sample in state.get(split, ())}

    def write(self, folder: RunFolder) -> dict[str, int]:
        """Name them all in the run folder, if there are any; returns how many by split. All workers call it."""
        told = {split: {str(key): why for key, why in self._reasons(split).items()} for split in self._splits}
        everywhere = distributed.from_each(told)
        found = self.state()
        if self._world.is_main and any(found.values()):
            named = {}
            for split, ids in found.items():
                reasons = {key: why for each in everywhere for key, why in each[split].items()}
                named[split] = [reasons.get(str(sample), self._splits[split].describe(sample)) for sample in ids]
            folder.write(NAME, named)
        return {split: len(ids) for split, ids in found.items()}

    def _own(self, split: str) -> set[int]:
        return self._earlier[split] | self._reasons(split).keys()

    def _reasons(self, split: str) -> dict[int, str]:
        return {sample: why for skipped in self._followed[split] for sample, why in skipped.items()}
