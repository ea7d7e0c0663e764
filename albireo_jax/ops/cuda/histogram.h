// Amounts of tokens in bins, exact: how many there are, and their weight, an integer of 64 bits in two words.
#pragma once

#include "device.h"

enum {
  THREADS = 32 * WARPS,
  BIN_BITS = 10,
  BINS = 1 << BIN_BITS,
  BINS_PER_THREAD = BINS / THREADS,
};
static_assert(WARPS <= 32 && BINS % THREADS == 0, "each thread has as many bins");

struct Amount {
  u32 count;
  u64 weight;
};

__device__ __forceinline__ Amount operator+(Amount a, Amount b) { return {a.count + b.count, a.weight + b.weight}; }

// An exact weight in float32, rounded as `sampling.filters.mass_value` rounds it.
__device__ __forceinline__ float rounded(u64 weight) {
  return (float)(u32)(weight >> 16) * 65536.0f + (float)(u32)(weight & 0xffff);
}

// In shared memory. `warp_count` and `warp_weight` hold the sum of each warp's bins.
struct Histogram {
  u64 warp_weight[32];
  u32 warp_count[32];
  u32 count[BINS], low[BINS], high[BINS];
};

__device__ __forceinline__ void clear(Histogram &bins) {
  for (int bin = threadIdx.x; bin < BINS; bin += THREADS) bins.count[bin] = bins.low[bin] = bins.high[bin] = 0;
  __syncthreads();
}

__device__ __forceinline__ void add(Histogram &bins, int bin, u32 weight) {
  atomic_add(bins.count + bin, 1);
  if (weight != 0 && atomic_add(bins.low + bin, weight) > ~weight) atomic_add(bins.high + bin, 1);
}

__device__ __forceinline__ Amount amount(const Histogram &bins, int bin) {
  if (bin < 0) return {0, 0};
  return {bins.count[bin], (u64)bins.high[bin] << 32 | bins.low[bin]};
}

// Turns the amount of each bin into that of all bins up to it.
__device__ __forceinline__ void accumulate(Histogram &bins) {
  __syncthreads();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, first = threadIdx.x * BINS_PER_THREAD;
  Amount own = {0, 0};
  for (int bin = first; bin < first + BINS_PER_THREAD; bin++) own = own + amount(bins, bin);
  Amount up_to = own;
  for (int far = 1; far < 32; far *= 2) {
    Amount before = {shuffle_up(up_to.count, far), shuffle_up(up_to.weight, far)};
    if (lane >= far) up_to = up_to + before;
  }
  if (lane == 31) bins.warp_count[warp] = up_to.count, bins.warp_weight[warp] = up_to.weight;
  __syncthreads();
  Amount sum = {up_to.count - own.count, up_to.weight - own.weight};
  for (int other = 0; other < warp; other++) sum = sum + Amount{bins.warp_count[other], bins.warp_weight[other]};
  for (int bin = first; bin < first + BINS_PER_THREAD; bin++) {
    sum = sum + amount(bins, bin);
    bins.count[bin] = sum.count, bins.low[bin] = (u32)sum.weight, bins.high[bin] = (u32)(sum.weight >> 32);
  }
  __syncthreads();
}
