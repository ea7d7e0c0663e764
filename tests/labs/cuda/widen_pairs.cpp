// All pairs of codes as 16-bit numbers, each pair beside another one.
#include "cuda_on_cpu.h"
#include "widening.h"

extern "C" void widen_pairs(uint32_t *first, uint32_t *second) {
  for (uint32_t pair = 0; pair < 65536; pair++) {
    Widened widened = widen(pair | (pair ^ 0xffff) << 16);
    first[pair] = widened.pair[0], second[pair] = widened.pair[1];
  }
}
