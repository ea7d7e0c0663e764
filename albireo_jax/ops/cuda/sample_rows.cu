// The token of each row of logits, for NVIDIA GPUs, compiled at run time (see nvrtc.py). A block takes a row.
//
// `row_peaks` finds the largest logit of each row: the token of a greedy row. `draw_rows` draws for the others.
// It calculates no probability: XLA gives it the weight of each token, an integer, and its score, and the kernel
// finds which tokens top-k and top-p keep, and of these the one with the largest score. Counts and sums of
// integers are exact, so that no order of threads shows in a token.
//
// The least logit that a filter keeps is the first, from the largest down, at which an amount (a count for top-k,
// a weight for top-p) of all logits down to it has reached the row's share. It is found by histograms:
//
//     row ──▶ bins by distance from the largest logit ──▶ the bin where the share is reached
//         ──▶ the few tokens in it, listed in shared memory ──▶ bins by the bits of their logits, until one is left
//
// Where the list has no room, as for thousands of equal logits, the row itself is read again instead. Logits of
// minus infinity are never drawn, weigh nothing, and come last: they are passed over from the beginning.
//
// Macros, all integers: COLUMNS (logits of a row), WARPS, LIST (tokens that the list has room for), and DRAW
// (which of the two kernels).

#include "histogram.h"

enum { NUMBERS = COLUMNS % 4 == 0 ? 4 : 1 };  // that a thread reads at once: rows begin at multiples of it

// Calls with each of this thread's columns and what two arrays of the row hold there; without the second, with 0.
template <bool HAS_SECOND, typename Visit>
__device__ __forceinline__ void each_column(const u32 *a, const u32 *b, Visit visit) {
#pragma unroll 2
  for (int at = NUMBERS * threadIdx.x; at < COLUMNS; at += NUMBERS * THREADS) {
    u32 first[4] = {}, second[4] = {};
    load<NUMBERS>(first, a + at);
    if (HAS_SECOND) load<NUMBERS>(second, b + at);
#pragma unroll
    for (int i = 0; i < NUMBERS; i++) visit(at + i, first[i], second[i]);
  }
}

// The unsigned integer that orders like a float; both zeros have one.
__device__ __forceinline__ u32 key_of(float x) {
  u32 bits = __float_as_uint(x + 0.0f);
  return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}

// A number and its column as one integer: the largest number is the largest integer, the first among equals.
__device__ __forceinline__ u64 contender(float x, int column) { return (u64)key_of(x) << 32 | (u32)~column; }

__device__ __forceinline__ int column_of(u64 contender) { return (int)~(u32)contender; }

// The largest integer that a thread of the block brings, for all threads.
__device__ __forceinline__ u64 largest(u64 mine, u64 (&by_warp)[32]) {
  for (int far = 16; far > 0; far /= 2) {
    u64 other = shuffle_xor(mine, far);
    mine = other > mine ? other : mine;
  }
  if (threadIdx.x % 32 == 0) by_warp[threadIdx.x / 32] = mine;
  __syncthreads();
  for (int warp = 0; warp < WARPS; warp++) mine = by_warp[warp] > mine ? by_warp[warp] : mine;
  return mine;
}

enum : u32 { PLUS_INFINITY = 0x7f800000u, MINUS_INFINITY = 0xff800000u };

#if !DRAW
// The largest logit of each row and its column; infinite where a logit is not a number, as such a row has no token.
extern "C" __global__ void __launch_bounds__(THREADS) row_peaks(const u32 *logits, u32 *peaks, int *columns) {
  SHARED_MEMORY(shared, 256);
  const u32 *row = logits + (u64)blockIdx.x * COLUMNS;
  u64 best = 0;
  each_column<false>(row, row, [&](int column, u32 bits, u32) {
    const float logit = __uint_as_float(bits);
    const u64 mine = contender(logit == logit ? logit : __uint_as_float(PLUS_INFINITY), column);
    best = mine > best ? mine : best;
  });
  best = largest(best, *(u64 (*)[32])shared);
  if (threadIdx.x != 0) return;
  const u32 key = (u32)(best >> 32);
  peaks[blockIdx.x] = key ^ (key >> 31 ? 0x80000000u : 0xffffffffu);
  columns[blockIdx.x] = column_of(best);
}

#else
#include "select_rows.h"

// `asks` are temperature, top-k and top-p of each row.
extern "C" __global__ void __launch_bounds__(THREADS)
    draw_rows(const u32 *logits, const u32 *weights, const u32 *scores, const u32 *asks, const u32 *peaks,
              const int *columns, int *tokens) {
  SHARED_MEMORY(shared, sizeof(Work));
  const u32 *ask = asks + 3 * blockIdx.x, peak = ldg(peaks + blockIdx.x);
  const bool is_finite = (peak & PLUS_INFINITY) != PLUS_INFINITY;
  if (!is_finite || !(__uint_as_float(ldg(ask)) > 0.0f)) {
    if (threadIdx.x == 0) tokens[blockIdx.x] = is_finite ? ldg(columns + blockIdx.x) : NOT_FINITE;
    return;
  }
  const u64 begin = (u64)blockIdx.x * COLUMNS;
  const int top_k = (int)ldg(ask + 1);
  const Row row = {logits + begin,        weights + begin,
                   scores + begin,        __uint_as_float(peak),
                   top_k < COLUMNS && top_k > 0 ? top_k : 0, __uint_as_float(ldg(ask + 2))};
  const u64 best = select(row, *(Work *)shared);
  if (threadIdx.x == 0) tokens[blockIdx.x] = column_of(best);
}
#endif
