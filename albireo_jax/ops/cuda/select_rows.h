// Which token of a row wins among those that its filters keep; see sample_rows.cu.
#pragma once

enum {
  FRACTION_BITS = 6,    // of a distance that tell its bin, beside its exponent
  LEAST_EXPONENT = -8,  // from which distances have bins of their own, up to 2^8
};
static_assert(LEAST_EXPONENT + (BINS >> FRACTION_BITS) == 8, "the bins end where distances do");

struct Row {
  const u32 *logits, *weights, *scores;  // float, integers, float
  float peak;
  int top_k;  // 0 without
  float top_p;
};

// What a filter keeps at least: so many tokens, or tokens of this weight together.
struct Share {
  bool counts;
  u32 count;
  float weight;

  __device__ __forceinline__ bool is_reached(Amount amount) const {
    return counts ? amount.count >= count : rounded(amount.weight) >= weight;
  }
};

// Keys of logits, from the least to the largest of some, and the amounts of all tokens above and down to them.
struct Range {
  u32 least, largest;
  Amount above, through;
};

struct Work {
  Histogram bins;
  u64 best[32];
  u32 reached, listed;
  u32 least[2], largest[2];  // keys in the bins of top-k and of top-p
  u32 key[LIST], weight[LIST];
  int column[LIST];
};

// The tokens of the list.
struct Listed {
  const Work &work;

  template <typename Visit>
  __device__ __forceinline__ void each(Visit visit) const {
    for (int at = threadIdx.x; at < (int)work.listed; at += THREADS) visit(work.key[at], at);
  }
  __device__ __forceinline__ u32 weight(int at) const { return work.weight[at]; }
  __device__ __forceinline__ int column(int at) const { return work.column[at]; }
};

// All tokens of the row.
struct Whole {
  const Row &row;

  template <typename Visit>
  __device__ __forceinline__ void each(Visit visit) const {
    each_column<false>(row.logits, row.logits, [&](int column, u32 bits, u32) {
      if (bits != MINUS_INFINITY) visit(key_of(__uint_as_float(bits)), column);
    });
  }
  __device__ __forceinline__ u32 weight(int column) const { return row.top_p < 1.0f ? ldg(row.weights + column) : 0; }
  __device__ __forceinline__ int column(int at) const { return at; }
};

// The bin of a logit, by how far it is below the largest one: nearer logits come first.
__device__ __forceinline__ int bin_of(const Row &row, float logit) {
  const int least = (127 + LEAST_EXPONENT) << FRACTION_BITS;
  const int bin = (int)(__float_as_uint(row.peak - logit) >> (23 - FRACTION_BITS)) - least;
  return min(max(bin, 0), BINS - 1);
}

// The weight that the tokens kept by top-p reach: of those that top-k keeps, at least the likeliest.
__device__ __forceinline__ Share nucleus(const Row &row, Amount top) {
  return {false, 0, fmaxf(row.top_p * rounded(top.weight), 1.0f)};
}

// The first bin at which a share is reached; BINS if none.
__device__ __forceinline__ int first_reached(Work &work, Amount above, Share share) {
  if (threadIdx.x == 0) work.reached = BINS;
  __syncthreads();
  for (int bin = threadIdx.x; bin < BINS; bin += THREADS)
    if (share.is_reached(above + amount(work.bins, bin)) && !share.is_reached(above + amount(work.bins, bin - 1)))
      work.reached = bin;
  __syncthreads();
  const int bin = work.reached;
  __syncthreads();
  return bin;
}

// The key of a range, as a range of its own, at which a share is reached; it is reached in the range.
template <typename Tokens>
__device__ __forceinline__ Range narrow(Work &work, Range range, Share share, const Tokens &tokens) {
  for (int known = 0; known < 32 && range.least != range.largest; known += BIN_BITS) {
    const int shift = max(32 - __clz((int)(range.largest - range.least)) - BIN_BITS, 0);
    clear(work.bins);
    tokens.each([&](u32 key, int at) {
      if (key >= range.least && key <= range.largest) add(work.bins, (range.largest - key) >> shift, tokens.weight(at));
    });
    accumulate(work.bins);
    const int bin = first_reached(work, range.above, share);
    range.through = range.above + amount(work.bins, bin);
    range.above = range.above + amount(work.bins, bin - 1);
    range.largest -= (u32)bin << shift;
    const u32 width = (1u << shift) - 1;
    if (range.largest - range.least > width) range.least = range.largest - width;
    __syncthreads();
  }
  return range;
}

// The best token of those that a row's filters keep, as `contender` writes it.
template <typename Tokens>
__device__ __forceinline__ u64 best_kept(const Row &row, Work &work, Range top, Range last, u64 best,
                                         const Tokens &tokens) {
  u32 floor = 0;
  if (top.least <= top.largest) {
    top = narrow(work, top, {true, (u32)row.top_k, 0.0f}, tokens);
    floor = top.least;
  }
  if (row.top_p < 1.0f) floor = max(floor, narrow(work, last, nucleus(row, top.through), tokens).least);
  tokens.each([&](u32 key, int at) {
    if (key < floor) return;
    const int column = tokens.column(at);
    const u64 mine = contender(__uint_as_float(ldg(row.scores + column)), column);
    best = mine > best ? mine : best;
  });
  return best;
}

__device__ __forceinline__ u64 select(const Row &row, Work &work) {
  const bool has_share = row.top_p < 1.0f;
  u64 best = 0;
  auto compete = [&](u32 score, int column) {
    const u64 mine = contender(__uint_as_float(score), column);
    best = mine > best ? mine : best;
  };
  if (row.top_k == 0 && !has_share) {
    each_column<false>(row.scores, row.scores, [&](int column, u32 score, u32) { compete(score, column); });
    return largest(best, work.best);
  }

  clear(work.bins);
  auto count = [&](int, u32 bits, u32 weight) {
    if (bits != MINUS_INFINITY) add(work.bins, bin_of(row, __uint_as_float(bits)), weight);
  };
  if (has_share)
    each_column<true>(row.logits, row.weights, count);
  else
    each_column<false>(row.logits, row.logits, count);
  accumulate(work.bins);
  // Where top-k ends, and where top-p may end: not all that is in the bin of the k-th largest is among the k.
  const int top_bin = row.top_k > 0 ? first_reached(work, {0, 0}, {true, (u32)row.top_k, 0.0f}) : BINS;
  Range top = {1, 0, amount(work.bins, top_bin - 1), amount(work.bins, min(top_bin, BINS - 1))};
  int first_bin = BINS, last_bin = -1;
  if (has_share) {
    first_bin = first_reached(work, {0, 0}, nucleus(row, top.above));
    last_bin = first_reached(work, {0, 0}, nucleus(row, top.through));
  }
  Range last = {1, 0, amount(work.bins, first_bin - 1), amount(work.bins, last_bin)};

  if (threadIdx.x == 0) {
    work.listed = 0;
    for (int filter = 0; filter < 2; filter++) work.least[filter] = ~0u, work.largest[filter] = 0;
  }
  __syncthreads();
  const int sure_bins = min(top_bin, first_bin);
  each_column<false>(row.logits, row.logits, [&](int column, u32 bits, u32) {
    if (bits == MINUS_INFINITY) return;
    const int bin = bin_of(row, __uint_as_float(bits));
    if (bin < sure_bins) return compete(ldg(row.scores + column), column);
    const bool is_in[2] = {bin == top_bin, bin >= first_bin && bin <= last_bin};
    if (!is_in[0] && !is_in[1]) return;
    const u32 key = key_of(__uint_as_float(bits));
    for (int filter = 0; filter < 2; filter++)
      if (is_in[filter]) atomic_min(work.least + filter, key), atomic_max(work.largest + filter, key);
    const u32 at = atomic_add(&work.listed, 1);
    if (at >= LIST) return;
    work.key[at] = key, work.weight[at] = has_share ? ldg(row.weights + column) : 0, work.column[at] = column;
  });
  __syncthreads();
  if (top_bin < BINS) top.least = work.least[0], top.largest = work.largest[0];
  last.least = work.least[1], last.largest = work.largest[1];
  if (work.listed <= LIST)
    best = best_kept(row, work, top, last, best, Listed{work});
  else
    best = best_kept(row, work, top, last, best, Whole{row});
  return largest(best, work.best);
}
