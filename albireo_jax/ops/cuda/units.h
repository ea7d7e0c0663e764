// Products of queries with keys and of weights with values: bfloat16 with bfloat16 pages, f16 with codes.
//
// Numbers that meet codes are multiplied by a power of two that takes the largest of them to between 2^15 and 2^16.
// Then f16 holds bfloat16 numbers exactly down to 2^-32 of the largest, and smaller ones to within 2^-40 of it; no
// number is too large. Tokens' scales, by which products are multiplied anyway, take the powers back.
#pragma once
#include "cached_pages.h"

// Powers of two as the bits of a float: an exponent that stands above its 23 bits behind the point.
enum { EXPONENT = 0x7f800000, ONE_STEP = 1 << 23, LEAST_POWER = 16 * ONE_STEP, ONE = 127 * ONE_STEP };

// What takes numbers from this power to the next one into the range of f16, and what takes products with codes back.
__device__ __forceinline__ float into_f16(u32 power) { return __uint_as_float(2u * ONE + 15u * ONE_STEP - power); }
__device__ __forceinline__ float out_of_f16(u32 power) { return __uint_as_float(power - 15 * ONE_STEP) * CODE_UNIT; }

__device__ __forceinline__ void multiply(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  if (KV_KIND == 0)
    mma_bf16(c, a0, a1, a2, a3, b0, b1);
  else
    mma_f16(c, a0, a1, a2, a3, b0, b1);
}

__device__ __forceinline__ u32 pack(float low, float high) {
  return KV_KIND == 0 ? pack_bf16(low, high) : pack_f16(low, high);
}

// Make f16 of a warp's queries, pairs of bfloat16; returns what takes products with them back. Infinite ones have no
// part in the choice of the power and stay infinite.
template <int PAIRS>
__device__ __forceinline__ float queries_into_f16(u32 (&q)[PAIRS]) {
  u32 power = LEAST_POWER;
#pragma unroll
  for (int i = 0; i < PAIRS; i++) {
    u32 low = q[i] << 16 & EXPONENT, high = q[i] & EXPONENT;
    power = max(power, max(low == EXPONENT ? 0 : low, high == EXPONENT ? 0 : high));
  }
  power = max_in_warp(power);
  const float factor = into_f16(power);
#pragma unroll
  for (int i = 0; i < PAIRS; i++)
    q[i] = pack_f16(__uint_as_float(q[i] << 16) * factor, __uint_as_float(q[i] & 0xffff0000u) * factor);
  return out_of_f16(power);
}

// A stage's scales for products of queries in `unit` and of weights in what takes the largest scale so far into f16.
// `power` is that scale's.
__device__ __forceinline__ Scales in_units(Scales scales, float unit, u32 &power) {
  if (KV_KIND == 0) return scales;
  u32 largest = __float_as_uint(scales.v[0]);
#pragma unroll
  for (int i = 1; i < (TOKENS + 31) / 32; i++) largest = max(largest, __float_as_uint(scales.v[i]));
  power = max(power, max_in_warp(largest) & EXPONENT);
#pragma unroll
  for (int i = 0; i < (TOKENS + 31) / 32; i++) scales.k[i] *= unit, scales.v[i] *= into_f16(power);
  return scales;
}

// What sums of values have to be multiplied by where the power grew.
__device__ __forceinline__ float power_fade(u32 before, u32 power) {
  return power - before < ONE ? __uint_as_float(ONE - (power - before)) : 0.0f;
}
