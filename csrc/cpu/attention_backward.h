#pragma once

// What the operator attention_backward asks of its kernel.

#include <cstdint>

#include "../attention.h"

namespace gpt4fast::cpu {

// A piece of attention's backward pass: rows [first_row, last_row) against key tiles [first_tile, last_tile) of one
// sequence and key/value head. With gradient_of_keys the rows are all, and with gradient_of_queries the tiles.
struct AttentionBackwardTask {
  int64_t sequence, kv_head;
  int64_t first_row, last_row;    // of the queries * Hq / Hk that share the key/value head
  int64_t first_tile, last_tile;  // of kBackwardTileKeys keys
  bool gradient_of_queries, gradient_of_keys;
};

// One tile of the mask's gradient. Along an axis on which the mask is broadcast, the whole of it.
struct MaskGradientTask {
  int64_t batch, head;  // of the mask
  int64_t first_query, last_query;
  int64_t first_tile, last_tile;
};

inline constexpr int64_t kBackwardTileKeys = 64;
inline constexpr int64_t kBackwardBlockRows = 96;

// Tasks write to different places and each sums in an order of its own, whichever thread runs it.
struct AttentionBackwardKernel {
  int64_t (*workspace)(const AttentionBackwardParams&);  // bytes of scratch memory that one thread needs
  // next is a task that is likely to follow, or null.
  void (*run)(const AttentionBackwardParams&, const AttentionBackwardTask&, const AttentionBackwardTask* next,
              void* workspace);
};

struct MaskGradientKernel {
  int64_t (*workspace)(const AttentionBackwardParams&);
  void (*run)(const AttentionBackwardParams&, const MaskGradientTask&, void* workspace);
};

}  // namespace gpt4fast::cpu
