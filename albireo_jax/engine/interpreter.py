"""Settings of the Python interpreter that keep the engine thread's steps short."""

import gc
import sys

_SWITCH_INTERVAL_S = 0.0005
"""Time after which a thread that computes in Python lets another have the interpreter; Python's is ten times
as long, and a step asks for the interpreter several times."""


def settle_interpreter() -> None:
    """Spare what lives now all later garbage collections, and let threads take turns more often.

    A collection of all objects stops every thread for as long as it takes to visit them; most of them
    were made while modules were imported and programs compiled. `release_interpreter` undoes the first.
    """
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    gc.collect()
    gc.freeze()


def release_interpreter() -> None:
    """Let garbage collections visit everything again, so that a closed engine's memory is found."""
    gc.unfreeze()
