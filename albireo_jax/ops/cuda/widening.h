// Codes of one byte as bfloat16, exactly and two at a time.
#pragma once
#include "layout.h"

// Four codes: the first and the third, then the second and the fourth.
struct Widened {
  u32 even, odd;
};

__device__ __forceinline__ u32 low_halves(u32 first, u32 second) { return __byte_perm(first, second, 0x5410); }
__device__ __forceinline__ u32 high_halves(u32 first, u32 second) { return __byte_perm(first, second, 0x7632); }

// An int8 is made of 128 + its low seven bits, of which 128 or, by its sign, 256 is taken.
__device__ __forceinline__ u32 widen_int8(u32 codes) {
  return fma_bf16x2(and_or(codes, 0x007f007fu, 0x43004300u), 0x3f803f80u, and_or(codes, 0x00800080u, 0xc300c300u));
}

// An fp8 without its sign, moved to where a bfloat16 has them, is a number 2^120 times too small. `signs` has ones where
// signs are, and perhaps where the number goes.
__device__ __forceinline__ u32 widen_fp8(u32 moved, u32 signs) {
  return fma_bf16x2(pick_bits(0x07f007f0u, moved, signs), 0x7b807b80u, 0x80008000u);
}

__device__ __forceinline__ Widened widen(u32 codes) {
  if (KV_KIND == 1) return {widen_int8(codes), widen_int8(codes >> 8)};
  u32 signs = and_or(codes, 0x80808080u, 0);  // as one instruction for both pairs
  return {widen_fp8(codes << 4, signs << 8), widen_fp8(codes >> 4, signs)};
}
