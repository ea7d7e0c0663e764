// Paged attention for NVIDIA GPUs from sm_80 on, compiled at run time (see nvrtc.py) for one model and cache.
//
// One block of threads takes one *piece*: up to 16 * GROUP_WARPS query vectors of one key/value head (the
// queries of one row times the GROUP heads that share their keys), over a range of that row's cached tokens.
// Which pieces there are was decided on the device from the rows' lengths (prepare_step.cu), so that the grid is
// the same for every step of a bucket, and blocks without work only clear padding. Of a tile of several pieces
// the last block to be done merges them (merge.h).
//
// The threads form groups of GROUP_WARPS warps. The warps of a group share keys and values and have 16 query
// vectors each; the groups of a block have the same queries and take turns with the tokens. Prompts use one
// group of all warps (queries share what is read), decode steps groups of one warp (nothing to share; many
// small copies in flight). Keys and values pass through stages in shared memory (ring.h):
//
//     copy     K0 V0 | K1 V1 K2 ...        cp.async, one stage of keys and one of values ahead
//     compute        | K0 V0 K1 ...        S = Q K^T, softmax  |  O += P V
//
// The matrix products are mma.m16n8k16 with float32 sums, whose operands ldmatrix reads: in bfloat16, or with codes of
// one byte in f16 (units.h). Codes are widened two at a time: in registers, or where warps share them, into shared
// memory. Two codes that are widened together are no neighbours, and queries or outputs are permuted to match.
//
// Macros, all integers but SCALE and SOFT_CAP: HEAD_DIM, GROUP, HEADS, PAGE_SIZE, TABLE_WIDTH, NUM_PAGES,
// KV_KIND (0 bfloat16, 1 int8, 2 float8_e4m3fn), WINDOW and SOFT_CAP (0 without), WARPS, GROUP_WARPS,
// TILE_QUERIES (queries of a tile at most), and CHAINED (1 where outputs are operands too, and written in place).

#include "merge.h"

#include "ring.h"

// A core is to hold two blocks of chunks, and three of decode rows: by itself the assembler aims at four, and spills.
#if GROUP_WARPS == WARPS
#define BOUNDS THREADS, 2
#else
#define BOUNDS THREADS, 3
#endif

extern "C" __global__ void __launch_bounds__(BOUNDS)
    attend_pieces(const u16 *queries, const u8 *k, const u8 *v,
#if KV_KIND != 0
                  const u16 *k_scale, const u16 *v_scale,
#endif
                  const int *page_table, const Piece *pieces, const int *layer,
                  const int *,
#if CHAINED
                  const u16 *, const float *, const float *,
#endif
                  int *arrived, u16 *out, float *part, float *bounds) {
  const Piece piece = pieces[blockIdx.x / HEADS];
  if (piece.begin >= piece.end) {
    clear_padding(out, piece, blockIdx.x % HEADS);
    return;
  }
  SHARED_MEMORY(shared, SHARED_BYTES);
#if KV_KIND == 0
  const u16 *k_scale = nullptr, *v_scale = nullptr;
#endif
  const int lane = threadIdx.x % 32, warp = same_in_warp(threadIdx.x / 32), head = blockIdx.x % HEADS;
  const int group = warp / GROUP_WARPS, member = threadIdx.x % GROUP_THREADS;
  const Cache cache = {k, v, k_scale, v_scale, page_table + (u64)piece.row * TABLE_WIDTH, (u32)*layer * NUM_PAGES, head};
#if GROUP_WARPS == WARPS
  const int vector = warp * 16 + lane / 4;
  const Queries q = read_queries(queries, piece, head, vector, lane);
  // What every vector of this warp sees in full, and what none of them sees.
  const int earliest = piece.position + warp * 16 / GROUP;
  const int latest = min(piece.position + (warp * 16 + 15) / GROUP, piece.position + piece.queries - 1);
  u32 weights[TOKENS / 16][4];
#else
  const Queries q = read_queries(queries, piece, head, lane);
  u32 weights[TOKENS / 16][VECTOR_TILES][2];
#endif
  Softmax state = begin_softmax();
  Ring ring = begin_ring(shared, group);
  const int span_tokens = TOKENS * GROUPS, begin = piece.begin + group * TOKENS;
  Stage stage = look_up(cache, begin, piece.end);
  Scales scales = read_scales(cache, stage, lane);
  copy_ahead(ring.keys, cache.k, cache, stage, member);
  copy_ahead(ring.values, cache.v, cache, stage, member);
  for (int first = begin; first < piece.end; first += span_tokens) {
    stage = look_up(cache, first + span_tokens, piece.end);
    const Scales next_scales = read_scales(cache, stage, lane);
#if GROUP_WARPS == WARPS
    const bool is_unseen = first > latest || (WINDOW != 0 && first + TOKENS <= earliest - WINDOW + 1);
    const bool is_seen_whole = first + TOKENS - 1 <= earliest && first + TOKENS <= piece.end &&
                               (WINDOW == 0 || first > latest - WINDOW);
    const u8 *keys = next_keys(ring, cache, stage, member);
    if (!is_unseen) add_keys(state, weights, q, keys, scales, first, piece.end, is_seen_whole, lane);
    const u8 *values = next_values(ring, cache, stage, member);
    if (!is_unseen) add_values(state, weights, values, lane);
#else
    const int last = min(piece.position, piece.end - 1) - first, before = piece.position - WINDOW - first;
    add_keys(state, weights, q, next_keys(ring, cache, stage, member), scales, last, before, lane);
    add_values(state, weights, next_values(ring, cache, stage, member), lane);
#endif
    scales = next_scales;
  }
  cp_async_wait<0>();
  const Place place = {out, part, bounds};
#if GROUP_WARPS == WARPS
  finish(state, place, piece, head, vector, lane);
#else
  finish(state, shared, place, piece, head, group, lane);
#endif
  if (piece.slot < 0) return;
  const int first_piece = blockIdx.x / HEADS - (piece.turn >> 16);
  if (is_last(arrived + first_piece * HEADS + head, piece.turn & 0xffff, shared)) merge_tile(place, piece, head);
}
