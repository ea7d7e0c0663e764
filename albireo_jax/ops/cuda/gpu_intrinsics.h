// What the kernels need of a GPU beyond C++, in one place, so that tests can run the same kernels on a CPU.

#define SHARED_MEMORY(name, bytes) __shared__ __align__(128) u8 name[bytes]

template <typename T>
__device__ __forceinline__ T ldg(const T *at) { return __ldg(at); }

// What another block of the same kernel may have written.
__device__ __forceinline__ float load_l2(const float *at) { return __ldcg(at); }

// What this thread wrote before is seen by all that see what it writes afterwards.
__device__ __forceinline__ void fence_device() { __threadfence(); }

// Adds 1 to a count that begins again at 0 after `round` of them; returns what it was.
__device__ __forceinline__ int count_round(int *count, int round) { return (int)atomicInc((u32 *)count, round - 1); }

// Copy 16 bytes to shared memory in the background, the first `bytes` (0 or 16) of them; the rest becomes zeros.
template <int OFFSET>
__device__ __forceinline__ void cp_async_16(void *to, const u8 *from, int bytes) {
  u32 address = (u32)__cvta_generic_to_shared(to);
  asm volatile("cp.async.cg.shared.global [%0], [%1 + %3], 16, %2;"
               :
               : "r"(address), "l"(from), "r"(bytes), "n"(OFFSET)
               : "memory");
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

__device__ __forceinline__ float shuffle(float x, int lane) { return __shfl_sync(0xffffffffu, x, lane); }

// A number that all lanes have; so the compiler knows that branches on it do not part them.
__device__ __forceinline__ int same_in_warp(int x) { return __shfl_sync(0xffffffffu, x, 0); }

// The largest of all lanes.
__device__ __forceinline__ u32 max_in_warp(u32 x) { return __reduce_max_sync(0xffffffffu, x); }

__device__ __forceinline__ bool any_lane(bool is_true) { return __any_sync(0xffffffffu, is_true); }

// (a & b) | c
__device__ __forceinline__ u32 and_or(u32 a, u32 b, u32 c) {
  u32 out;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(out) : "r"(a), "r"(b), "r"(c));
  return out;
}

// Where `mask` has ones the bits of `a`, elsewhere those of `b`.
__device__ __forceinline__ u32 pick_bits(u32 mask, u32 a, u32 b) {
  u32 out;
  asm("lop3.b32 %0, %1, %2, %3, 0xca;" : "=r"(out) : "r"(mask), "r"(a), "r"(b));
  return out;
}

// Four 8 x 8 matrices of 16-bit numbers: lane 8 i + r gives where row r of the i-th lies; each lane gets of row
// lane / 4 the numbers of columns lane % 4 * 2 and the next.
__device__ __forceinline__ void read_matrices(u32 (&out)[4], const u8 *row) {
  u32 address = (u32)__cvta_generic_to_shared(row);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(address)
               : "memory");
}

// The same, transposed: each lane gets of column lane / 4 the numbers of rows lane % 4 * 2 and the next.
__device__ __forceinline__ void read_transposed(u32 (&out)[4], const u8 *row) {
  u32 address = (u32)__cvta_generic_to_shared(row);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(address)
               : "memory");
}

// An 8 x 8 matrix of 16-bit numbers, transposed; each lane has two of row lane / 4.
__device__ __forceinline__ u32 transpose(u32 x) {
  u32 out;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(x));
  return out;
}

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

// Two numbers rounded to f16, the first in the low half; subnormal numbers are kept.
__device__ __forceinline__ u32 pack_f16(float low, float high) {
  u32 packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

// a + b for two numbers in f16, rounded once.
__device__ __forceinline__ u32 add_f16x2(u32 a, u32 b) {
  u32 out;
  asm("add.rn.f16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
  return out;
}

#if __CUDA_ARCH__ >= 900
// Four float8_e4m3fn as f16: the lowest two bytes, the first in the low half, and the others.
__device__ __forceinline__ void convert_e4m3x4(u32 codes, u32 &low, u32 &high) {
  asm("{.reg .b16 first, second;\n"
      "mov.b32 {first, second}, %2;\n"
      "cvt.rn.f16x2.e4m3x2 %0, first;\n"
      "cvt.rn.f16x2.e4m3x2 %1, second;}"
      : "=r"(low), "=r"(high)
      : "r"(codes));
}
#endif

// c += a b for a warp's 16 x 16 by 16 x 8 matrices of bfloat16 (PTX ISA, mma.m16n8k16).
__device__ __forceinline__ void mma_bf16(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// The same of f16, whose subnormal numbers count too.
__device__ __forceinline__ void mma_f16(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
