"""The time of collectives between the GPUs of one machine: latency, and bytes over bandwidth.

A collective of t ranks takes `start_s + hop_s * log2(t) + wire_bytes / bytes_per_s`, where the wire bytes are
those that a rank sends in the bandwidth-optimal algorithm: 2 (t-1)/t of an all-reduced array, (t-1)/t of the
result of an all-gather or of the array of an all-to-all. XLA calls NCCL, so the figures are NCCL's.

Of all-reduces, the constants are fits to what others measured. Of all-gathers and all-to-alls between few
GPUs nothing as good was found: the same latency and bandwidth are assumed for them.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Links:
    """The connections between the GPUs of a machine, and in words where their figures come from."""

    start_s: float
    hop_s: float
    bytes_per_s: float
    source: str

    def all_reduce_s(self, num_bytes: float, *, ranks: int) -> float:
        """Seconds until every rank has the sum of arrays of `num_bytes`."""
        return self._seconds(2 * num_bytes, ranks)

    def all_gather_s(self, num_bytes: float, *, ranks: int) -> float:
        """Seconds until every rank has all shards of an array of `num_bytes`."""
        return self._seconds(num_bytes, ranks)

    def all_to_all_s(self, num_bytes: float, *, ranks: int) -> float:
        """Seconds until every rank has its parts of the others' arrays, of `num_bytes` each."""
        return self._seconds(num_bytes, ranks)

    def _seconds(self, sent_bytes: float, ranks: int) -> float:
        if ranks == 1:
            return 0.0
        wire_bytes = sent_bytes * (ranks - 1) / ranks
        return self.start_s + self.hop_s * math.log2(ranks) + wire_bytes / self.bytes_per_s


NVLINK_4 = Links(
    start_s=0.0,
    hop_s=7.4e-6,
    bytes_per_s=340e9,
    source=(
        "NCCL all-reduces on H100s: 17, 19, 26 and 37 µs for 0.5, 1, 2 and 4 MiB at t=4 "
        "(github.com/vllm-project/vllm/pull/24111), 24, 25, 37, 50, 76, 121 and 195 µs for 0.5, 1, 2, 4, 8, "
        "16 and 32 MiB between more (github.com/vllm-project/vllm/pull/42324, taken for t=8), about 6 µs for "
        "little at t=2 (github.com/NVIDIA/nccl/issues/1259); the fit is within 15% of those"
    ),
)
"""Of the H100 and H200 SXM: 450 GB/s each way, of which NCCL reaches 370 (nccl-tests issue 212)."""

NVLINK_3 = Links(
    start_s=0.0,
    hop_s=7.4e-6,
    bytes_per_s=200e9,
    source=(
        "NCCL reaches about 200 GB/s between A100s over NVLink (github.com/NVIDIA/nccl-tests/issues/149); "
        "latency is assumed to be that of H100s"
    ),
)
"""Of the A100 SXM: 300 GB/s each way."""

NVLINK_5 = Links(
    start_s=6e-6,
    hop_s=7.4e-6,
    bytes_per_s=480e9,
    source=(
        "NCCL all-reduces on B200s at t=2: 13 µs for 0.5 MiB and 281 µs for 128 MiB "
        "(github.com/vllm-project/vllm/pull/42324); that latency grows with t as on H100s is assumed"
    ),
)
"""Of the B200 SXM: 900 GB/s each way."""

PCIE_4 = Links(
    start_s=0.0,
    hop_s=14e-6,
    bytes_per_s=20e9,
    source=(
        "NCCL takes 43 µs for 8 bytes between 8 GPUs over PCIe (github.com/NVIDIA/nccl/issues/1530, RTX "
        "4090) and reaches 20 GB/s between A100s without NVLink (github.com/NVIDIA/nccl-tests/issues/178)"
    ),
)
"""Of the A100 PCIe without NVLink bridges: 32 GB/s each way."""
