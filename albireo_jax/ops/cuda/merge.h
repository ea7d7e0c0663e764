// The last of a tile's pieces to be done merges them all.
#pragma once
#include "results.h"

// Whether all `pieces` of a tile have been here with this block, which then sees what the other blocks wrote.
// `arrived` is 0 before the first of them and after the last.
__device__ __forceinline__ bool is_last(int *arrived, int pieces, u8 *shared) {
  fence_device();  // what this thread wrote is there before the block is counted
  __syncthreads();
  volatile int *before = (volatile int *)shared;
  if (threadIdx.x == 0) *before = count_round(arrived, pieces);
  __syncthreads();
  fence_device();
  return *before == pieces - 1;
}

// Merges `pieces` results of each of a tile's query vectors, in their order, whichever block does it: the same bits
// each time. The vectors begin at `token`, their slots at `first`. It is called and not inlined, so that the loop
// over cached tokens keeps its registers, and takes no structures, which would lie in memory.
__device__ __noinline__ void merge_slots(u16 *out, const float *part, const float *bounds, int head, int token,
                                         int vectors, int first, int pieces) {
  const int lane = threadIdx.x % 32, stride = TILE_QUERIES * GROUP;
  enum { LANE_CHANNELS = (HEAD_DIM + 31) / 32 };
  for (int vector = threadIdx.x / 32; vector < vectors; vector += WARPS) {
    float peak = UNSEEN, sum = 0.0f;
    for (int i = lane; i < pieces; i += 32)
      peak = fmaxf(peak, load_l2(bounds + 2 * ((u64)(first + i * stride + vector) * HEADS + head)));
    for (int far = 16; far > 0; far /= 2) peak = fmaxf(peak, shuffle_xor(peak, far));
    float x[LANE_CHANNELS] = {};
#pragma unroll 4
    for (int i = 0; i < pieces; i++) {
      u64 at = (u64)(first + i * stride + vector) * HEADS + head;
      float share = exp2_fast(load_l2(bounds + 2 * at) - peak);
      sum += load_l2(bounds + 2 * at + 1) * share;
#pragma unroll
      for (int j = 0; j < LANE_CHANNELS; j++)
        if (j * 32 + lane < HEAD_DIM) x[j] += load_l2(part + at * HEAD_DIM + j * 32 + lane) * share;
    }
    u64 at = ((u64)(token + vector / GROUP) * HEADS + head) * GROUP + vector % GROUP;
#pragma unroll
    for (int j = 0; j < LANE_CHANNELS; j++)
      if (j * 32 + lane < HEAD_DIM)
        out[at * HEAD_DIM + j * 32 + lane] = (u16)pack_bf16(sum > 0.0f ? x[j] / sum : 0.0f, 0.0f);
  }
}

__device__ __forceinline__ void merge_tile(const Place &place, const Piece &piece, int head) {
  const int first = piece.slot - (piece.turn >> 16) * TILE_QUERIES * GROUP;
  merge_slots(place.out, place.part, place.bounds, head, piece.token, piece.queries * GROUP, first,
              piece.turn & 0xffff);
}

// Zeros for the tokens of no row that an unused piece stands for.
__device__ __forceinline__ void clear_padding(u16 *out, const Piece &piece, int head) {
  const int pairs = GROUP * HEAD_DIM / 2;
  for (int at = threadIdx.x; at < piece.queries * pairs; at += THREADS)
    ((u32 *)out)[((u64)(piece.token + at / pairs) * HEADS + head) * pairs + at % pairs] = 0;
}
