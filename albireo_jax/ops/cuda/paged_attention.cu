// Paged attention for NVIDIA GPUs from sm_80 on, compiled at run time (see nvrtc.py) for one model and cache.
//
// One block of threads takes one *piece*: up to 16 * GROUP_WARPS query vectors of one key/value head (the
// queries of one row times the GROUP heads that share their keys), over a range of that row's cached tokens.
// Which pieces there are was decided on the device from the rows' lengths (see attention_pieces.py), so that
// the grid is the same for every step of a bucket, and blocks without work return at once.
//
// The threads form groups of GROUP_WARPS warps. The warps of a group share keys and values and have 16 query
// vectors each; the groups of a block have the same queries and take turns with the tokens. Prompts use one
// group of all warps (queries share what is read), decode steps groups of one warp (nothing to share; many
// small copies in flight). Keys and values pass through a ring of stages in shared memory:
//
//     copy     K0 V0 K1 | V1 K2 V2 ...        cp.async, RING - 1 items ahead
//     compute           | K0 V0 K1 ...        S = Q K^T, softmax  |  O += P V
//
// The matrix products are mma.m16n8k16 in bfloat16 with float32 sums. Sums over channels and tokens may run in
// any order, so each thread takes 8 neighbouring channels of a key, and 4 neighbouring channels of 4 values,
// with one load each, and queries and outputs are permuted to match: no ldmatrix, and caches of one byte per
// number take the same way, widened to bfloat16 in registers.
//
// Macros, all integers but SCALE and SOFT_CAP: HEAD_DIM, GROUP, HEADS, PAGE_SIZE, TABLE_WIDTH, NUM_PAGES,
// KV_KIND (0 bfloat16, 1 int8, 2 float8_e4m3fn), WINDOW and SOFT_CAP (0 without), WARPS, GROUP_WARPS,
// CHAINED (1 where outputs are operands too, and written in place), and MERGE (which of the two kernels).

#include "results.h"

#if !MERGE
// A core is to hold two blocks of chunks. Three of decode rows are what the assembler makes room for by itself.
#if GROUP_WARPS == WARPS
#define BOUNDS THREADS, 2
#else
#define BOUNDS THREADS
#endif

extern "C" __global__ void __launch_bounds__(BOUNDS)
    attend_pieces(const u16 *queries, const u8 *k, const u8 *v,
#if KV_KIND != 0
                  const u16 *k_scale, const u16 *v_scale,
#endif
                  const int *page_table, const Piece *pieces, const int *layer,
#if CHAINED
                  const u16 *, const float *, const float *,
#endif
                  u16 *out, float *part, float *bounds) {
  const Piece piece = pieces[blockIdx.y];
  if (piece.begin >= piece.end) return;
  SHARED_MEMORY(shared, SHARED_BYTES);
#if KV_KIND == 0
  const u16 *k_scale = nullptr, *v_scale = nullptr;
#endif
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, head = blockIdx.x;
  const int group = warp / GROUP_WARPS, member = threadIdx.x % GROUP_THREADS;
  const int vector = warp % GROUP_WARPS * 16 + lane / 4;
  const Cache cache = {k, v, k_scale, v_scale, page_table + (u64)piece.row * TABLE_WIDTH, (u64)*layer * NUM_PAGES, head};
  u8 *ring = shared + group * RING * STAGE_BYTES;

  u32 q[SPANS][8];
  int position[2];
#pragma unroll
  for (int half = 0; half < 2; half++) {
    int mine = vector + 8 * half, query = mine / GROUP;
    bool is_query = query < piece.queries && (GROUPS == 1 || mine < GROUP);
    position[half] = is_query ? piece.position + query : -1;
    u64 at = ((u64)(piece.token + query) * HEADS + head) * GROUP + mine % GROUP;
#pragma unroll
    for (int span = 0; span < SPANS; span++) {
      int channel = span * 32 + lane % 4 * 8;
      uint4 wide = make_uint4(0, 0, 0, 0);
      if (is_query && channel < HEAD_DIM) wide = *(const uint4 *)(queries + at * HEAD_DIM + channel);
      q[span][half] = wide.x, q[span][2 + half] = wide.y, q[span][4 + half] = wide.z, q[span][6 + half] = wide.w;
    }
  }
  // What every vector of this warp sees in full, and what none of them sees.
  const int first_vector = GROUPS == 1 ? warp % GROUP_WARPS * 16 : 0;
  const int earliest = piece.position + first_vector / GROUP;
  const int latest = min(piece.position + (first_vector + 15) / GROUP, piece.position + piece.queries - 1);

  Softmax state = {};
  state.peak[0] = state.peak[1] = UNSEEN;
  u32 weights[TOKENS / 16][4];
  const int span_tokens = TOKENS * GROUPS, begin = piece.begin + group * TOKENS;
  const int items = begin < piece.end ? 2 * ((piece.end - begin + span_tokens - 1) / span_tokens) : 0;
  Scales pending = {0.0f, 0.0f};
  auto copy_item = [&](int item) {
    if (item < items) {
      u8 *stage = ring + item % RING * STAGE_BYTES;
      int first = begin + item / 2 * span_tokens;
      if (item % 2) {
        copy_stage<true>(stage, cache, first, piece.end, member);
      } else {
        copy_stage<false>(stage, cache, first, piece.end, member);
        pending = read_scales(cache, first, piece.end, member);
      }
    }
    cp_async_commit();
  };
  auto keep_item = [&](int item) {
    if (item % 2 == 0 && item < items) keep_scales(ring + item % RING * STAGE_BYTES, pending, member);
  };
  auto advance = [&](int item) {
    cp_async_wait<RING - 2>();
    sync_group();
    keep_item(item + RING - 2);
    copy_item(item + RING - 1);
  };
  for (int item = 0; item < RING - 1; item++) {
    copy_item(item);
    if (item < RING - 2) keep_item(item);
  }
  for (int item = 0; item < items; item += 2) {
    const int first = begin + item / 2 * span_tokens;
    const bool is_unseen = first > latest || (WINDOW != 0 && first + TOKENS <= earliest - WINDOW + 1);
    const bool is_seen_whole = first + TOKENS - 1 <= earliest && first + TOKENS <= piece.end &&
                               (WINDOW == 0 || first > latest - WINDOW);
    advance(item);
    if (!is_unseen)
      add_keys(state, weights, q, ring + item % RING * STAGE_BYTES, first, piece.end, position, is_seen_whole, lane);
    advance(item + 1);
    if (!is_unseen) add_values(state, weights, ring + (item + 1) % RING * STAGE_BYTES, lane);
  }
  cp_async_wait<0>();
  state.sum[0] = over_quad_sum(state.sum[0]);
  state.sum[1] = over_quad_sum(state.sum[1]);
  const Place place = {out, part, bounds};
  if (GROUPS == 1)
    finish_alone(state, place, piece, head, vector, lane);
  else
    finish_merged(state, shared, place, piece, head, group, lane);
}

#else
struct Merge {
  int slot, stride, count, unused;
};

// The results of queries whose context was cut: `count` pieces, `stride` slots apart. Tokens with a count of -1
// belong to no row and get zeros; those with 0 have their results already.
extern "C" __global__ void __launch_bounds__(THREADS)
    merge_pieces(const Merge *merges, const float *part, const float *bounds, const u16 *, u16 *out) {
  const Merge merge = merges[blockIdx.y];
  if (merge.count == 0) return;
  const int lane = threadIdx.x % 32, head = blockIdx.x;
  for (int g = threadIdx.x / 32; g < GROUP; g += WARPS) {
    float peak = UNSEEN, sum = 0.0f;
    for (int i = lane; i < merge.count; i += 32)
      peak = fmaxf(peak, bounds[2 * ((u64)(merge.slot + i * merge.stride + g) * HEADS + head)]);
    for (int far = 16; far > 0; far /= 2) peak = fmaxf(peak, shuffle_xor(peak, far));
    float x[SPANS] = {};
#pragma unroll 4
    for (int i = 0; i < merge.count; i++) {
      u64 at = (u64)(merge.slot + i * merge.stride + g) * HEADS + head;
      float share = exp2_fast(bounds[2 * at] - peak);
      sum += bounds[2 * at + 1] * share;
#pragma unroll
      for (int span = 0; span < SPANS; span++)
        if (span * 32 + lane < HEAD_DIM) x[span] += part[at * HEAD_DIM + span * 32 + lane] * share;
    }
    u64 at = ((u64)blockIdx.y * HEADS + head) * GROUP + g;
    for (int span = 0; span < SPANS; span++)
      if (span * 32 + lane < HEAD_DIM)
        out[at * HEAD_DIM + span * 32 + lane] = (u16)pack_bf16(sum > 0.0f ? x[span] / sum : 0.0f, 0.0f);
  }
}
#endif
