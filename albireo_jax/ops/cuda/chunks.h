// Products of chunks: a warp has 16 query vectors, and keys and values come from stages that all warps share.
#pragma once
#include "online_softmax.h"

struct Softmax {
  float peak[2], sum[2];  // of this thread's two query vectors, in base 2; a sum is this thread's share
  float out[SPANS][4][4];
  u32 power;  // of values' scales (units.h)
};

// The queries of a warp, and the positions of a thread's two; -1 where there is no query.
struct Queries {
  u32 q[SPANS][8];
  float unit;  // of products, beside codes (units.h)
  float shift[4];  // what products with keys begin with where these are too large
  int position[2];
};

// A thread's two channels of a chunk of keys, of a query.
__device__ __forceinline__ u32 query_pair(const u16 *query, int chunk, int lane) {
  const u16 *at = query + first_channel(chunk);
  if (!IS_WIDENED || KEEPS_ORDER) return *(const u32 *)(at + lane % 4 * 2);
  uint2 four = *(const uint2 *)(at + lane % 4 / 2 * 4);
  return lane % 2 ? high_halves(four.x, four.y) : low_halves(four.x, four.y);
}

__device__ __forceinline__ Queries read_queries(const u16 *queries, const Piece &piece, int head, int vector, int lane) {
  Queries read;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    int mine = vector + 8 * half, query = mine / GROUP;
    bool is_query = query < piece.queries;
    read.position[half] = is_query ? piece.position + query : -1;
    u64 at = ((u64)(piece.token + query) * HEADS + head) * GROUP + mine % GROUP;
#pragma unroll
    for (int span = 0; span < SPANS; span++)
#pragma unroll
      for (int j = 0; j < 4; j++) {
        bool is_channel = first_channel(span * 4 + j) < HEAD_DIM;
        read.q[span][2 * j + half] =
            is_query && is_channel ? query_pair(queries + at * HEAD_DIM, span * 4 + j, lane) : 0;
      }
  }
  read.unit = KV_KIND == 0 ? 1.0f : queries_into_f16(reinterpret_cast<u32(&)[SPANS * 8]>(read.q));
#pragma unroll
  for (int i = 0; i < 4; i++) read.shift[i] = 0.0f;
#pragma unroll
  for (int span = 0; SHIFTS_KEYS && span < SPANS; span++) {
    const u32(&q)[8] = read.q[span];
    multiply(read.shift, q[0], q[1], q[2], q[3], MINUS_1152, MINUS_1152);
    multiply(read.shift, q[4], q[5], q[6], q[7], MINUS_1152, MINUS_1152);
  }
  return read;
}

__device__ __forceinline__ Softmax begin_softmax() {
  Softmax state = {};
  state.peak[0] = state.peak[1] = UNSEEN * TO_BASE_2;
  state.power = LEAST_POWER;
  return state;
}

// Scores of a stage's keys, the softmax so far with them, and their weights as operands.
__device__ __forceinline__ void add_keys(Softmax &state, u32 (&weights)[TOKENS / 16][4], const Queries &queries,
                                         const u8 *stage, const Scales &read, int first, int end, bool is_seen_whole,
                                         int lane) {
  const int mine = place(lane % 8, lane / 8) * 16;
  float score[TOKENS / 8][4];
  const u32 power = state.power;
  const Scales scales = in_units(read, queries.unit, state.power);
#pragma unroll
  for (int n = 0; n < TOKENS / 8; n++) {
#pragma unroll
    for (int i = 0; i < 4; i++) score[n][i] = SHIFTS_KEYS ? queries.shift[i] : 0.0f;
#pragma unroll
    for (int span = 0; span < SPANS; span++) {
      const u32(&q)[8] = queries.q[span];
      u32 b[4];
      read_matrices(b, stage + further(mine, span * 4) + 8 * n * READ_ROW_BYTES);
      multiply(score[n], q[0], q[1], q[2], q[3], b[0], b[1]);
      multiply(score[n], q[4], q[5], q[6], q[7], b[2], b[3]);
    }
    float k_scale[2];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if (KV_KIND != 0 && i < 2) k_scale[i] = shuffle(scales.k[n / 4], n % 4 * 8 + lane % 4 * 2 + i);
      score[n][i] = capped(KV_KIND == 0 ? score[n][i] : score[n][i] * k_scale[i % 2]);
    }
  }
  if (!is_seen_whole) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int token = first + lane % 4 * 2, query = queries.position[half];
      const int last = min(end - 1, query) - token, before = query - WINDOW - token;
#pragma unroll
      for (int n = 0; n < TOKENS / 8; n++)
#pragma unroll
        for (int i = 0; i < 2; i++)
          if (8 * n + i > last || (WINDOW != 0 && 8 * n + i <= before)) score[n][2 * half + i] = MASKED;
    }
  }
  float fade[2], sum[2] = {0.0f, 0.0f};
#pragma unroll
  for (int half = 0; half < 2; half++) {
    float peak = score[0][2 * half];
#pragma unroll
    for (int n = 0; n < TOKENS / 8; n++) peak = fmaxf(peak, fmaxf(score[n][2 * half], score[n][2 * half + 1]));
    peak = fmaxf(state.peak[half], over_quad_max(peak) * TO_BASE_2);
    fade[half] = exp2_fast(state.peak[half] - peak);
    state.peak[half] = peak;
  }
#pragma unroll
  for (int n = 0; n < TOKENS / 8; n++) {
    float v_scale[2];
#pragma unroll
    for (int i = 0; KV_KIND != 0 && i < 2; i++)
      v_scale[i] = shuffle(scales.v[n / 4], n % 4 * 8 + lane % 4 * 2 + i);
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float x0 = weight(score[n][2 * half], state.peak[half]), x1 = weight(score[n][2 * half + 1], state.peak[half]);
      sum[half] += x0 + x1;
      if (KV_KIND != 0) x0 *= v_scale[0], x1 *= v_scale[1];
      weights[n / 2][n % 2 * 2 + half] = pack(x0, x1);
    }
  }
  state.sum[0] = state.sum[0] * fade[0] + sum[0];
  state.sum[1] = state.sum[1] * fade[1] + sum[1];
  if (!any_lane(fade[0] != 1.0f || fade[1] != 1.0f || state.power != power)) return;  // as in most stages
  if (KV_KIND != 0) fade[0] *= power_fade(power, state.power), fade[1] *= power_fade(power, state.power);
#pragma unroll
  for (int span = 0; span < SPANS; span++)
#pragma unroll
    for (int j = 0; j < 4; j++)
#pragma unroll
      for (int i = 0; i < 4; i++) state.out[span][j][i] *= fade[i / 2];
}

__device__ __forceinline__ void add_values(Softmax &state, const u32 (&weights)[TOKENS / 16][4], const u8 *stage,
                                           int lane) {
  const int mine = place(lane % 16, lane / 16) * 16;
#pragma unroll
  for (int k = 0; k < TOKENS / 16; k++) {
    const u32(&a)[4] = weights[k];
#pragma unroll
    for (int span = 0; span < SPANS; span++)
#pragma unroll
      for (int j = 0; j < 4; j += 2) {
        u32 b[4];
        read_transposed(b, stage + further(mine, span * 4 + j) + 16 * k * READ_ROW_BYTES);
        multiply(state.out[span][j], a[0], a[1], a[2], a[3], b[0], b[1]);
        multiply(state.out[span][j + 1], a[0], a[1], a[2], a[3], b[2], b[3]);
      }
  }
}
