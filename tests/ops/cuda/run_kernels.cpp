// A kernel of paged_attention.cu as a function of a shared library.
#include "cuda_on_cpu.h"
#include "paged_attention.cu"

extern "C" void run(int grid_x, int grid_y, uint64_t seed, int eager, void **args) {
#if MERGE
  run_kernel(merge_pieces, grid_x, grid_y, THREADS, seed, eager, args);
#else
  run_kernel(attend_pieces, grid_x, grid_y, THREADS, seed, eager, args);
#endif
}
