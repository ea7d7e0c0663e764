// A residual and the norm of it, in one launch: sum = x + added, rounded to bfloat16, and its rows scaled to a root
// mean square of 1, times a weight for each channel. One block of threads takes one token.
//
// Macros, integers but EPSILON: WIDTH (channels of a token), WARPS.

#include "device.h"

enum {
  THREADS = 32 * WARPS,
  CHUNKS = WIDTH / 8,  // of 16 bytes
  MINE = (CHUNKS + THREADS - 1) / THREADS,
};
static_assert(WIDTH % 8 == 0, "channels are read 16 bytes at a time");

struct Channels {
  float x[8];
};

__device__ __forceinline__ Channels read_channels(const u16 *at) {
  uint4 wide = *(const uint4 *)at;
  u32 pairs[4] = {wide.x, wide.y, wide.z, wide.w};
  Channels read;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    read.x[2 * i] = __uint_as_float(pairs[i] << 16);
    read.x[2 * i + 1] = __uint_as_float(pairs[i] & 0xffff0000u);
  }
  return read;
}

__device__ __forceinline__ uint4 packed(const Channels &c) {
  return make_uint4(pack_bf16(c.x[0], c.x[1]), pack_bf16(c.x[2], c.x[3]), pack_bf16(c.x[4], c.x[5]),
                    pack_bf16(c.x[6], c.x[7]));
}

// The sum of all threads' numbers, in an order that is always the same.
__device__ __forceinline__ float over_block_sum(float mine, float *shared) {
  for (int far = 16; far > 0; far /= 2) mine += shuffle_xor(mine, far);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = mine;
  __syncthreads();
  float sum = 0.0f;
  for (int warp = 0; warp < WARPS; warp++) sum += shared[warp];
  return sum;
}

extern "C" __global__ void __launch_bounds__(THREADS)
    add_and_normalise(const u16 *added, const u16 *weight, const u16 *, u16 *x, u16 *normed) {
  SHARED_MEMORY(shared, WARPS * 4);
  const u64 row = (u64)blockIdx.x * WIDTH;
  Channels sums[MINE];
  float square = 0.0f;
#pragma unroll
  for (int i = 0; i < MINE; i++) {
    int channel = (threadIdx.x + i * THREADS) * 8;
    if (channel >= WIDTH) continue;
    Channels sum = read_channels(x + row + channel), more = read_channels(added + row + channel);
#pragma unroll
    for (int j = 0; j < 8; j++) sum.x[j] = add_rn(sum.x[j], more.x[j]);
    uint4 rounded = packed(sum);
    *(uint4 *)(x + row + channel) = rounded;
    sums[i] = read_channels((const u16 *)&rounded);
#pragma unroll
    for (int j = 0; j < 8; j++) square += sums[i].x[j] * sums[i].x[j];
  }
  const float scale = rsqrt_rn(add_rn(mul_rn(over_block_sum(square, (float *)shared), 1.0f / WIDTH), EPSILON));
#pragma unroll
  for (int i = 0; i < MINE; i++) {
    int channel = (threadIdx.x + i * THREADS) * 8;
    if (channel >= WIDTH) continue;
    Channels out = sums[i], by = read_channels(weight + channel);
#pragma unroll
    for (int j = 0; j < 8; j++) out.x[j] = mul_rn(mul_rn(out.x[j], scale), by.x[j]);
    *(uint4 *)(normed + row + channel) = packed(out);
  }
}
