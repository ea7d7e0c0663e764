// What the kernels need of a GPU beyond C++, in one place, so that tests can run the same kernels on a CPU.

#define SHARED_MEMORY(name, bytes) __shared__ __align__(128) u8 name[bytes]

template <typename T>
__device__ __forceinline__ T ldg(const T *at) { return __ldg(at); }

// Copy 16 bytes to shared memory in the background, the first `bytes` (0 or 16) of them; the rest becomes zeros.
__device__ __forceinline__ void cp_async_16(void *to, const void *from, int bytes) {
  u32 address = (u32)__cvta_generic_to_shared(to);
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(bytes) : "memory");
}

__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until at most LEFT of this thread's groups of copies are under way.
template <int LEFT>
__device__ __forceinline__ void cp_async_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory"); }

#ifdef GROUP_WARPS
__device__ __forceinline__ void sync_group() {
  if (GROUP_WARPS == 1)
    __syncwarp();
  else
    __syncthreads();
}
#endif

template <typename T>
__device__ __forceinline__ T shuffle_xor(T x, int far) { return __shfl_xor_sync(0xffffffffu, x, far); }

// The number of the lane `far` before this one; the first lanes get their own.
template <typename T>
__device__ __forceinline__ T shuffle_up(T x, int far) { return __shfl_up_sync(0xffffffffu, x, far); }

// 1 or 4 neighbouring words, four of them aligned to 16 bytes.
template <int COUNT>
__device__ __forceinline__ void load(u32 (&to)[4], const u32 *at) {
  if (COUNT == 1) {
    to[0] = ldg(at);
  } else {
    uint4 four = ldg((const uint4 *)at);
    to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
  }
}

// On words in shared memory; returns the word before.
__device__ __forceinline__ u32 atomic_add(u32 *at, u32 x) { return atomicAdd(at, x); }
__device__ __forceinline__ void atomic_min(u32 *at, u32 x) { atomicMin(at, x); }
__device__ __forceinline__ void atomic_max(u32 *at, u32 x) { atomicMax(at, x); }

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Operations that the compiler neither fuses nor replaces by approximations: each is rounded once.
__device__ __forceinline__ float mul_rn(float x, float y) { return __fmul_rn(x, y); }
__device__ __forceinline__ float add_rn(float x, float y) { return __fadd_rn(x, y); }
__device__ __forceinline__ float sub_rn(float x, float y) { return __fsub_rn(x, y); }
__device__ __forceinline__ float div_rn(float x, float y) { return __fdiv_rn(x, y); }
__device__ __forceinline__ float rsqrt_rn(float x) { return __frsqrt_rn(x); }

// Two numbers rounded to bfloat16, the first in the low half.
__device__ __forceinline__ u32 pack_bf16(float low, float high) {
  u32 packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

// a b + c for two numbers in bfloat16, rounded once; subnormal numbers are kept.
__device__ __forceinline__ u32 fma_bf16x2(u32 a, u32 b, u32 c) {
  u32 out;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(c));
  return out;
}

// c += a b for a warp's 16 x 16 by 16 x 8 matrices of bfloat16 (PTX ISA, mma.m16n8k16).
__device__ __forceinline__ void mma(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
