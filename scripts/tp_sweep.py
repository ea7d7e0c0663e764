"""The tensor-parallel sweep of the Albireo paper on this system: which degree t serves most, and why.

For each degree t of N GPUs, N/t replicas get the same load, 32 requests per GPU at once as in the paper,
served synchronously, overlapped, and overlapped with sharded sampling. What it leaves in the folder --out:

    sweep.html     throughput of the cluster over t with t_e marked (the paper's Figures 1 and 10), per GPU,
                   time per output token (Figure 14), the tasks of a step, and energy (Figure 15)
    sweep.json     all of it as data
    cases/         a file per degree: the same command again measures only what is missing

Flags are those of `albireo sweep`, which this is:

    python scripts/tp_sweep.py /models/Qwen2.5-32B --gpus 8 --tp 1,2,4,8 --out qwen32b
    python scripts/tp_sweep.py /models/small --gpus 8 --virtual-devices 8 --batch-per-gpu 4     without a GPU
"""

import sys

from albireo_jax.cli import main

if __name__ == "__main__":
    main(("sweep", *sys.argv[1:]))
