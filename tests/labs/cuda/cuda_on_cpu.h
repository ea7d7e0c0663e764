// CUDA kernels as ordinary C++: each thread of a block is a fiber, run one at a time until it must wait.
//
// What real threads do at once happens here in an order drawn from a seed, and background copies happen either at
// once or as late as they may: a missing barrier shows as a result that depends on the order. Shared memory
// begins as NaNs.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <utility>
#include <vector>

#define ON_CPU
#define __device__
#define __global__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define SHARED_MEMORY(name, bytes) \
  static_assert(bytes <= 49152); \
  u8 *name = shared_memory

struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) uint2 { uint32_t x, y; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
using std::max;
using std::min;

inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t selector) {
  uint64_t bytes = (uint64_t)y << 32 | x, picked = 0;
  for (int i = 0; i < 4; i++) picked |= (bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return (uint32_t)picked;
}

struct Index { int x = 0, y = 0, z = 0; };

struct Copy { void *to; const void *from; int bytes; };

struct Fiber {
  int fenced = -1;                         // the turn of the block's meeting when it last waited for its writes
  jmp_buf at;
  ucontext_t begin;
  std::vector<char> stack;
  bool is_started = false, is_done = false;
  Index thread;
  std::vector<Copy> copies;                // of the group that is being made
  std::vector<std::vector<Copy>> groups;   // committed, the oldest first
};

// Waits until all of some fibers have come, and hands each what the others brought.
struct Meeting {
  int size = 0, arrived = 0, turn = 0;
  float brought[2][32][16];
};

constexpr int kStack = 64 * 1024;
inline std::vector<Fiber> fibers;
inline std::vector<Meeting> warps;
inline Meeting block;
inline Fiber *running;
inline jmp_buf scheduler;
inline bool is_eager;
static uint64_t bytes_read;  // of global memory, by loads that say so; each library counts its own
inline Index blockIdx;
alignas(128) inline unsigned char shared_memory[49152];
#define threadIdx (running->thread)

inline void pass_on() {
  if (!_setjmp(running->at)) _longjmp(scheduler, 1);
}

inline void meet(Meeting &meeting) {
  int turn = meeting.turn;
  if (++meeting.arrived == meeting.size) {
    meeting.arrived = 0, meeting.turn++;
    return;
  }
  while (meeting.turn == turn) pass_on();
}

inline Meeting &my_warp() { return warps[threadIdx.x / 32]; }
inline void __syncthreads() { meet(block); }
inline void sync_warp() { meet(my_warp()); }

// What lane `from` of the warp brings to the same call.
template <typename T>
inline T shuffle(T x, int from) {
  Meeting &warp = my_warp();
  int turn = warp.turn % 2;
  std::memcpy(warp.brought[turn][threadIdx.x % 32], &x, sizeof x);
  meet(warp);
  std::memcpy(&x, warp.brought[turn][from], sizeof x);
  return x;
}

inline float shuffle(float x, int from) {
  Meeting &warp = my_warp();
  int turn = warp.turn % 2;
  warp.brought[turn][threadIdx.x % 32][0] = x;
  meet(warp);
  return warp.brought[turn][from][0];
}

// The largest of all lanes.
inline uint32_t max_in_warp(uint32_t x) {
  Meeting &warp = my_warp();
  int turn = warp.turn % 2;
  std::memcpy(warp.brought[turn][threadIdx.x % 32], &x, 4);
  meet(warp);
  for (int lane = 0; lane < 32; lane++) {
    uint32_t other;
    std::memcpy(&other, warp.brought[turn][lane], 4);
    x = std::max(x, other);
  }
  return x;
}

inline int same_in_warp(int x) { return x; }

inline bool any_lane(bool is_true) {
  Meeting &warp = my_warp();
  int turn = warp.turn % 2;
  warp.brought[turn][threadIdx.x % 32][0] = is_true;
  meet(warp);
  return std::any_of(warp.brought[turn], warp.brought[turn] + 32, [](const float *lane) { return lane[0] != 0; });
}

template <typename T>
inline T shuffle_xor(T x, int far) { return shuffle(x, threadIdx.x % 32 ^ far); }

template <typename T>
inline T shuffle_up(T x, int far) { return shuffle(x, threadIdx.x % 32 < far ? threadIdx.x % 32 : threadIdx.x % 32 - far); }

template <typename T>
inline T ldg(const T *at) {
  bytes_read += sizeof *at;
  return *at;
}

template <int COUNT>
inline void load(uint32_t (&to)[4], const uint32_t *at) {
  if ((uintptr_t)at % (4 * COUNT)) abort();
  bytes_read += 4 * COUNT;
  std::memcpy(to, at, 4 * COUNT);
}

inline uint32_t atomic_add(uint32_t *at, uint32_t x) { return std::exchange(*at, *at + x); }
inline void atomic_min(uint32_t *at, uint32_t x) { *at = std::min(*at, x); }
inline void atomic_max(uint32_t *at, uint32_t x) { *at = std::max(*at, x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }

inline float load_l2(const float *at) { return *at; }

inline void fence_device() { running->fenced = block.turn; }

// Counts a block only if all its threads have waited for their writes, and then for each other; else nobody is last.
inline int count_round(int *count, int round) {
  for (const Fiber &fiber : fibers)
    if (fiber.fenced < 0 || fiber.fenced >= block.turn) return -1;
  int before = *count;
  *count = before == round - 1 ? 0 : before + 1;
  return before;
}

inline float __uint_as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

// Each is rounded once: the compiler is told to fuse nothing.
inline float mul_rn(float x, float y) { return x * y; }
inline float add_rn(float x, float y) { return x + y; }
inline float sub_rn(float x, float y) { return x - y; }
inline float div_rn(float x, float y) { return x / y; }
inline float rsqrt_rn(float x) { return (float)(1.0 / std::sqrt((double)x)); }

inline uint32_t and_or(uint32_t a, uint32_t b, uint32_t c) { return (a & b) | c; }
inline uint32_t pick_bits(uint32_t mask, uint32_t a, uint32_t b) { return (mask & a) | (~mask & b); }

// ldmatrix.x4: each lane brings the row whose address it has, as it is when the lane comes, and gets two numbers of
// each matrix: neighbours in a row, or in a column of a transposed one.
template <bool IS_TRANSPOSED>
inline void read_rows(uint32_t (&out)[4], const void *row) {
  Meeting &warp = my_warp();
  int turn = warp.turn % 2, lane = threadIdx.x % 32;
  if ((uintptr_t)row % 16) abort();
  std::memcpy(warp.brought[turn][lane], row, 16);
  meet(warp);
  for (int i = 0; i < 4; i++) {
    uint16_t pair[2];
    for (int j = 0; j < 2; j++) {
      int r = lane / 4, c = lane % 4 * 2 + j;
      if (IS_TRANSPOSED) std::swap(r, c);
      std::memcpy(&pair[j], (const char *)warp.brought[turn][8 * i + r] + c * 2, 2);
    }
    std::memcpy(&out[i], pair, 4);
  }
}

inline void read_matrices(uint32_t (&out)[4], const void *row) { read_rows<false>(out, row); }
inline void read_transposed(uint32_t (&out)[4], const void *row) { read_rows<true>(out, row); }

// movmatrix.trans of a matrix of which each lane has two neighbours of row lane / 4.
inline uint32_t transpose(uint32_t x) {
  Meeting &warp = my_warp();
  int turn = warp.turn % 2, lane = threadIdx.x % 32;
  std::memcpy(&warp.brought[turn][lane][0], &x, 4);
  meet(warp);
  uint16_t pair[2];
  for (int j = 0; j < 2; j++)
    std::memcpy(&pair[j], (const char *)&warp.brought[turn][(lane % 4 * 2 + j) * 4 + lane / 8][0] + lane / 4 % 2 * 2, 2);
  std::memcpy(&x, pair, 4);
  return x;
}

inline float exp2_fast(float x) { return std::exp2(x); }

inline uint32_t rounded_bf16(float x) {
  uint32_t bits = __float_as_uint(x);
  if (std::isnan(x)) return 0x7fff;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

inline uint32_t pack_bf16(float low, float high) { return rounded_bf16(low) | rounded_bf16(high) << 16; }

// By hand, because threads of XLA take subnormal numbers for zeros.
inline double from_f16(uint32_t bits) {
  int exponent = bits >> 10 & 0x1f, mantissa = bits & 0x3ff;
  double size = exponent == 31 ? (mantissa ? NAN : INFINITY)
                : exponent     ? std::ldexp(1024 + mantissa, exponent - 25)
                               : std::ldexp(mantissa, -24);
  return bits & 0x8000 ? -size : size;
}

// To the nearest, of two such the even one.
inline uint32_t rounded_f16(double x) {
  uint32_t sign = std::signbit(x) ? 0x8000 : 0;
  if (std::isnan(x)) return 0x7fff;
  double size = std::fabs(x);
  if (size >= 65520) return sign | 0x7c00;
  int exponent = size < std::ldexp(1, -14) ? -14 : std::ilogb(size);
  double steps = std::nearbyint(std::ldexp(size, 10 - exponent));  // 2048 of them are the next exponent's 1024
  return sign | (uint32_t)((exponent + 14) * 1024 + steps);
}

inline uint32_t pack_f16(float low, float high) { return rounded_f16(low) | rounded_f16(high) << 16; }

inline uint32_t add_f16x2(uint32_t a, uint32_t b) {
  auto half = [&](int at) { return rounded_f16(from_f16(a >> at) + from_f16(b >> at)); };
  return half(0) | half(16) << 16;
}

inline uint32_t convert_e4m3(uint32_t code) {
  int exponent = code >> 3 & 0xf, mantissa = code & 7;
  double size = exponent ? std::ldexp(8 + mantissa, exponent - 10) : std::ldexp(mantissa, -9);
  if ((code & 0x7f) == 0x7f) size = NAN;
  return rounded_f16(code & 0x80 ? -size : size);
}

inline void convert_e4m3x4(uint32_t codes, uint32_t &low, uint32_t &high) {
  low = convert_e4m3(codes) | convert_e4m3(codes >> 8) << 16;
  high = convert_e4m3(codes >> 16) | convert_e4m3(codes >> 24) << 16;
}

inline void land(const std::vector<Copy> &copies) {
  for (const Copy &copy : copies) {
    std::memset(copy.to, 0, 16);
    std::memcpy(copy.to, copy.from, copy.bytes);
  }
}

template <int OFFSET>
inline void cp_async_16(void *to, const unsigned char *row, int bytes) {
  const unsigned char *from = row + OFFSET;
  if ((uintptr_t)to % 16 || (uintptr_t)from % 16 || (char *)to < (char *)shared_memory ||
      (char *)to + 16 > (char *)shared_memory + sizeof shared_memory)
    abort();
  running->copies.push_back({to, from, bytes});
  if (is_eager) land({running->copies.back()});
}

inline void cp_async_commit() { running->groups.push_back(std::exchange(running->copies, {})); }

template <int LEFT>
inline void cp_async_wait() {
  auto &groups = running->groups;
  while ((int)groups.size() > LEFT) {
    if (!is_eager) land(groups.front());
    groups.erase(groups.begin());
  }
}

#ifdef GROUP_WARPS
inline void sync_group() {
  if (GROUP_WARPS == 1)
    sync_warp();
  else
    __syncthreads();
}
#endif

inline float bf16_half(float packed, int half) {
  uint32_t bits = __float_as_uint(packed);
  return __uint_as_float(half ? bits & 0xffff0000u : bits << 16);
}

inline float f16_half(float packed, int half) { return (float)from_f16(__float_as_uint(packed) >> 16 * half); }

// mma.m16n8k16: which lane holds what is from the PTX ISA's pictures of the fragments.
template <float (*HALF)(float, int)>
inline void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  Meeting &warp = my_warp();
  int turn = warp.turn % 2, lane = threadIdx.x % 32;
  uint32_t mine[6] = {a0, a1, a2, a3, b0, b1};
  for (int i = 0; i < 6; i++) warp.brought[turn][lane][i] = __uint_as_float(mine[i]);
  meet(warp);
  const auto &brought = warp.brought[turn];
  for (int i = 0; i < 4; i++) {
    int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 16; k++) {
      float a = HALF(brought[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2], k % 2);
      float b = HALF(brought[column * 4 + k % 8 / 2][4 + k / 8], k % 2);
      c[i] += a * b;
    }
  }
}

inline void mma_bf16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  mma<bf16_half>(c, a0, a1, a2, a3, b0, b1);
}

inline void mma_f16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  mma<f16_half>(c, a0, a1, a2, a3, b0, b1);
}

// Runs every block of a grid; `body` is the kernel with its arguments.
template <typename Body>
void run_grid(int grid_x, int grid_y, int threads, uint64_t seed, bool eager, Body body) {
  static Body *current;
  current = &body;
  is_eager = eager;
  uint64_t random = 2 * seed + 1;  // of Marsaglia's xorshift64
  std::vector<int> order(threads);
  std::iota(order.begin(), order.end(), 0);
  std::vector<int> blocks(grid_x * grid_y);
  std::iota(blocks.begin(), blocks.end(), 0);
  for (int i = grid_x * grid_y - 1; i > 0; i--) {
    random ^= random << 13, random ^= random >> 7, random ^= random << 17;
    std::swap(blocks[i], blocks[random % (i + 1)]);
  }
  for (int index : blocks) {
      blockIdx.x = index % grid_x, blockIdx.y = index / grid_x;
      std::memset(shared_memory, 0xff, sizeof shared_memory);
      fibers.resize(threads);
      warps.assign(threads / 32, Meeting{32});
      block = Meeting{threads};
      for (int i = 0; i < threads; i++) {
        Fiber &fiber = fibers[i];
        fiber.is_started = fiber.is_done = false;
        fiber.fenced = -1;
        fiber.thread = {i, 0, 0};
        fiber.copies.clear(), fiber.groups.clear();
        fiber.stack.resize(kStack);
      }
      for (int left = threads; left > 0;) {
        for (int i = threads - 1; i > 0; i--) {
          random ^= random << 13, random ^= random >> 7, random ^= random << 17;
          std::swap(order[i], order[random % (i + 1)]);
        }
        for (int i : order) {
          running = &fibers[i];
          if (running->is_done) continue;
          if (!_setjmp(scheduler)) {
            if (running->is_started) _longjmp(running->at, 1);
            running->is_started = true;
            getcontext(&running->begin);
            running->begin.uc_stack.ss_sp = running->stack.data();
            running->begin.uc_stack.ss_size = kStack;
            running->begin.uc_link = nullptr;
            makecontext(&running->begin, +[] {
              (*current)();
              running->is_done = true;
              _longjmp(scheduler, 1);
            }, 0);
            setcontext(&running->begin);
          }
          left -= running->is_done;
        }
      }
    }
}

template <typename... Args, size_t... I>
void call(void (*kernel)(Args...), void **args, std::index_sequence<I...>) {
  kernel(reinterpret_cast<Args>(args[I])...);
}

template <typename... Args>
void run_kernel(void (*kernel)(Args...), int grid_x, int grid_y, int threads, uint64_t seed, bool eager, void **args) {
  run_grid(grid_x, grid_y, threads, seed, eager,
           [=] { call(kernel, args, std::index_sequence_for<Args...>()); });
}
