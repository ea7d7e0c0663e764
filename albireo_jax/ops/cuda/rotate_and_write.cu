// Queries, keys and values between the product that makes them and attention, in one launch: biases and norms
// where the model has them, rotation to the tokens' positions, and the keys and values into their pages.
//
// One block of threads takes one token and key/value head: the GROUP queries that share its key, the key and the
// value. A warp takes one vector at a time; a lane has pairs of neighbouring channels of the first half, and those
// of the second half that they are rotated with:
//
//     channel   0 1   2 3   ...  | H H+1   H+2 H+3   ...       H = HEAD_DIM / 2
//     lane        0     1   ...  |   0         1     ...
//
// Each operation is rounded as the same operations of XLA are one by one (float32, and bfloat16 after the bias, the
// norm and the rotation), so that pages and queries are the same bits; only sums of a norm run in another order.
// XLA divides by a constant by multiplying by its reciprocal, and so does this.
//
// Macros, all integers but EPSILON: HEAD_DIM, GROUP, HEADS, PAGE_SIZE, NUM_PAGES, KV_KIND (as in paged_attention.cu),
// HAS_BIAS, HAS_NORMS, WARPS.

#include "device.h"

enum {
  HALF = HEAD_DIM / 2,
  VECTORS = GROUP + 2,
  PAIRS = (HALF + 63) / 64,  // of a lane in each half
  THREADS = 32 * WARPS,
};
static_assert(HEAD_DIM % 4 == 0, "a lane has pairs of neighbours in both halves of a head");

#define LARGEST_CODE (KV_KIND == 1 ? 127.0f : 448.0f)
#define SMALLEST_PEAK 0x1p-100f  // vectors closer to zero are zero: a scale is a normal number

struct Vector {
  float first[2 * PAIRS], second[2 * PAIRS];  // of the two halves; zeros past their ends
};

__device__ __forceinline__ float low_float(u32 pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_float(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }

__device__ __forceinline__ float round_bf16(float x) { return low_float(pack_bf16(x, 0.0f)); }

__device__ __forceinline__ int channel_of(int lane, int pair) { return 64 * pair + 2 * lane; }

__device__ __forceinline__ Vector read_vector(const u16 *at, int lane) {
  Vector x = {};
#pragma unroll
  for (int i = 0; i < PAIRS; i++) {
    int channel = channel_of(lane, i);
    if (channel >= HALF) continue;
    u32 first = *(const u32 *)(at + channel), second = *(const u32 *)(at + HALF + channel);
    x.first[2 * i] = low_float(first), x.first[2 * i + 1] = high_float(first);
    x.second[2 * i] = low_float(second), x.second[2 * i + 1] = high_float(second);
  }
  return x;
}

__device__ __forceinline__ void write_vector(u16 *at, const Vector &x, int lane) {
#pragma unroll
  for (int i = 0; i < PAIRS; i++) {
    int channel = channel_of(lane, i);
    if (channel >= HALF) continue;
    *(u32 *)(at + channel) = pack_bf16(x.first[2 * i], x.first[2 * i + 1]);
    *(u32 *)(at + HALF + channel) = pack_bf16(x.second[2 * i], x.second[2 * i + 1]);
  }
}

template <typename F>
__device__ __forceinline__ void for_each(Vector &x, F change) {
#pragma unroll
  for (int i = 0; i < 2 * PAIRS; i++) x.first[i] = change(x.first[i]), x.second[i] = change(x.second[i]);
}

__device__ __forceinline__ void add_bias(Vector &x, const Vector &bias) {
#pragma unroll
  for (int i = 0; i < 2 * PAIRS; i++) {
    x.first[i] = round_bf16(add_rn(x.first[i], bias.first[i]));
    x.second[i] = round_bf16(add_rn(x.second[i], bias.second[i]));
  }
}

#if HAS_NORMS
__device__ __forceinline__ void normalise(Vector &x, const Vector &weight) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < 2 * PAIRS; i++) sum += x.first[i] * x.first[i] + x.second[i] * x.second[i];
  for (int far = 16; far > 0; far /= 2) sum += shuffle_xor(sum, far);
  float scale = rsqrt_rn(add_rn(mul_rn(sum, 1.0f / HEAD_DIM), EPSILON));
#pragma unroll
  for (int i = 0; i < 2 * PAIRS; i++) {
    x.first[i] = round_bf16(mul_rn(mul_rn(x.first[i], scale), weight.first[i]));
    x.second[i] = round_bf16(mul_rn(mul_rn(x.second[i], scale), weight.second[i]));
  }
}
#endif

// `cosines` and `sines` are the token's.
__device__ __forceinline__ void rotate(Vector &x, const float *cosines, const float *sines, int lane) {
#pragma unroll
  for (int i = 0; i < PAIRS; i++) {
    int channel = channel_of(lane, i);
    if (channel >= HALF) continue;
    float2 cosine = *(const float2 *)(cosines + channel), sine = *(const float2 *)(sines + channel);
#pragma unroll
    for (int j = 0; j < 2; j++) {
      float c = j ? cosine.y : cosine.x, s = j ? sine.y : sine.x, &first = x.first[2 * i + j], &second = x.second[2 * i + j];
      float turned = sub_rn(mul_rn(first, c), mul_rn(second, s));
      second = round_bf16(add_rn(mul_rn(second, c), mul_rn(first, s)));
      first = round_bf16(turned);
    }
  }
}

#if KV_KIND != 0
// The code of a number that is at most the largest code: an int8, rounded to even, plus 128, or the bits of a
// float8_e4m3fn.
__device__ __forceinline__ u32 code_of(float x) {
  if (KV_KIND == 1) return (u32)((int)rintf(x) + 128) & 0xff;
  u32 bits = __float_as_uint(x), size = bits & 0x7fffffffu, sign = bits >> 24 & 0x80;
  if (size > 0x7f800000u) return sign | 0x7f;
  if (size < 0x3c800000u) return sign | (u32)rintf(__uint_as_float(size) * 512.0f);  // below 2^-6: multiples of 2^-9
  return sign | (((size + 0x7ffff + (size >> 20 & 1)) >> 20) - (120 << 3));
}

// Writes a vector's codes, and its scale: its peak over the largest code, rounded up to bfloat16. Bits of absolute
// values are in their order, NaNs the largest, so that a vector that is not finite is read back as not finite.
__device__ __forceinline__ void write_codes(u8 *at, u16 *scale_at, Vector x, int lane) {
  u32 peak = __float_as_uint(SMALLEST_PEAK);
  for_each(x, [&](float value) {
    u32 size = __float_as_uint(value) & 0x7fffffffu;
    peak = size > peak ? size : peak;
    return value;
  });
  for (int far = 16; far > 0; far /= 2) {
    u32 other = __float_as_uint(shuffle_xor(__uint_as_float(peak), far));
    peak = other > peak ? other : peak;
  }
  u32 bits = __float_as_uint(mul_rn(__uint_as_float(peak), 1.0f / LARGEST_CODE));
  u32 code = peak > 0x7f800000u ? 0x7fc0 : (bits + 0xffff) >> 16;
  float scale = __uint_as_float(code << 16);
  if (lane == 0) *scale_at = (u16)code;
  for_each(x, [&](float value) { return div_rn(value, scale); });
#pragma unroll
  for (int i = 0; i < PAIRS; i++) {
    int channel = channel_of(lane, i);
    if (channel >= HALF) continue;
    *(u16 *)(at + channel) = (u16)(code_of(x.first[2 * i]) | code_of(x.first[2 * i + 1]) << 8);
    *(u16 *)(at + HALF + channel) = (u16)(code_of(x.second[2 * i]) | code_of(x.second[2 * i + 1]) << 8);
  }
}
#endif

extern "C" __global__ void __launch_bounds__(THREADS)
    rotate_and_write(const u16 *projected,  // [T, N, GROUP + 2, K]
#if HAS_BIAS
                     const u16 *biases,  // [N, GROUP + 2, K]
#endif
#if HAS_NORMS
                     const u16 *q_norm, const u16 *k_norm,
#endif
                     const float *cosines, const float *sines,  // [T, K / 2]
                     const int *places,                         // [T]: of a token among all pages' tokens
                     const int *layer,
#if KV_KIND == 0
                     const u16 *, const u16 *, u16 *k, u16 *v,
#else
                     const u8 *, const u8 *, const u16 *, const u16 *, u8 *k, u8 *v, u16 *k_scale, u16 *v_scale,
#endif
                     u16 *queries) {
  const int lane = threadIdx.x % 32, token = blockIdx.x / HEADS, head = blockIdx.x % HEADS;
  const u64 page_token = (u64)*layer * NUM_PAGES * PAGE_SIZE + places[token];
  const u64 cached = page_token * HEADS + head;
  for (int nth = threadIdx.x / 32; nth < VECTORS; nth += WARPS) {
    const bool is_query = nth < GROUP, is_value = nth == GROUP + 1;
    Vector x = read_vector(projected + ((u64)blockIdx.x * VECTORS + nth) * HEAD_DIM, lane);
#if HAS_BIAS
    add_bias(x, read_vector(biases + (head * VECTORS + nth) * HEAD_DIM, lane));
#endif
#if HAS_NORMS
    if (!is_value) normalise(x, read_vector(is_query ? q_norm : k_norm, lane));
#endif
    if (!is_value) rotate(x, cosines + (u64)token * HALF, sines + (u64)token * HALF, lane);
    if (is_query) {
      write_vector(queries + ((u64)blockIdx.x * GROUP + nth) * HEAD_DIM, x, lane);
      continue;
    }
#if KV_KIND == 0
    write_vector((is_value ? v : k) + cached * HEAD_DIM, x, lane);
#else
    write_codes((is_value ? v : k) + cached * HEAD_DIM, (is_value ? v_scale : k_scale) + cached, x, lane);
#endif
  }
}
