// The stages in shared memory through which keys and values pass, and the order of copies and barriers.
//
// Products read keys and values from three stages in turn: one of keys, one of values, and one that is being copied to.
// Codes of chunks have two stages, of which each thread reads what it copied itself, and two wide ones, which all read.
#pragma once
#include "cached_pages.h"

struct Ring {
  u8 *keys, *values, *spare;  // spare: the third stage, or the first of the wide ones
};

__device__ __forceinline__ Ring begin_ring(u8 *shared, int group) {
  u8 *first = shared + group * (IS_WIDENED ? 0 : RING * STAGE_BYTES);
  return {first, first + STAGE_BYTES, first + 2 * STAGE_BYTES};
}

__device__ __forceinline__ void copy_ahead(u8 *to, const u8 *from, const Cache &cache, const Stage &stage, int member) {
  copy_stage(to, from, cache, stage, member);
  cp_async_commit();
}

// Wait for the keys, begin to copy those of the next stage; returns where products read the ones that have come.
__device__ __forceinline__ const u8 *next_keys(Ring &ring, const Cache &cache, const Stage &next, int member) {
  cp_async_wait<1>();
  u8 *keys = ring.keys;
  if (IS_WIDENED) {  // the wide stage is free: its products were done before the barrier of the values
    widen_stage(ring.spare, keys, member, widen_key);
    copy_ahead(keys, cache.k, cache, next, member);
    sync_group();
    return ring.spare;
  }
  sync_group();  // what has come is there for all, and all are done with the values before it
  copy_ahead(ring.spare, cache.k, cache, next, member);
  ring.keys = ring.spare;
  ring.spare = keys;
  return keys;
}

// The same for values.
__device__ __forceinline__ const u8 *next_values(Ring &ring, const Cache &cache, const Stage &next, int member) {
  cp_async_wait<1>();
  u8 *values = ring.values;
  if (IS_WIDENED) {
    u8 *wide = ring.spare + WIDE_BYTES;
    widen_stage(wide, values, member, widen);
    copy_ahead(values, cache.v, cache, next, member);
    sync_group();
    return wide;
  }
  sync_group();
  copy_ahead(ring.spare, cache.v, cache, next, member);
  ring.values = ring.spare;
  ring.spare = values;
  return values;
}
