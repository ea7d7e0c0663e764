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

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#ifndef ON_CPU
#include "gpu_intrinsics.h"
#endif

#define LOG2E 1.4426950408889634f
#define MASKED -1e30f
#define UNSEEN -5e29f  // the first running maximum: far above MASKED, so that exp2 gives exactly 0 for what is masked

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
  TOKENS = 16 * GROUP_WARPS,  // of a stage
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

struct Cache {
  const u8 *k, *v;
  const u16 *k_scale, *v_scale;
  const int *pages;  // of the piece's row
  u64 first_page;    // of the layer
  int head;
};

struct Softmax {
  float peak[2], sum[2];         // of this thread's two query vectors; a sum is this thread's share
  float out[SPANS][4][4];
};

struct Scales {
  float k, v;
};

__device__ __forceinline__ u64 cached_vector(const Cache &cache, int token) {
  u64 page = cache.first_page + ldg(cache.pages + token / PAGE_SIZE);
  return (page * PAGE_SIZE + token % PAGE_SIZE) * HEADS + cache.head;
}

// Where a 16-byte chunk of a token lies in a stage, so that the threads that read together meet different banks.
__device__ __forceinline__ int k_chunk(int token, int chunk) {
  return token * CHUNKS + (chunk ^ ((token & (4 / KV_BYTES - 1)) * 2 * KV_BYTES & (CHUNKS - 1)));
}

__device__ __forceinline__ int v_chunk(int token, int chunk) {
  return token * CHUNKS + (chunk ^ ((token >> 1 & 3) * 2 & (CHUNKS - 1)));
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

__device__ __forceinline__ u32 low_halves(u32 first, u32 second) { return (first & 0xffffu) | second << 16; }
__device__ __forceinline__ u32 high_halves(u32 first, u32 second) { return first >> 16 | (second & 0xffff0000u); }

__device__ __forceinline__ float over_quad_max(float x) {
  x = fmaxf(x, shuffle_xor(x, 1));
  return fmaxf(x, shuffle_xor(x, 2));
}

__device__ __forceinline__ float over_quad_sum(float x) {
  x += shuffle_xor(x, 1);
  return x + shuffle_xor(x, 2);
}

__device__ __forceinline__ float base2_score(float product) {
  if (SOFT_CAP > 0) return SOFT_CAP * LOG2E * tanhf(product * (SCALE / (SOFT_CAP > 0 ? SOFT_CAP : 1)));
  return product * (SCALE * LOG2E);
}

// Scores of a stage's keys, the softmax so far with them, and their weights as bfloat16 operands.
__device__ __forceinline__ void add_keys(Softmax &state, u32 (&weights)[TOKENS / 16][4], const u32 (&q)[SPANS][8],
                                         const u8 *stage, int first, int end, const int (&position)[2],
                                         bool is_seen_whole, int lane) {
  float score[TOKENS / 8][4];
  const float *scales = (const float *)(stage + TOKENS * ROW_BYTES);
#pragma unroll
  for (int n = 0; n < TOKENS / 8; n++) {
#pragma unroll
    for (int i = 0; i < 4; i++) score[n][i] = 0.0f;
#pragma unroll
    for (int span = 0; span < SPANS; span++) {
      u32 b[4];
      read_k(b, stage, 8 * n + lane / 4, span, lane % 4);
      mma(score[n], q[span][0], q[span][1], q[span][2], q[span][3], b[0], b[1]);
      mma(score[n], q[span][4], q[span][5], q[span][6], q[span][7], b[2], b[3]);
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
      int token = 8 * n + lane % 4 * 2 + i % 2;
      score[n][i] = base2_score(KV_KIND == 0 ? score[n][i] : score[n][i] * scales[token]);
      if (!is_seen_whole) {
        int at = first + token, query = position[i / 2];
        bool is_seen = at < end && at <= query && (WINDOW == 0 || at > query - WINDOW);
        score[n][i] = is_seen ? score[n][i] : MASKED;
      }
    }
  }
#pragma unroll
  for (int half = 0; half < 2; half++) {
    float peak = score[0][2 * half];
#pragma unroll
    for (int n = 0; n < TOKENS / 8; n++) peak = fmaxf(peak, fmaxf(score[n][2 * half], score[n][2 * half + 1]));
    peak = fmaxf(state.peak[half], over_quad_max(peak));
    float fade = exp2_fast(state.peak[half] - peak), sum = 0.0f;
    state.peak[half] = peak;
#pragma unroll
    for (int n = 0; n < TOKENS / 8; n++) {
      float x0 = exp2_fast(score[n][2 * half] - peak), x1 = exp2_fast(score[n][2 * half + 1] - peak);
      sum += x0 + x1;
      if (KV_KIND != 0) {
        x0 *= scales[TOKENS + 8 * n + lane % 4 * 2];
        x1 *= scales[TOKENS + 8 * n + lane % 4 * 2 + 1];
      }
      weights[n / 2][n % 2 * 2 + half] = pack_bf16(x0, x1);
    }
    state.sum[half] = state.sum[half] * fade + sum;
#pragma unroll
    for (int span = 0; span < SPANS; span++)
#pragma unroll
      for (int j = 0; j < 4; j++) state.out[span][j][2 * half] *= fade, state.out[span][j][2 * half + 1] *= fade;
  }
}

__device__ __forceinline__ void add_values(Softmax &state, const u32 (&weights)[TOKENS / 16][4], const u8 *stage,
                                           int lane) {
#pragma unroll
  for (int k = 0; k < TOKENS / 16; k++) {
    const u32(&a)[4] = weights[k];
    int token = 16 * k + lane % 4 * 2;
#pragma unroll
    for (int span = 0; span < SPANS; span++) {
      uint2 v0 = read_v(stage, token, span, lane / 4), v1 = read_v(stage, token + 1, span, lane / 4);
      uint2 v8 = read_v(stage, token + 8, span, lane / 4), v9 = read_v(stage, token + 9, span, lane / 4);
      mma(state.out[span][0], a[0], a[1], a[2], a[3], low_halves(v0.x, v1.x), low_halves(v8.x, v9.x));
      mma(state.out[span][1], a[0], a[1], a[2], a[3], high_halves(v0.x, v1.x), high_halves(v8.x, v9.x));
      mma(state.out[span][2], a[0], a[1], a[2], a[3], low_halves(v0.y, v1.y), low_halves(v8.y, v9.y));
      mma(state.out[span][3], a[0], a[1], a[2], a[3], high_halves(v0.y, v1.y), high_halves(v8.y, v9.y));
    }
  }
}

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

#if !MERGE
extern "C" __global__ void __launch_bounds__(THREADS)
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
