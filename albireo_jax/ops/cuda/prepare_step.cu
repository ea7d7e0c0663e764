// All that the kernels of a step's layers need to know of its rows, in one launch of one block: input ids, positions
// and places in the pages of the tokens, and how attention is cut into pieces of about the same length.
//
// Queries are cut into tiles of up to `queries` queries of one row, and what a tile sees of its row's context into
// pieces of whole blocks of tokens, so long that about `num_pieces` come out of all tiles together. A tile of one
// piece writes its results; the pieces of a cut tile write theirs into slots of their own, and the last of them to
// be done merges them:
//
//     tile     0               1       2 3
//     block    0   1   2   3   0   1   0 0   1   2          10 blocks
//     piece    |---0---|---1---|---2---|3|---4---|-5-|       num_pieces = 5: pieces of 2 blocks
//     slots     0       1                 2       3          tiles 0 and 3 are cut
//
// Sizes are operands, so that one text serves all steps of all models. The macro: WARPS.

#include "device.h"

enum { THREADS = 32 * WARPS };

#define MOST_PIECES 64  // of one tile: a block of threads merges them
#define TOKEN_ON_DEVICE -1

struct Sizes {
  int tokens, rows, table_width, page_size, heads;
};

// How rows whose number of queries is between `fewest` and `most` are cut; `group` heads share keys.
struct Cut {
  int fewest, most, queries, group, block_tokens, num_tiles, num_pieces, first_slot, window, clears_padding;
};

struct Tile {
  int row, token, queries, position, first, blocks, end_piece, slot;
};

struct Piece {
  int table_row, token, queries, position, begin, end, slot, turn;
};

struct Pair {
  int x, y;
};

// Calls use(index, value, inclusive sum) for values 0 ... count - 1, all of which value(index) gives; returns the sum.
template <typename Value, typename Use>
__device__ __forceinline__ Pair scan(Pair *shared, int count, Value value, Use use) {
  Pair before = {0, 0};
  for (int begin = 0; begin < count; begin += THREADS) {
    int index = begin + threadIdx.x;
    Pair mine = {0, 0}, sum;
    if (index < count) mine = value(index);
    sum = mine;
    for (int far = 1; far < THREADS; far *= 2) {
      shared[threadIdx.x] = sum;
      __syncthreads();
      if (threadIdx.x >= far) sum.x += shared[threadIdx.x - far].x, sum.y += shared[threadIdx.x - far].y;
      __syncthreads();
    }
    if (index < count) use(index, mine, Pair{before.x + sum.x, before.y + sum.y});
    shared[threadIdx.x] = sum;
    __syncthreads();
    before.x += shared[THREADS - 1].x, before.y += shared[THREADS - 1].y;
    __syncthreads();
  }
  return before;
}

__device__ __forceinline__ int greatest(Pair *shared, int mine) {
  for (int far = THREADS / 2; far > 0; far /= 2) {
    shared[threadIdx.x].x = mine;
    __syncthreads();
    mine = max(mine, shared[threadIdx.x ^ far].x);
    __syncthreads();
  }
  return mine;
}

// The first of consecutive ranges whose end lies behind an index; `count` if none does.
template <typename End>
__device__ __forceinline__ int find(int count, int index, End end) {
  int low = 0, high = count;
  while (low < high) {
    int middle = (low + high) / 2;
    if (end(middle) > index)
      high = middle;
    else
      low = middle + 1;
  }
  return low;
}

__device__ __forceinline__ int up(int total, int parts) { return (total + parts - 1) / parts; }

struct Rows {
  const int *slot, *start, *count;
  int *end;  // of their tokens
};

__device__ __forceinline__ void prepare_tokens(const Sizes &size, const Rows &rows, const int *given, const int *table,
                                               const int *last_token, int *token, int *position, int *place) {
  for (int at = threadIdx.x; at < size.tokens; at += THREADS) {
    int row = find(size.rows, at, [&](int r) { return rows.end[r]; });
    int id = given[at], where = 0, page_token = 0;  // padding goes to the null page
    if (row < size.rows) {
      int slot = rows.slot[row];
      if (id == TOKEN_ON_DEVICE) id = last_token[slot];
      where = rows.start[row] + at - (rows.end[row] - rows.count[row]);
      u64 entry = (u64)slot * size.table_width + min(where / size.page_size, size.table_width - 1);
      page_token = table[entry] * size.page_size + where % size.page_size;
    }
    token[at] = id, position[at] = where, place[at] = page_token;
  }
}

__device__ __forceinline__ int make_tiles(const Sizes &size, const Rows &rows, const Cut &cut, Pair *shared,
                                          int *tile_end, Tile *tiles) {
  int used = scan(
                 shared, size.rows,
                 [&](int row) {
                   int count = rows.count[row];
                   return Pair{count >= cut.fewest && count <= cut.most ? up(count, cut.queries) : 0, 0};
                 },
                 [&](int row, Pair, Pair sum) { tile_end[row] = sum.x; })
                 .x;
  __syncthreads();
  for (int at = threadIdx.x; at < used; at += THREADS) {
    int row = find(size.rows, at, [&](int r) { return tile_end[r]; });
    int nth = at - (row > 0 ? tile_end[row - 1] : 0), end = rows.end[row];
    Tile tile = {};
    tile.row = row;
    tile.token = end - rows.count[row] + nth * cut.queries;
    tile.queries = min(end - tile.token, cut.queries);
    tile.position = rows.start[row] + nth * cut.queries;
    if (cut.window > 0) tile.first = max(tile.position - cut.window + 1, 0) / cut.block_tokens * cut.block_tokens;
    tile.blocks = up(tile.position + tile.queries - tile.first, cut.block_tokens);
    tiles[at] = tile;
  }
  __syncthreads();
  return used;
}

__device__ __forceinline__ void make_pieces(const Sizes &size, const Rows &rows, const Cut &cut, Pair *shared,
                                            int *tile_end, Tile *tiles, Piece *pieces, int *arrived) {
  const int used = make_tiles(size, rows, cut, shared, tile_end, tiles);
  int longest = 0;
  for (int at = threadIdx.x; at < used; at += THREADS) longest = max(longest, tiles[at].blocks);
  longest = greatest(shared, longest);
  Pair blocks = scan(shared, used, [&](int at) { return Pair{tiles[at].blocks, 0}; }, [](int, Pair, Pair) {});
  const int length = max(max(up(blocks.x, cut.num_pieces), up(longest, MOST_PIECES)), 1);
  const int stride = cut.queries * cut.group, num_pieces = cut.num_tiles + cut.num_pieces;
  Pair total = scan(
      shared, used,
      [&](int at) {
        int count = up(tiles[at].blocks, length);
        return Pair{count, count > 1 ? count * stride : 0};
      },
      [&](int at, Pair mine, Pair sum) {
        tiles[at].end_piece = sum.x;
        tiles[at].slot = mine.y > 0 ? cut.first_slot + sum.y - mine.y : -1;
      });
  __syncthreads();
  const int left = num_pieces - total.x, written = rows.end[size.rows - 1];
  const int cleared = cut.clears_padding ? up(size.tokens - written, left) : 0;  // by each unused piece
  for (int at = threadIdx.x; at < num_pieces; at += THREADS) {
    Piece piece = {};
    if (at >= total.x) {
      piece.token = min(written + (at - total.x) * cleared, size.tokens);
      piece.queries = min(cleared, size.tokens - piece.token);
    } else {
      const Tile tile = tiles[find(used, at, [&](int i) { return tiles[i].end_piece; })];
      const int count = up(tile.blocks, length), nth = at - (tile.end_piece - count);
      piece.table_row = rows.slot[tile.row];
      piece.token = tile.token, piece.queries = tile.queries, piece.position = tile.position;
      piece.begin = tile.first + nth * length * cut.block_tokens;
      piece.end = min(piece.begin + length * cut.block_tokens, tile.position + tile.queries);
      piece.slot = tile.slot < 0 ? -1 : tile.slot + nth * stride;
      piece.turn = nth << 16 | count;
    }
    pieces[at] = piece;
  }
  for (int at = threadIdx.x; at < num_pieces * size.heads; at += THREADS) arrived[at] = 0;
  __syncthreads();
}

extern "C" __global__ void __launch_bounds__(THREADS)
    prepare_step(const int *words,       // input ids T, slots R, first positions R, numbers of tokens R
                 const int *table,       // [Z, M]
                 const int *last_token,  // [Z]
                 const Sizes *sizes, const Cut *cuts, int *token, int *position, int *place, int *last, int *scratch,
                 Piece *first_pieces, int *first_arrived, Piece *second_pieces, int *second_arrived) {
  SHARED_MEMORY(bytes, THREADS * sizeof(Pair));
  Pair *shared = (Pair *)bytes;
  const Sizes size = *sizes;
  const int *slots = words + size.tokens;
  const Rows rows = {slots, slots + size.rows, slots + 2 * size.rows, scratch};
  int *tile_end = scratch + size.rows;
  Tile *tiles = (Tile *)(scratch + up(2 * size.rows, 4) * 4);
  scan(
      shared, size.rows, [&](int row) { return Pair{rows.count[row], 0}; },
      [&](int row, Pair, Pair sum) {
        rows.end[row] = sum.x;
        last[row] = max(sum.x - 1, 0);
      });
  __syncthreads();
  prepare_tokens(size, rows, words, table, last_token, token, position, place);
  make_pieces(size, rows, cuts[0], shared, tile_end, tiles, first_pieces, first_arrived);
  if (cuts[1].num_tiles > 0)
    make_pieces(size, rows, cuts[1], shared, tile_end, tiles, second_pieces, second_arrived);
}
