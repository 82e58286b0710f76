"""What an error holds: the frames of its traceback keep the handles of actors, and so CPUs and GPUs, as long as it
exists."""

from __future__ import annotations

import gc
import traceback


def let_go(error: BaseException, *, forget: bool = False) -> None:
    """Clear the frames that `error` and the errors it comes from have left, and collect what was in them.

    Args:
        forget: take the tracebacks off the errors it comes from. A frame that is cleared still has its callers and its
            function, whose closure may hold a handle.
    """
    chain: list[BaseException] = [error]
    for one in chain:  # grows while it is read
        traceback.clear_frames(one.__traceback__)
        chain += [e for e in (one.__cause__, one.__context__) if e is not None and e not in chain]
    if forget:
        for one in chain[1:]:
            one.__traceback__ = None
    gc.collect()
