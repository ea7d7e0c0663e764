// Where a piece's results go: to the step's output, or to slots that are merged afterwards.
#pragma once
#if GROUP_WARPS == WARPS
#include "chunks.h"
#else
#include "decode_rows.h"
#endif

struct Place {
  u16 *out;      // where whole results go, [T, N, G, K]
  float *part;   // unfinished ones, [slots, N, K] ...
  float *bounds; // ... and their maxima and sums, [slots, N, 2]
};

// N neighbouring channels of one query vector: finished, or to be merged with other pieces' later.
template <int N>
__device__ __forceinline__ void store(const Place &place, const Piece &piece, int head, int vector, int channel,
                                      const float (&x)[N], float sum) {
  if (vector >= piece.queries * GROUP || channel >= HEAD_DIM) return;
  if (piece.slot >= 0) {
    u64 at = (u64)(piece.slot + vector) * HEADS + head;
#pragma unroll
    for (int i = 0; i < N; i += 2)
      *(float2 *)(place.part + at * HEAD_DIM + channel + i) = make_float2(x[i], x[i + 1]);
    return;
  }
  u64 at = ((u64)(piece.token + vector / GROUP) * HEADS + head) * GROUP + vector % GROUP;
  float scale = sum > 0.0f ? 1.0f / sum : 0.0f;
#pragma unroll
  for (int i = 0; i < N; i += 2)
    *(u32 *)(place.out + at * HEAD_DIM + channel + i) = pack_bf16(x[i] * scale, x[i + 1] * scale);
}

__device__ __forceinline__ void store_bounds(const Place &place, const Piece &piece, int head, int vector, float peak,
                                             float sum) {
  if (vector >= piece.queries * GROUP || piece.slot < 0) return;
  u64 at = (u64)(piece.slot + vector) * HEADS + head;
  *(float2 *)(place.bounds + 2 * at) = make_float2(peak, sum);
}

#if GROUP_WARPS == WARPS
// The results of a block with one group, straight from registers. A thread has two columns of each product; where
// widened codes are out of order, these are channels 0 and 2 or, next to it, 1 and 3: such neighbours exchange one.
__device__ __forceinline__ void finish(const Softmax &state, const Place &place, const Piece &piece, int head,
                                       int vector, int lane) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    int mine = vector + 8 * half;
    float sum = over_quad_sum(state.sum[half]), unit = KV_KIND == 0 ? 1.0f : out_of_f16(state.power);
    if (lane % 4 == 0) store_bounds(place, piece, head, mine, state.peak[half], sum);
#pragma unroll
    for (int span = 0; span < SPANS; span++)
#pragma unroll
      for (int j = 0; j < 4; j++) {
        float x[2] = {state.out[span][j][2 * half], state.out[span][j][2 * half + 1]};
        if (KV_KIND != 0) x[0] *= unit, x[1] *= unit;
        if (KV_KIND != 0 && !KEEPS_ORDER) {
          float other = shuffle_xor(lane % 2 ? x[0] : x[1], 1);
          x[0] = lane % 2 ? other : x[0], x[1] = lane % 2 ? x[1] : other;
        }
        store(place, piece, head, mine, first_channel(span * 4 + j) + lane % 4 * 2, x, sum);
      }
  }
}
#else
// Channel of a row of a product of values: of codes, the first eight rows are the even channels.
__device__ __forceinline__ int out_channel(int product, int row) {
  return product * 16 + (READ_BYTES == 2 ? row : row % 8 * 2 + row / 8);
}

// The results of groups that took turns with the tokens, merged in shared memory.
__device__ __forceinline__ void finish(const Softmax &state, u8 *shared, const Place &place, const Piece &piece,
                                       int head, int group, int lane) {
  const float unit = KV_KIND == 0 ? 1.0f : out_of_f16(state.power);
  float *out = (float *)shared, *peaks = out + GROUPS * VECTORS * MERGE_WIDTH, *sums = peaks + GROUPS * VECTORS;
  __syncthreads();
#pragma unroll
  for (int tile = 0; tile < VECTOR_TILES; tile++)
#pragma unroll
    for (int i = 0; i < 2; i++) {
      int mine = group * VECTORS + tile * 8 + lane % 4 * 2 + i;
      float sum = over_tokens_sum(state.sum[tile][i]);
      if (lane / 4 == 0) peaks[mine] = state.peak[tile][i], sums[mine] = sum;
#pragma unroll
      for (int m = 0; m < WIDTH / 16; m++)
#pragma unroll
        for (int half = 0; half < 2; half++)
          out[mine * MERGE_WIDTH + out_channel(m, lane / 4 + 8 * half)] = state.out[m][tile][2 * half + i] * unit;
    }
  __syncthreads();
  for (int at = threadIdx.x; at < GROUP * (WIDTH / 8); at += THREADS) {
    int vector = at / (WIDTH / 8), channel = at % (WIDTH / 8) * 8;
    float peak = UNSEEN, sum = 0.0f, x[8] = {};
    for (int g = 0; g < GROUPS; g++) peak = fmaxf(peak, peaks[g * VECTORS + vector]);
    for (int g = 0; g < GROUPS; g++) {
      float share = exp2_fast(peaks[g * VECTORS + vector] - peak);
      sum += sums[g * VECTORS + vector] * share;
      for (int i = 0; i < 8; i++) x[i] += out[(g * VECTORS + vector) * MERGE_WIDTH + channel + i] * share;
    }
    if (channel == 0) store_bounds(place, piece, head, vector, peak, sum);
    store(place, piece, head, vector, channel, x, sum);
  }
}
#endif
