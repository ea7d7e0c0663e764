"""The parts of the GPU check, which `scripts/gpu_check.sh` runs on a machine with one GPU; each stands alone.

::

    check_parts    the list of parts with their time limits, the goals, and the shown metrics: data, no JAX
    part_figures   the figures of one part so far, in a file, so that a part that is cut off loses nothing
    check          the settings of a part; shapes and sizes of engines, real and small
    ...            a module for each part, or for two that measure alike, with a function for each
    verdicts       all figures as one table with the goals beside the measured values
"""
