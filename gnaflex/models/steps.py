"""Which step of a run a model is in, told from the timesteps it is called with."""

from __future__ import annotations

from typing import Any

from torch import Tensor


class Clock:
    """Counts the steps of the runs of a pipeline, or of a bare transformer.

    A step is a change of the timestep, so that the calls of classifier-free guidance are one step, and so are
    those of several models that share a clock. A run begins when the scheduler was given new timesteps, when
    the first timestep of the run comes back, or, without a scheduler, when the timestep grows.
    """

    def __init__(self, pipe: Any = None, steps: int | None = None) -> None:
        self._pipe = pipe
        self._given = steps
        self._of_run: Any = None  # the scheduler's timesteps when the run began
        self._steps: int | None = steps
        self._first = self._last = 0.0
        self.step = -1

    @property
    def steps(self) -> int | None:
        """Steps of the run, if they are known."""
        return self._steps

    def tick(self, timestep: Tensor) -> int:
        """The step (from 0) of a call with these timesteps: one, one per batch entry, or one per token, of
        which the last counts (the first frames of a video may be given, and have another one)."""
        now = float(timestep.flatten()[-1])  # on a GPU this waits for the step before
        if self.step < 0 or self._begins_run(now):
            self._of_run, self._steps = self._timesteps, self._given or self._count()
            self._first, self.step = now, 0
        elif now != self._last:
            self.step += 1
        self._last = now
        return self.step

    @property
    def _timesteps(self) -> Any:
        return getattr(getattr(self._pipe, "scheduler", None), "timesteps", None)

    def _begins_run(self, now: float) -> bool:
        if self._timesteps is not self._of_run:
            return True
        if now != self._last and now == self._first:
            return True
        return self._of_run is None and now > self._last

    def _count(self) -> int | None:
        """Distinct timesteps from where the scheduler begins (image-to-image leaves out the first ones)."""
        if self._of_run is None:
            return None
        begin = getattr(self._pipe.scheduler, "begin_index", None) or 0
        return len(set(self._of_run[begin:].tolist()))
