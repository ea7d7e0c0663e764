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

// Begin to copy 16 bytes of a token to where they lie in a stage; zeros if the token is not cached.
template <bool IS_VALUE>
__device__ __forceinline__ void copy_chunk(u8 *stage, const u8 *source, int token, int chunk, bool is_cached) {
  int place = IS_VALUE ? v_chunk(token, chunk) : k_chunk(token, chunk);
  cp_async_16(stage + place * 16, source, is_cached ? 16 : 0);
}

// Begin to copy the keys or values of a stage's tokens; those from `end` on become zeros. Stages and pages are
// powers of two and a stage begins at a multiple of its tokens, so that neither cuts the other.
template <bool IS_VALUE>
__device__ __forceinline__ void copy_stage(u8 *stage, const Cache &cache, int first, int end, int member) {
  const u8 *pages = IS_VALUE ? cache.v : cache.k;
  if (COPIES_BY_PAGE) {
    const int chunk = member % CHUNKS, row = member / CHUNKS;
    const int left = chunk * 16 < HEAD_BYTES ? end - first - row : 0;
#pragma unroll
    for (int begin = 0; begin < TOKENS; begin += PAGE_TOKENS) {
      // The null page stands for pages past the end, whose table entries may be anything.
      u64 vector = first + begin < end ? cached_vector(cache, first + begin) : cache.head;
      const u8 *source = pages + (vector + (u64)row * HEADS) * HEAD_BYTES + chunk * 16;
#pragma unroll
      for (int at = 0; at < PAGE_TOKENS; at += PASS_TOKENS)
        copy_chunk<IS_VALUE>(stage, source + (u64)at * HEADS * HEAD_BYTES, begin + at + row, chunk, begin + at < left);
    }
    return;
  }
#pragma unroll
  for (int at = member; at < TOKENS * CHUNKS; at += GROUP_THREADS) {
    int token = at / CHUNKS, chunk = at % CHUNKS;
    bool is_cached = first + token < end && chunk * 16 < HEAD_BYTES;
    u64 source = is_cached ? cached_vector(cache, first + token) * HEAD_BYTES + chunk * 16 : 0;
    copy_chunk<IS_VALUE>(stage, pages + source, token, chunk, is_cached);
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

// Four codes of one byte as bfloat16, two in each result, exactly. An int8 is made of 128 + its low seven bits, of
// which 128 or, by its sign, 256 is taken; an fp8's bits are those of a bfloat16 that is 2^120 times too small.
__device__ __forceinline__ uint2 widen(u32 codes) {
  u32 pairs[2];
#pragma unroll
  for (int i = 0; i < 2; i++) {
    if (KV_KIND == 1) {
      u32 two = __byte_perm(codes, 0, i == 0 ? 0x4140 : 0x4342);
      pairs[i] = fma_bf16x2((two & 0x007f007fu) | 0x43004300u, 0x3f803f80u, (two & 0x00800080u) | 0xc300c300u);
    } else {
      u32 two = __byte_perm(codes, 0, i == 0 ? 0x1404 : 0x3424);
      pairs[i] = fma_bf16x2((two >> 4 & 0x07f007f0u) | (two & 0x80008000u), 0x7b807b80u, 0x80008000u);
    }
  }
  return make_uint2(pairs[0], pairs[1]);
}

// Where a thread reads a span of the first key of a stage that is its own; the others follow at multiples of 8 tokens.
__device__ __forceinline__ int first_k(int lane, int span) {
  int quarter = lane % 4;
  if (KV_BYTES == 2) return k_chunk(lane / 4, span * 4 + quarter) * 16;
  return k_chunk(lane / 4, span * 2 + quarter / 2) * 16 + quarter % 2 * 8;
}

// The same of values, of which a thread's others follow at the next token and at multiples of 8 tokens.
__device__ __forceinline__ int first_v(int lane, int span) {
  int token = lane % 4 * 2, octet = lane / 4;
  if (KV_BYTES == 2) return v_chunk(token, span * 4 + octet / 2) * 16 + octet % 2 * 8;
  return v_chunk(token, span * 2 + octet / 4) * 16 + octet % 4 * 4;
}

// 8 neighbouring channels of one key, as the four registers of two products.
__device__ __forceinline__ void read_k(u32 (&b)[4], const u8 *at) {
  if (KV_BYTES == 2) {
    uint4 wide = *(const uint4 *)at;
    b[0] = wide.x, b[1] = wide.y, b[2] = wide.z, b[3] = wide.w;
    return;
  }
  uint2 codes = *(const uint2 *)at, low = widen(codes.x), high = widen(codes.y);
  b[0] = low.x, b[1] = low.y, b[2] = high.x, b[3] = high.y;
}

// 4 neighbouring channels of one value.
__device__ __forceinline__ uint2 read_v(const u8 *at) {
  return KV_BYTES == 2 ? *(const uint2 *)at : widen(*(const u32 *)at);
}
