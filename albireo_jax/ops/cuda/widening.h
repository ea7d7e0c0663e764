// Codes of one byte as numbers of 16 bits, exactly and two at a time.
//
// The numbers are f16, whose ten bits behind the point hold any code; bfloat16 has seven. Queries and weights that meet
// codes in products are f16 too, in units that keep them in its range (units.h).
#pragma once
#include "layout.h"

// Four codes as two pairs: the first and the third, the second and the fourth; neighbours where KEEPS_ORDER.
struct Widened {
  u32 pair[2];
};

// Four bytes, the third in the place of the second.
__device__ __forceinline__ u32 every_other(u32 bytes) { return __byte_perm(bytes, 0, 0x3120); }

__device__ __forceinline__ u32 low_halves(u32 first, u32 second) { return __byte_perm(first, second, 0x5410); }
__device__ __forceinline__ u32 high_halves(u32 first, u32 second) { return __byte_perm(first, second, 0x7632); }

// Pages hold an int8 plus 128. That makes the low bits of an f16 from 1024 on, and so the int8 plus 1152.
#define MINUS_1152 0xe480e480u

__device__ __forceinline__ Widened widen_shifted(u32 codes) {
  return {{__byte_perm(codes, 0x64646464u, 0x4240), __byte_perm(codes, 0x64646464u, 0x4341)}};
}

__device__ __forceinline__ Widened widen_int8(u32 codes) {
  Widened shifted = widen_shifted(codes);
  return {{add_f16x2(shifted.pair[0], MINUS_1152), add_f16x2(shifted.pair[1], MINUS_1152)}};
}

// Without an instruction for it, an fp8 is moved to where an f16 has the same bits, and counts 256 times less there.
#if CONVERTS_FP8
#define CODE_UNIT 1.0f
__device__ __forceinline__ Widened widen_fp8(u32 codes) {
  Widened widened;
  convert_e4m3x4(KEEPS_ORDER ? codes : every_other(codes), widened.pair[0], widened.pair[1]);
  return widened;
}
#else
#define CODE_UNIT (KV_KIND == 2 ? 256.0f : 1.0f)
__device__ __forceinline__ Widened widen_fp8(u32 codes) {
  u32 signs = and_or(codes, 0x80808080u, 0);  // as one instruction for both pairs
  return {{pick_bits(0x3f803f80u, codes << 7, signs << 8), pick_bits(0x3f803f80u, codes >> 1, signs)}};
}
#endif

__device__ __forceinline__ Widened widen(u32 codes) { return KV_KIND == 1 ? widen_int8(codes) : widen_fp8(codes); }

__device__ __forceinline__ Widened widen_key(u32 codes) { return SHIFTS_KEYS ? widen_shifted(codes) : widen(codes); }
