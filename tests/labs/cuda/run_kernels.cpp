// A kernel as a function of a shared library: SOURCE is its file, ENTRY its name there.
#include "cuda_on_cpu.h"
#include SOURCE

extern "C" void run(int grid_x, int grid_y, uint64_t seed, int eager, void **args) {
  run_kernel(ENTRY, grid_x, grid_y, THREADS, seed, eager, args);
}

extern "C" uint64_t take_bytes_read() { return std::exchange(bytes_read, 0); }
