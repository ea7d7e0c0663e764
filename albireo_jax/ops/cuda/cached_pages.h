// A layer's cached keys and values: from their pages to shared memory, and from there to registers.
#pragma once
#include "layout.h"

struct Cache {
  const u8 *k, *v;
  const u16 *k_scale, *v_scale;
  const int *pages;  // of the piece's row
  u64 first_page;    // of the layer
  int head;
};

struct Scales {
  float k, v;
};

__device__ __forceinline__ u64 cached_vector(const Cache &cache, int token) {
  u64 page = cache.first_page + ldg(cache.pages + token / PAGE_SIZE);
  return (page * PAGE_SIZE + token % PAGE_SIZE) * HEADS + cache.head;
}

// Where a 16-byte chunk of a token lies in a stage, so that the threads that read together meet different banks.
// Chunks change places within runs of a power of two, of which every row has a whole number.
__device__ __forceinline__ int k_chunk(int token, int chunk) {
  return token * CHUNKS + (chunk ^ ((token & (4 / KV_BYTES - 1)) * 2 * KV_BYTES & (SWAPPED_CHUNKS - 1)));
}

__device__ __forceinline__ int v_chunk(int token, int chunk) {
  return token * CHUNKS + (chunk ^ ((token >> 1 & 3) * 2 & (SWAPPED_CHUNKS - 1)));
}

// Begin to copy the keys or values of a stage's tokens; those from `end` on become zeros.
template <bool IS_VALUE>
__device__ __forceinline__ void copy_stage(u8 *stage, const Cache &cache, int first, int end, int member) {
#pragma unroll
  for (int at = member; at < TOKENS * CHUNKS; at += GROUP_THREADS) {
    int token = at / CHUNKS, chunk = at % CHUNKS;
    bool is_cached = first + token < end && chunk * 16 < HEAD_BYTES;
    u64 source = is_cached ? cached_vector(cache, first + token) * HEAD_BYTES + chunk * 16 : 0;
    int place = IS_VALUE ? v_chunk(token, chunk) : k_chunk(token, chunk);
    cp_async_16(stage + place * 16, (IS_VALUE ? cache.v : cache.k) + source, is_cached ? 16 : 0);
  }
}

__device__ __forceinline__ Scales read_scales(const Cache &cache, int first, int end, int member) {
  Scales scales = {0.0f, 0.0f};
  if (KV_KIND != 0 && member < TOKENS && first + member < end) {
    u64 at = cached_vector(cache, first + member);
    scales.k = __uint_as_float((u32)cache.k_scale[at] << 16);
    scales.v = __uint_as_float((u32)cache.v_scale[at] << 16);
  }
  return scales;
}

__device__ __forceinline__ void keep_scales(u8 *stage, Scales scales, int member) {
  if (KV_KIND != 0 && member < TOKENS) {
    float *kept = (float *)(stage + TOKENS * ROW_BYTES);
    kept[member] = scales.k;
    kept[TOKENS + member] = scales.v;
  }
}

__device__ __forceinline__ float widen(u32 code) {
  if (KV_KIND == 1) return __uint_as_float(0x4b000000u | (code ^ 0x80u)) - 8388736.0f;
  return __uint_as_float((code & 0x7fu) << 20 | (code & 0x80u) << 24) * 0x1p120f;
}

__device__ __forceinline__ u32 widen_pair(u32 codes, int shift) {
  return pack_bf16(widen(codes >> shift & 0xffu), widen(codes >> (shift + 8) & 0xffu));
}

// 8 neighbouring channels of one key, as the four registers of two products.
__device__ __forceinline__ void read_k(u32 (&b)[4], const u8 *stage, int token, int span, int quarter) {
  if (KV_BYTES == 2) {
    uint4 wide = *(const uint4 *)(stage + k_chunk(token, span * 4 + quarter) * 16);
    b[0] = wide.x, b[1] = wide.y, b[2] = wide.z, b[3] = wide.w;
    return;
  }
  uint2 codes = *(const uint2 *)(stage + k_chunk(token, span * 2 + quarter / 2) * 16 + quarter % 2 * 8);
  b[0] = widen_pair(codes.x, 0), b[1] = widen_pair(codes.x, 16);
  b[2] = widen_pair(codes.y, 0), b[3] = widen_pair(codes.y, 16);
}

// 4 neighbouring channels of one value.
__device__ __forceinline__ uint2 read_v(const u8 *stage, int token, int span, int octet) {
  if (KV_BYTES == 2)
    return *(const uint2 *)(stage + v_chunk(token, span * 4 + octet / 2) * 16 + octet % 2 * 8);
  u32 codes = *(const u32 *)(stage + v_chunk(token, span * 2 + octet / 4) * 16 + octet % 4 * 4);
  return make_uint2(widen_pair(codes, 0), widen_pair(codes, 16));
}
