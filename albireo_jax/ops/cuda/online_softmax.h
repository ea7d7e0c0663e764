// The softmax over the keys so far: what prompts' chunks and decode rows have in common.
#pragma once
#include "units.h"

#define LOG2E 1.4426950408889634f
#define MASKED -1e30f
#define UNSEEN -5e29f  // the first running maximum: far above MASKED, so that exp2 gives exactly 0 for what is masked

// A score is a product of query and key, capped; this times it is the logarithm to base 2 of its weight.
#define TO_BASE_2 ((SOFT_CAP > 0 ? SOFT_CAP : SCALE) * LOG2E)
static_assert(SCALE > 0, "the largest product is the largest score");

__device__ __forceinline__ float capped(float product) {
  return SOFT_CAP > 0 ? tanhf(product * (SCALE / (SOFT_CAP > 0 ? SOFT_CAP : 1))) : product;
}

// The weight of a score beside that of the running maximum, given in base 2.
__device__ __forceinline__ float weight(float score, float peak) { return exp2_fast(fmaf(score, TO_BASE_2, -peak)); }

__device__ __forceinline__ float over_quad_max(float x) {
  x = fmaxf(x, shuffle_xor(x, 1));
  return fmaxf(x, shuffle_xor(x, 2));
}

__device__ __forceinline__ float over_quad_sum(float x) {
  x += shuffle_xor(x, 1);
  return x + shuffle_xor(x, 2);
}
