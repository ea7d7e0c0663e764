// Where a piece's results go: to the step's output, or to slots that are merged afterwards.
#pragma once
#include "online_softmax.h"

// Channel of the thread's value `index` (0 ... 7) of a span: 8 neighbours, as in the queries.
__device__ __forceinline__ float out_value(const Softmax &state, int span, int half, int index) {
  return state.out[span][index % 4][2 * half + index / 4];
}

struct Place {
  u16 *out;      // where whole results go, [T, N, G, K]
  float *part;   // unfinished ones, [slots, N, K] ...
  float *bounds; // ... and their maxima and sums, [slots, N, 2]
};

// Up to 8 neighbouring channels of one query vector: finished, or to be merged with other pieces' later.
__device__ __forceinline__ void store(const Place &place, const Piece &piece, int head, int vector, int channel,
                                      const float (&x)[8], float sum) {
  if (vector >= piece.queries * GROUP || channel >= HEAD_DIM) return;
  if (piece.slot >= 0) {
    u64 at = (u64)(piece.slot + vector) * HEADS + head;
    for (int i = 0; i < 8; i += 4)
      *(float4 *)(place.part + at * HEAD_DIM + channel + i) = make_float4(x[i], x[i + 1], x[i + 2], x[i + 3]);
    return;
  }
  u64 at = ((u64)(piece.token + vector / GROUP) * HEADS + head) * GROUP + vector % GROUP;
  float scale = sum > 0.0f ? 1.0f / sum : 0.0f;
  *(uint4 *)(place.out + at * HEAD_DIM + channel) =
      make_uint4(pack_bf16(x[0] * scale, x[1] * scale), pack_bf16(x[2] * scale, x[3] * scale),
                 pack_bf16(x[4] * scale, x[5] * scale), pack_bf16(x[6] * scale, x[7] * scale));
}

__device__ __forceinline__ void store_bounds(const Place &place, const Piece &piece, int head, int vector, float peak,
                                             float sum) {
  if (vector >= piece.queries * GROUP || piece.slot < 0) return;
  u64 at = (u64)(piece.slot + vector) * HEADS + head;
  *(float2 *)(place.bounds + 2 * at) = make_float2(peak, sum);
}

// The results of a block with one group, straight from registers.
__device__ __forceinline__ void finish_alone(const Softmax &state, const Place &place, const Piece &piece, int head,
                                             int vector, int lane) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    int mine = vector + 8 * half;
    if (lane % 4 == 0) store_bounds(place, piece, head, mine, state.peak[half], state.sum[half]);
#pragma unroll
    for (int span = 0; span < SPANS; span++) {
      float x[8];
#pragma unroll
      for (int i = 0; i < 8; i++) x[i] = out_value(state, span, half, i);
      store(place, piece, head, mine, span * 32 + lane % 4 * 8, x, state.sum[half]);
    }
  }
}

// The results of groups that took turns with the tokens, merged in shared memory.
__device__ __forceinline__ void finish_merged(const Softmax &state, u8 *shared, const Place &place, const Piece &piece,
                                              int head, int group, int lane) {
  float *out = (float *)shared, *peaks = out + GROUPS * 16 * WIDTH, *sums = peaks + GROUPS * 16;
  __syncthreads();
#pragma unroll
  for (int half = 0; half < 2; half++) {
    int mine = group * 16 + lane / 4 + 8 * half;
    if (lane % 4 == 0) peaks[mine] = state.peak[half], sums[mine] = state.sum[half];
#pragma unroll
    for (int span = 0; span < SPANS; span++)
#pragma unroll
      for (int i = 0; i < 8; i += 4)
        *(float4 *)(out + mine * WIDTH + span * 32 + lane % 4 * 8 + i) =
            make_float4(out_value(state, span, half, i), out_value(state, span, half, i + 1),
                        out_value(state, span, half, i + 2), out_value(state, span, half, i + 3));
  }
  __syncthreads();
  for (int at = threadIdx.x; at < GROUP * (WIDTH / 8); at += THREADS) {
    int vector = at / (WIDTH / 8), channel = at % (WIDTH / 8) * 8;
    float peak = UNSEEN, sum = 0.0f, x[8] = {};
    for (int g = 0; g < GROUPS; g++) peak = fmaxf(peak, peaks[g * 16 + vector]);
    for (int g = 0; g < GROUPS; g++) {
      float share = exp2_fast(peaks[g * 16 + vector] - peak);
      sum += sums[g * 16 + vector] * share;
      for (int i = 0; i < 8; i++) x[i] += out[(g * 16 + vector) * WIDTH + channel + i] * share;
    }
    if (channel == 0) store_bounds(place, piece, head, vector, peak, sum);
    store(place, piece, head, vector, channel, x, sum);
  }
}
