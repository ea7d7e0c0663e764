"""What `scripts/gpu_check.sh` runs on a machine with one GPU, in parts that stand alone.

::

    parts      the list of parts with their time limits, the goals, and what the table shows: data, no JAX
    figures   what one part measured so far, in a file, so that a part that is cut off loses nothing
    check      what a part is told; shapes and sizes of engines, real and small
    ...        a module for each part, or for two that share their way to measure, with a function for each
    report     all figures as one record and one table with the goals beside the measured values
"""
