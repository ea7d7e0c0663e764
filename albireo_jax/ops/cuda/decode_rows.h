// Products of decode rows: each warp has stages of its own, and its tokens are the rows of the products, as there are
// 16 of these and few query vectors. S^T = K Q^T and O^T = V^T P^T: half the products of the other way round where
// no more than 8 query heads share a key, and every key and value is an operand of one product.
#pragma once
#include "online_softmax.h"

struct Softmax {
  float peak[VECTOR_TILES][2], sum[VECTOR_TILES][2];  // of vectors 8 tile + lane % 4 * 2 and the next, in base 2
  float out[WIDTH / 16][VECTOR_TILES][4];
  u32 power;  // of values' scales (units.h)
  u32 shift[4];  // an operand of products that put int8 ones right
};

// The operands of 16 channels, whose chunks are one of codes or two of bfloat16.
struct Queries {
  u32 q[WIDTH / 16][VECTOR_TILES][2];
  float unit;  // of products, beside codes (units.h)
  float shift[VECTOR_TILES][4];  // what products with keys begin with where these are too large
};

__device__ __forceinline__ Queries read_queries(const u16 *queries, const Piece &piece, int head, int lane) {
  Queries read;
#pragma unroll
  for (int tile = 0; tile < VECTOR_TILES; tile++) {
    int vector = tile * 8 + lane / 4;
    u64 at = ((u64)piece.token * HEADS + head) * GROUP + vector;
#pragma unroll
    for (int m = 0; m < WIDTH / 16; m++) {
      const u16 *query = queries + at * HEAD_DIM + m * 16;
      u32(&q)[2] = read.q[m][tile];
      q[0] = q[1] = 0;
      if (vector >= GROUP) continue;
      if (READ_BYTES == 1 && m * 16 < HEAD_DIM) {
        uint2 four = *(const uint2 *)(query + lane % 4 * 4);
        q[0] = KEEPS_ORDER ? four.x : low_halves(four.x, four.y);
        q[1] = KEEPS_ORDER ? four.y : high_halves(four.x, four.y);
      }
      if (READ_BYTES == 2 && m * 16 < HEAD_DIM) q[0] = *(const u32 *)(query + lane % 4 * 2);
      if (READ_BYTES == 2 && m * 16 + 8 < HEAD_DIM) q[1] = *(const u32 *)(query + 8 + lane % 4 * 2);
    }
  }
  read.unit =
      KV_KIND == 0 ? 1.0f : queries_into_f16(reinterpret_cast<u32(&)[WIDTH / 16 * VECTOR_TILES * 2]>(read.q));
#pragma unroll
  for (int tile = 0; tile < VECTOR_TILES; tile++) {
    float(&shift)[4] = read.shift[tile];
#pragma unroll
    for (int i = 0; i < 4; i++) shift[i] = 0.0f;
#pragma unroll
    for (int m = 0; SHIFTS_KEYS && m < WIDTH / 16; m++)
      multiply(shift, MINUS_1152, MINUS_1152, MINUS_1152, MINUS_1152, read.q[m][tile][0], read.q[m][tile][1]);
  }
  return read;
}

// Codes of values, two channels of two tokens, in pairs of one channel. An int8 is left 1152 too large: products put
// that right at less cost than additions to the operands.
__device__ __forceinline__ Widened widen_value(u32 codes) {
  return KV_KIND == 1 ? widen_shifted(codes) : widen(KEEPS_ORDER ? every_other(codes) : codes);
}

__device__ __forceinline__ float over_tokens_max(float x) {
  x = fmaxf(x, shuffle_xor(x, 4));
  x = fmaxf(x, shuffle_xor(x, 8));
  return fmaxf(x, shuffle_xor(x, 16));
}

__device__ __forceinline__ float over_tokens_sum(float x) {
  x += shuffle_xor(x, 4);
  x += shuffle_xor(x, 8);
  return x + shuffle_xor(x, 16);
}

__device__ __forceinline__ Softmax begin_softmax() {
  Softmax state = {};
  state.power = LEAST_POWER;
  // Four numbers that the compiler does not know, or it would make them anew for each product; block.y is 1.
  for (int i = 0; KV_KIND == 1 && i < 4; i++) state.shift[i] = MINUS_1152 + threadIdx.y * (i + 1);
#pragma unroll
  for (int tile = 0; tile < VECTOR_TILES; tile++) state.peak[tile][0] = state.peak[tile][1] = UNSEEN * TO_BASE_2;
  return state;
}

// Scores of a stage's keys, the softmax so far with them, and their weights as operands. The row sees tokens
// of the stage up to `last`, and none up to `before`.
__device__ __forceinline__ void add_keys(Softmax &state, u32 (&weights)[TOKENS / 16][VECTOR_TILES][2],
                                         const Queries &queries, const u8 *stage, const Scales &read_scales, int last,
                                         int before, int lane) {
  float score[TOKENS / 16][VECTOR_TILES][4];
  float v_scale[TOKENS / 8];
  const u32 power = state.power;
  const Scales scales = in_units(read_scales, queries.unit, state.power);
  const int mine = place(lane % 16, lane / 16) * 16;
#pragma unroll
  for (int n = 0; n < TOKENS / 16; n++) {
#pragma unroll
    for (int tile = 0; tile < VECTOR_TILES; tile++)
#pragma unroll
      for (int i = 0; i < 4; i++) score[n][tile][i] = SHIFTS_KEYS ? queries.shift[tile][i] : 0.0f;
#pragma unroll
    for (int chunk = 0; chunk < READ_CHUNKS; chunk += 2) {
      u32 read[4];
      read_matrices(read, stage + further(mine, chunk) + 16 * n * READ_ROW_BYTES);
#pragma unroll
      for (int i = 0; i < 2 / READ_BYTES; i++) {
        const int m = chunk / READ_BYTES + i;
        u32 a[4] = {read[0], read[1], read[2], read[3]};
        if (READ_BYTES == 1) {
          Widened upper = widen_key(read[2 * i]), lower = widen_key(read[2 * i + 1]);
          a[0] = upper.pair[0], a[1] = lower.pair[0], a[2] = upper.pair[1], a[3] = lower.pair[1];
        }
#pragma unroll
        for (int tile = 0; tile < VECTOR_TILES; tile++) {
          const u32(&q)[2] = queries.q[m][tile];
          multiply(score[n][tile], a[0], a[1], a[2], a[3], q[0], q[1]);
        }
      }
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int token = 16 * n + 8 * half;
      const bool is_seen = token <= last - lane / 4 && (WINDOW == 0 || token > before - lane / 4);
      float k_scale = 1.0f;
      if (KV_KIND != 0) {
        k_scale = shuffle(scales.k[token / 32], token % 32 + lane / 4);
        v_scale[2 * n + half] = shuffle(scales.v[token / 32], token % 32 + lane / 4);
      }
#pragma unroll
      for (int tile = 0; tile < VECTOR_TILES; tile++)
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; i++) {
          float product = score[n][tile][i];
          product = capped(KV_KIND == 0 ? product : product * k_scale);
          score[n][tile][i] = is_seen ? product : MASKED;
        }
    }
  }
  float fade[VECTOR_TILES][2];
  bool has_faded = state.power != power;
#pragma unroll
  for (int tile = 0; tile < VECTOR_TILES; tile++)
#pragma unroll
    for (int i = 0; i < 2; i++) {
      float peak = MASKED, sum = 0.0f;
#pragma unroll
      for (int n = 0; n < TOKENS / 16; n++) peak = fmaxf(peak, fmaxf(score[n][tile][i], score[n][tile][i + 2]));
      peak = fmaxf(state.peak[tile][i], over_tokens_max(peak) * TO_BASE_2);
      fade[tile][i] = exp2_fast(state.peak[tile][i] - peak);
      has_faded |= fade[tile][i] != 1.0f;
      state.peak[tile][i] = peak;
#pragma unroll
      for (int n = 0; n < TOKENS / 16; n++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
          float &x = score[n][tile][2 * half + i];
          x = weight(x, peak);
          sum += x;
          if (KV_KIND != 0) x *= v_scale[2 * n + half];
        }
      state.sum[tile][i] = state.sum[tile][i] * fade[tile][i] + sum;
    }
#pragma unroll
  for (int n = 0; n < TOKENS / 16; n++)
#pragma unroll
    for (int tile = 0; tile < VECTOR_TILES; tile++)
#pragma unroll
      for (int half = 0; half < 2; half++)
        weights[n][tile][half] = transpose(pack(score[n][tile][2 * half], score[n][tile][2 * half + 1]));
  if (!any_lane(has_faded)) return;  // as in most stages but the first ones
  const float power_faded = power_fade(power, state.power);
#pragma unroll
  for (int m = 0; m < WIDTH / 16; m++)
#pragma unroll
    for (int tile = 0; tile < VECTOR_TILES; tile++)
#pragma unroll
      for (int i = 0; i < 4; i++) state.out[m][tile][i] *= KV_KIND == 0 ? fade[tile][i % 2] : fade[tile][i % 2] * power_faded;
}

__device__ __forceinline__ void add_values(Softmax &state, const u32 (&weights)[TOKENS / 16][VECTOR_TILES][2],
                                           const u8 *stage, int lane) {
  const int mine = place(lane % 8 + lane / 16 * 8, lane / 8 % 2) * 16;
#pragma unroll
  for (int k = 0; k < TOKENS / 16; k++)
#pragma unroll
    for (int chunk = 0; chunk < READ_CHUNKS; chunk += 2) {
      u32 read[4];
      read_transposed(read, stage + further(mine, chunk) + 16 * k * READ_ROW_BYTES);
#pragma unroll
      for (int i = 0; i < 2 / READ_BYTES; i++) {
        u32 a[4] = {read[0], read[1], read[2], read[3]};
        if (READ_BYTES == 1) {
          Widened left = widen_value(read[i]), right = widen_value(read[i + 2]);
          a[0] = left.pair[0], a[1] = left.pair[1], a[2] = right.pair[0], a[3] = right.pair[1];
        }
#pragma unroll
        for (int tile = 0; tile < VECTOR_TILES; tile++) {
          float(&out)[4] = state.out[chunk / READ_BYTES + i][tile];
          const u32(&w)[2] = weights[k][tile], (&shift)[4] = state.shift;
          multiply(out, a[0], a[1], a[2], a[3], w[0], w[1]);
          if (KV_KIND == 1) multiply(out, shift[0], shift[1], shift[2], shift[3], w[0], w[1]);
        }
      }
    }
}
