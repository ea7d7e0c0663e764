// How one model and cache lie in shared memory and registers; the macros are described in paged_attention.cu.
#pragma once
#include "device.h"

enum {
  KV_BYTES = KV_KIND == 0 ? 2 : 1,
  SPANS = (HEAD_DIM + 31) / 32,  // of 32 channels; the last one is padded with zeros
  WIDTH = SPANS * 32,
  ROW_BYTES = WIDTH * KV_BYTES,
  CHUNKS = ROW_BYTES / 16,
  SWAPPED_CHUNKS = CHUNKS & -CHUNKS,
  HEAD_BYTES = HEAD_DIM * KV_BYTES,
  THREADS = 32 * WARPS,
  GROUP_THREADS = 32 * GROUP_WARPS,
  GROUPS = WARPS / GROUP_WARPS,
  TOKENS = 16 * GROUP_WARPS,  // of a stage
  // A group copies in passes. Where it divides into whole tokens, a thread has the same channels in each pass,
  // and where passes also divide a page, a page is looked up once for all passes over its tokens.
  PASS_TOKENS = GROUP_THREADS / CHUNKS,
  PAGE_TOKENS = PAGE_SIZE < TOKENS ? PAGE_SIZE : TOKENS,  // of one page in a stage
  COPIES_BY_PAGE = GROUP_THREADS % CHUNKS == 0 && PAGE_TOKENS % (PASS_TOKENS > 0 ? PASS_TOKENS : 1) == 0,
  SCALE_BYTES = KV_KIND == 0 ? 0 : 8 * TOKENS,
  STAGE_BYTES = TOKENS * ROW_BYTES + SCALE_BYTES,
  RING_FITS = 49152 / (GROUPS * STAGE_BYTES),
  RING = RING_FITS < 6 ? RING_FITS : 6,
  MERGE_BYTES = GROUPS > 1 ? GROUPS * 16 * (WIDTH + 2) * 4 : 0,
  SHARED_BYTES = RING * GROUPS * STAGE_BYTES > MERGE_BYTES ? RING * GROUPS * STAGE_BYTES : MERGE_BYTES,
};
static_assert(RING >= 3, "a ring holds keys, values and what comes next");
static_assert(HEAD_BYTES % 16 == 0, "a head's channels are copied 16 bytes at a time");

struct Piece {
  int row, token, queries, position, begin, end, slot, unused;
};
