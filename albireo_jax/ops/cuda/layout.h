// How one model and cache lie in shared memory and registers; the macros are described in paged_attention.cu.
#pragma once
#include "device.h"

// Whether an instruction makes f16 of fp8.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define CONVERTS_FP8 1
#else
#define CONVERTS_FP8 0
#endif

enum {
  KV_BYTES = KV_KIND == 0 ? 2 : 1,
  SPANS = (HEAD_DIM + 31) / 32,  // of 32 channels; the last one is padded with zeros
  WIDTH = SPANS * 32,
  ROW_BYTES = WIDTH * KV_BYTES,
  CHUNKS = ROW_BYTES / 16,
  HEAD_BYTES = HEAD_DIM * KV_BYTES,
  THREADS = 32 * WARPS,
  GROUP_THREADS = 32 * GROUP_WARPS,
  GROUPS = WARPS / GROUP_WARPS,
  MAX_SHARED_BYTES = 49152,
  // Three stages are in use: keys, values, and what is being copied. Decode rows take the longest stages that fit: the
  // longer, the fewer instructions per token. Chunks of wide heads take the shortest: they are short of registers.
  RING = 3,
  ROOM = MAX_SHARED_BYTES / (RING * GROUPS * ROW_BYTES),  // for a group's tokens in each stage
  TOKENS = GROUPS == 1 ? (WIDTH > 192 ? 16 : 16 * GROUP_WARPS) : ROOM >= 64 ? 64 : ROOM >= 32 ? 32 : 16,
  STAGE_BYTES = TOKENS * ROW_BYTES,
  RING_BYTES = RING * GROUPS * STAGE_BYTES,
  // A group copies in passes. Where it divides into whole tokens, a thread has the same channels in each pass,
  // and where passes also divide a page, a page is looked up once for all passes over its tokens.
  PASS_TOKENS = GROUP_THREADS / CHUNKS,
  PAGE_TOKENS = PAGE_SIZE < TOKENS ? PAGE_SIZE : TOKENS,  // of one page in a stage
  PAGES = TOKENS / PAGE_TOKENS,                           // in a stage
  COPIES_BY_PAGE = GROUP_THREADS % CHUNKS == 0 && PAGE_TOKENS % (PASS_TOKENS > 0 ? PASS_TOKENS : 1) == 0,
  // Codes that several warps read are widened once, into stages of 16-bit numbers that follow two of codes.
  IS_WIDENED = KV_KIND != 0 && GROUPS == 1,
  WIDE_BYTES = TOKENS * WIDTH * 2,
  // Chunks of wide heads have no registers left for what saves others instructions.
  IS_SHORT_OF_REGISTERS = GROUPS == 1 && WIDTH > 192,
  // Whether codes that are widened keep their order, as the instruction for them leaves it.
  KEEPS_ORDER = KV_KIND == 2 && CONVERTS_FP8 && !IS_SHORT_OF_REGISTERS,
  // Whether keys are left 1152 too large: what products are too large by depends on their query alone.
  SHIFTS_KEYS = KV_KIND == 1 && !IS_SHORT_OF_REGISTERS,
  // How products read a token's channels.
  READ_BYTES = IS_WIDENED ? 2 : KV_BYTES,
  READ_ROW_BYTES = WIDTH * READ_BYTES,
  READ_CHUNKS = READ_ROW_BYTES / 16,
  SWAPPED_CHUNKS = (READ_CHUNKS & -READ_CHUNKS) < 8 ? READ_CHUNKS & -READ_CHUNKS : 8,
  // A decode row's vectors, in tiles of 8, and how many floats lie between those of two where groups merge.
  VECTOR_TILES = (GROUP + 7) / 8,
  VECTORS = VECTOR_TILES * 8,
  MERGE_WIDTH = WIDTH + 4,
  MERGE_BYTES = GROUPS > 1 ? GROUPS * VECTORS * (MERGE_WIDTH + 2) * 4 : 0,
  STAGES_BYTES = IS_WIDENED ? 2 * STAGE_BYTES + 2 * WIDE_BYTES : RING_BYTES,
  SHARED_BYTES = STAGES_BYTES > MERGE_BYTES ? STAGES_BYTES : MERGE_BYTES,
};
static_assert(SHARED_BYTES <= MAX_SHARED_BYTES, "stages fit into shared memory");
static_assert(HEAD_BYTES % 16 == 0, "a head's channels are copied 16 bytes at a time");

// A part of what the queries of one row see, as prepare_step.cu makes them. `row` is one of the page table; `turn`
// is which of its tile's pieces it is, times 65,536, plus how many there are. One that sees nothing is unused, and
// its queries are padding.
struct Piece {
  int row, token, queries, position, begin, end, slot, turn;
};
