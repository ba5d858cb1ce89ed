"""Which step of a run a model is in, told from its scheduler, or from the timesteps it is called with."""

from __future__ import annotations

import itertools
from typing import Any

from torch import Tensor


class Clock:
    """Counts the steps of the runs of a pipeline, or of a bare transformer.

    A step is a change of the timestep, so that the calls of classifier-free guidance are one step, and so are
    those of several models that share a clock. A scheduler that counts its own steps is asked: timesteps come
    rounded to the model's dtype, where neighbours may be equal. Else a run begins when the scheduler was
    given new timesteps, when the first timestep of the run comes back, or, without a scheduler, when the
    timestep grows.
    """

    def __init__(self, pipe: Any = None, steps: int | None = None) -> None:
        self._pipe, self._given = pipe, steps
        self._of_run: Any = None  # the scheduler's timesteps when the run began
        self._changes: list[
            int
        ] = []  # before each of them, from where the run begins; the last is their step
        self._there: list[float] = []
        self._begin, self._begin_is_known = 0, True
        self._first = self._last = 0.0
        self.step = -1

    def __deepcopy__(self, memo: Any) -> Clock:
        return self  # a copied model is in the same run; its pipeline is not copied with it

    @property
    def steps(self) -> int | None:
        """Steps of the run, if they are known."""
        return self._given or (self._changes[-1] + 1 if self._changes else None)

    def tick(self, timestep: Tensor) -> int:
        """The step (from 0) of a call with these timesteps: one, one per batch entry, or one per token, of
        which the last counts (the first frames of a video may be given, and have another one)."""
        if self._timesteps is not self._of_run:
            self._begin_run()
        index = getattr(self._scheduler, "step_index", None)
        if index is not None and self._changes:
            if not self._begin_is_known and self.step == 0:  # this is the call after the first step
                self._begin_at(index - 1)
            self.step = self._changes[min(max(index - self._begin, 0), len(self._changes) - 1)]
        else:
            self._by_timestep(float(timestep.flatten()[-1]))  # on a GPU this waits for the step before
        return self.step

    @property
    def _scheduler(self) -> Any:
        return getattr(self._pipe, "scheduler", None)

    @property
    def _timesteps(self) -> Any:
        return getattr(self._scheduler, "timesteps", None)

    def _begin_run(self) -> None:
        """Image-to-image leaves out the first timesteps: the scheduler knows how many, or the pipeline."""
        self._of_run, self.step = self._timesteps, -1
        self._there = [] if self._of_run is None else self._of_run.tolist()
        begin, count = getattr(self._scheduler, "begin_index", None), len(self._there)
        if begin is None:  # the pipeline's count may be that of an earlier run
            begin = count - (getattr(self._pipe, "_num_timesteps", None) or count)
        self._begin_at(begin)
        self._begin_is_known = getattr(self._scheduler, "begin_index", None) is not None

    def _begin_at(self, begin: int) -> None:
        self._begin, self._begin_is_known = max(begin, 0), True
        taken = self._there[self._begin :]
        changed = (now != before for before, now in itertools.pairwise(taken))
        self._changes = [*itertools.accumulate(changed, initial=0)] if taken else []

    def _by_timestep(self, now: float) -> None:
        back = now != self._last and now == self._first
        grows = self._of_run is None and now > self._last
        if self.step < 0 or back or grows:
            self._first, self.step = now, 0
        elif now != self._last:
            self.step += 1
        self._last = now
