// The softmax over the keys so far, and the sum of the values that it weighs.
#pragma once
#include "cached_pages.h"

#define LOG2E 1.4426950408889634f
#define MASKED -1e30f
#define UNSEEN -5e29f  // the first running maximum: far above MASKED, so that exp2 gives exactly 0 for what is masked

struct Softmax {
  float peak[2], sum[2];         // of this thread's two query vectors; a sum is this thread's share
  float out[SPANS][4][4];
};

__device__ __forceinline__ u32 low_halves(u32 first, u32 second) { return __byte_perm(first, second, 0x5410); }
__device__ __forceinline__ u32 high_halves(u32 first, u32 second) { return __byte_perm(first, second, 0x7632); }

__device__ __forceinline__ float over_quad_max(float x) {
  x = fmaxf(x, shuffle_xor(x, 1));
  return fmaxf(x, shuffle_xor(x, 2));
}

__device__ __forceinline__ float over_quad_sum(float x) {
  x += shuffle_xor(x, 1);
  return x + shuffle_xor(x, 2);
}

__device__ __forceinline__ float base2_score(float product) {
  if (SOFT_CAP > 0) return SOFT_CAP * LOG2E * tanhf(product * (SCALE / (SOFT_CAP > 0 ? SOFT_CAP : 1)));
  return product * (SCALE * LOG2E);
}

// Scores of a stage's keys, the softmax so far with them, and their weights as bfloat16 operands.
__device__ __forceinline__ void add_keys(Softmax &state, u32 (&weights)[TOKENS / 16][4], const u32 (&q)[SPANS][8],
                                         const u8 *stage, int first, int end, const int (&position)[2],
                                         bool is_seen_whole, int lane) {
  float score[TOKENS / 8][4];
  const float *scales = (const float *)(stage + TOKENS * ROW_BYTES);
  int key[SPANS];
#pragma unroll
  for (int span = 0; span < SPANS; span++) key[span] = first_k(lane, span);
#pragma unroll
  for (int n = 0; n < TOKENS / 8; n++) {
#pragma unroll
    for (int i = 0; i < 4; i++) score[n][i] = 0.0f;
#pragma unroll
    for (int span = 0; span < SPANS; span++) {
      u32 b[4];
      read_k(b, stage + key[span] + 8 * n * ROW_BYTES);
      mma(score[n], q[span][0], q[span][1], q[span][2], q[span][3], b[0], b[1]);
      mma(score[n], q[span][4], q[span][5], q[span][6], q[span][7], b[2], b[3]);
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
      int token = 8 * n + lane % 4 * 2 + i % 2;
      score[n][i] = base2_score(KV_KIND == 0 ? score[n][i] : score[n][i] * scales[token]);
      if (!is_seen_whole) {
        int at = first + token, query = position[i / 2];
        bool is_seen = at < end && at <= query && (WINDOW == 0 || at > query - WINDOW);
        score[n][i] = is_seen ? score[n][i] : MASKED;
      }
    }
  }
#pragma unroll
  for (int half = 0; half < 2; half++) {
    float peak = score[0][2 * half];
#pragma unroll
    for (int n = 0; n < TOKENS / 8; n++) peak = fmaxf(peak, fmaxf(score[n][2 * half], score[n][2 * half + 1]));
    peak = fmaxf(state.peak[half], over_quad_max(peak));
    float fade = exp2_fast(state.peak[half] - peak), sum = 0.0f;
    state.peak[half] = peak;
#pragma unroll
    for (int n = 0; n < TOKENS / 8; n++) {
      float x0 = exp2_fast(score[n][2 * half] - peak), x1 = exp2_fast(score[n][2 * half + 1] - peak);
      sum += x0 + x1;
      if (KV_KIND != 0) {
        x0 *= scales[TOKENS + 8 * n + lane % 4 * 2];
        x1 *= scales[TOKENS + 8 * n + lane % 4 * 2 + 1];
      }
      weights[n / 2][n % 2 * 2 + half] = pack_bf16(x0, x1);
    }
    state.sum[half] = state.sum[half] * fade + sum;
#pragma unroll
    for (int span = 0; span < SPANS; span++)
#pragma unroll
      for (int j = 0; j < 4; j++) state.out[span][j][2 * half] *= fade, state.out[span][j][2 * half + 1] *= fade;
  }
}

__device__ __forceinline__ void add_values(Softmax &state, const u32 (&weights)[TOKENS / 16][4], const u8 *stage,
                                           int lane) {
  int value[SPANS];
#pragma unroll
  for (int span = 0; span < SPANS; span++) value[span] = first_v(lane, span);
#pragma unroll
  for (int k = 0; k < TOKENS / 16; k++) {
    const u32(&a)[4] = weights[k];
#pragma unroll
    for (int span = 0; span < SPANS; span++) {
      const u8 *at = stage + value[span] + 16 * k * ROW_BYTES;
      uint2 v0 = read_v(at), v1 = read_v(at + ROW_BYTES);
      uint2 v8 = read_v(at + 8 * ROW_BYTES), v9 = read_v(at + 9 * ROW_BYTES);
      mma(state.out[span][0], a[0], a[1], a[2], a[3], low_halves(v0.x, v1.x), low_halves(v8.x, v9.x));
      mma(state.out[span][1], a[0], a[1], a[2], a[3], high_halves(v0.x, v1.x), high_halves(v8.x, v9.x));
      mma(state.out[span][2], a[0], a[1], a[2], a[3], low_halves(v0.y, v1.y), low_halves(v8.y, v9.y));
      mma(state.out[span][3], a[0], a[1], a[2], a[3], high_halves(v0.y, v1.y), high_halves(v8.y, v9.y));
    }
  }
}
