// A layer's cached keys and values: from their pages to shared memory, and from there to registers.
#pragma once
#include "widening.h"

struct Cache {
  const u8 *k, *v;
  const u16 *k_scale, *v_scale;
  const int *pages;  // of the piece's row
  u32 first_page;    // of the layer
  int head;
};

// Vectors are keys or values of one token and head, counted from the first of the cache.
__device__ __forceinline__ u64 cached_vector(const Cache &cache, int token) {
  u32 page = cache.first_page + ldg(cache.pages + (u32)token / PAGE_SIZE);
  return ((u64)page * PAGE_SIZE + (u32)token % PAGE_SIZE) * HEADS + cache.head;
}

// A stage's tokens and the first vector of each page among them. The null page stands for pages past the end, whose
// table entries may be anything. Stages and pages are powers of two and a stage begins at a multiple of its tokens,
// so that neither cuts the other.
struct Stage {
  int first, end;  // the first token, and the first one after all that are cached
  u64 vector[PAGES];
};

__device__ __forceinline__ Stage look_up(const Cache &cache, int first, int end) {
  Stage stage = {first, end};
#pragma unroll
  for (int page = 0; page < PAGES; page++) {
    int begin = first + page * PAGE_TOKENS;
    stage.vector[page] = begin < end ? cached_vector(cache, begin) : cache.head;
  }
  return stage;
}

// Where 16 bytes of a token lie in a stage, in units of as many. Chunks change places within runs of a power of two, of
// which every row has a whole number, so that the same chunk of 8 neighbouring tokens lies in different banks.
__device__ __forceinline__ int place(int token, int chunk) {
  return token * READ_CHUNKS + (chunk ^ (token / (8 / SWAPPED_CHUNKS) & (SWAPPED_CHUNKS - 1)));
}

// Where a lane reads a chunk, if it reads chunk `mine` of the same token at `offset`: chunks that are read one after the
// other differ from each lane's first in the same bits, and beyond the runs by a constant.
__device__ __forceinline__ int further(int offset, int chunk) {
  return (offset ^ chunk % SWAPPED_CHUNKS * 16) + chunk / SWAPPED_CHUNKS * SWAPPED_CHUNKS * 16;
}

// Codes that are to be widened lie in order: only the thread that copies them reads them.
__device__ __forceinline__ int copied_place(int token, int chunk) {
  return IS_WIDENED ? token * CHUNKS + chunk : place(token, chunk);
}

// Begin to copy a thread's chunks of a stage's tokens, from the pass on that begins with TOKEN; zeros from `left` on.
template <int TOKEN>
__device__ __forceinline__ void copy_passes(u8 *to, const u8 *const (&page)[PAGES], int row, int chunk, int left) {
  if constexpr (TOKEN < TOKENS) {
    cp_async_16<TOKEN % PAGE_TOKENS * HEADS * HEAD_BYTES>(to + copied_place(TOKEN + row, chunk) * 16,
                                                          page[TOKEN / PAGE_TOKENS], TOKEN < left ? 16 : 0);
    copy_passes<TOKEN + PASS_TOKENS>(to, page, row, chunk, left);
  }
}

// Begin to copy the keys or values of a stage; what is not cached becomes zeros.
__device__ __forceinline__ void copy_stage(u8 *to, const u8 *from, const Cache &cache, const Stage &stage,
                                           int member) {
  if constexpr (COPIES_BY_PAGE) {
    const int chunk = member % CHUNKS, row = member / CHUNKS;
    const int left = chunk * 16 < HEAD_BYTES ? stage.end - stage.first - row : 0;
    const u8 *page[PAGES];
#pragma unroll
    for (int i = 0; i < PAGES; i++) page[i] = from + (stage.vector[i] + (u64)row * HEADS) * HEAD_BYTES + chunk * 16;
    copy_passes<0>(to, page, row, chunk, left);
  } else {
#pragma unroll
    for (int at = member; at < TOKENS * CHUNKS; at += GROUP_THREADS) {
      int token = stage.first + at / CHUNKS, chunk = at % CHUNKS;
      bool is_cached = token < stage.end && chunk * 16 < HEAD_BYTES;
      u64 source = is_cached ? cached_vector(cache, token) * HEAD_BYTES + chunk * 16 : 0;
      cp_async_16<0>(to + copied_place(at / CHUNKS, chunk) * 16, from + source, is_cached ? 16 : 0);
    }
  }
}

// Scales of a stage's keys and values, of which each lane has those of every 32nd token.
struct Scales {
  float k[(TOKENS + 31) / 32], v[(TOKENS + 31) / 32];
};

// The vector of a token of a stage, one of 32 from `at` on, whose pages were looked up for the copies.
__device__ __forceinline__ u64 vector_in(const Stage &stage, int at, int token) {
  u64 vector = stage.vector[at / PAGE_TOKENS];
#pragma unroll
  for (int page = at / PAGE_TOKENS + 1; page < PAGES && page * PAGE_TOKENS < at + 32; page++)
    vector = token < page * PAGE_TOKENS ? vector : stage.vector[page];
  return vector + (u64)(token % PAGE_TOKENS) * HEADS;
}

// Tokens that are not cached have a value's scale of 0; a key's may be anything, as such keys are masked.
__device__ __forceinline__ Scales read_scales(const Cache &cache, const Stage &stage, int lane) {
  Scales scales = {};
#pragma unroll
  for (int at = 0; KV_KIND != 0 && at < TOKENS; at += 32) {
    const int token = at + lane % (TOKENS < 32 ? TOKENS : 32);
    const bool is_cached = stage.first + token < stage.end;
    const u64 vector = COPIES_BY_PAGE ? vector_in(stage, at, token)
                       : is_cached    ? cached_vector(cache, stage.first + token)
                                      : cache.head;
    u32 k = cache.k_scale[vector], v = cache.v_scale[vector];
    scales.k[at / 32] = __uint_as_float(k << 16);
    scales.v[at / 32] = is_cached ? __uint_as_float(v << 16) : 0.0f;
  }
  return scales;
}

// The first of the eight channels of a chunk of 16 bits where products read it. Of widened codes, the first halves of
// all copied chunks come before the second halves: neighbouring threads then write neighbouring chunks.
__device__ __forceinline__ int first_channel(int chunk) {
  if (!IS_WIDENED) return chunk * 8;
  return chunk < CHUNKS ? chunk * 16 : (chunk - CHUNKS) * 16 + 8;
}

// Widen the codes of a stage that this thread has copied by a function; pairs of channels are as it gives them.
template <typename Widen>
__device__ __forceinline__ void widen_stage(u8 *wide, const u8 *codes, int member, Widen widen) {
#pragma unroll(IS_SHORT_OF_REGISTERS ? 1 : 16)
  for (int pass = 0; pass * GROUP_THREADS < TOKENS * CHUNKS; pass++) {
    const int at = member + pass * GROUP_THREADS;
    if (TOKENS * CHUNKS % GROUP_THREADS != 0 && at >= TOKENS * CHUNKS) break;
    const int chunk = GROUP_THREADS % CHUNKS == 0 ? member % CHUNKS : at % CHUNKS;
    const int token = GROUP_THREADS % CHUNKS == 0 ? member / CHUNKS + pass * PASS_TOKENS : at / CHUNKS;
    uint4 read = *(const uint4 *)(codes + at * 16);
    Widened w[4] = {widen(read.x), widen(read.y), widen(read.z), widen(read.w)};
#pragma unroll
    for (int half = 0; half < 2; half++)
      *(uint4 *)(wide + place(token, chunk + half * CHUNKS) * 16) =
          make_uint4(w[2 * half].pair[0], w[2 * half].pair[1], w[2 * half + 1].pair[0], w[2 * half + 1].pair[1]);
  }
}
