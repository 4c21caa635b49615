"""A node of the run that its cluster takes away by notice: a spot machine, a cluster that shrinks, `ray drain-node`.

Ray Train lets the workers go on until the node's deadline and starts them anew elsewhere; what they did since the last
checkpoint is lost. So there is one behind the step that hears of it.
"""

import logging
import os
import time

from hovle_train.runtime import Runtime

logger = logging.getLogger(__name__)

# As often as Ray Train itself looks after its nodes: each look is a round through one of its actors.
LOOK_SECONDS = float(os.environ.get("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "5"))


class Notice:
    """Rank 0 says when it is time to look (`due`), since all ranks have to; then all do."""

    def __init__(self, runtime: Runtime):
        self._runtime = runtime
        self._looked = time.monotonic()
        self._came = self._heeded = False

    @property
    def due(self) -> bool:
        if self._came or self._runtime.is_losing_node is None:
            return False
        return self._runtime.is_main and time.monotonic() - self._looked >= LOOK_SECONDS

    def look(self) -> None:
        assert self._runtime.is_losing_node is not None
        self._came = self._runtime.is_losing_node()
        self._looked = time.monotonic()

    def take(self) -> bool:
        """Whether a notice came that nobody has taken yet."""
        new, self._heeded = self._came and not self._heeded, self._came
        if new and self._runtime.is_main:
            logger.warning("a node of this run is to go: a checkpoint before it does")
        return new
