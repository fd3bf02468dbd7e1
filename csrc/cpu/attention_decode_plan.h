#pragma once

// How a call of attention_decode is cut into tasks, and the scratch memory of these.

#include <cstdint>

#include "attention_cache.h"
#include "attention_pack.h"
#include "scratch.h"

namespace gpt4fast::cpu::GPT4FAST_LEVEL {

inline constexpr int64_t kBlockRows = 32;  // query rows that go through the keys together
inline constexpr int64_t kTile = 512;      // keys whose scores are held at once

// The keys of a sequence that its queries see, and those that are appended, from a multiple of kAlignment on.
inline Range touched_keys(const AttentionDecodeParams& p, const Sequence& sequence) {
  const Row first(p, sequence, 0, 0), last(p, sequence, 0, p.query_length * (p.query_heads / p.kv_heads) - 1);
  Range keys = {first.begin, last.end};
  if (p.appends) {
    keys = {keys.empty() ? sequence.offset : least(keys.first, sequence.offset), sequence.offset + p.query_length};
  }
  return keys.empty() ? Range{0, 0} : Range{keys.first / kAlignment * kAlignment, keys.last};
}

// Tasks are numbered by sequence, key/value head and part of the keys. How many there are depends on the arguments, but
// not on the threads, so that the result doesn't either.
struct Plan {
  int64_t rows;      // query rows of a key/value head
  int64_t width;     // of a row of sums
  int64_t split;     // keys of a task
  int64_t keys = 0;  // of all sequences
  int64_t tasks = 0;

  explicit Plan(const AttentionDecodeParams& p) {
    rows = p.query_length * (p.query_heads / p.kv_heads);
    width = round_up(p.value_dim, 2 * kLanes);
    for (int64_t b = 0; b < p.batch; ++b) {
      const Range touched = touched_keys(p, Sequence(p, b));
      keys += touched.last - touched.first;
    }
    // At most some 64 tasks besides one for each head. With many rows a task has more keys, so that its sums are few
    // beside them.
    split = round_up(most(most<int64_t>(rows < 8 ? 512 : 256, 8 * rows), keys * p.kv_heads / 64), 128);
    for (int64_t b = 0; b < p.batch; ++b) {
      tasks += p.kv_heads * splits(touched_keys(p, Sequence(p, b)));
    }
  }

  int64_t splits(Range keys) const { return most<int64_t>(1, (keys.last - keys.first + split - 1) / split); }
  // Threads worth waking, each of which takes some microseconds.
  int64_t threads(const AttentionDecodeParams& p) const {
    const int64_t row_bytes = p.cache_dtype == ElementType::float32 ? 4 : p.cache_dtype == ElementType::int8 ? 1 : 2;
    const int64_t work = keys * p.kv_heads * (p.head_dim + p.value_dim) * most(row_bytes, rows);
    return most<int64_t>(1, least(tasks, work >> 18));
  }

  int64_t sums_size() const { return round_up(rows * (2 + width), 16); }
  int64_t sums_bytes() const { return tasks * sums_size() * static_cast<int64_t>(sizeof(float)); }
};

// What a task leaves for each of its rows.
struct Sums {
  float* maxima;  // (rows), of the scores
  float* totals;  // (rows), of the weights relative to the maximum
  float* out;     // (rows, width)

  Sums(const Plan& plan, void* memory, int64_t task) {
    out = static_cast<float*>(memory) + task * plan.sums_size();
    maxima = out + plan.rows * plan.width;
    totals = maxima + plan.rows;
  }

  Sums from(int64_t row, const Plan& plan) const {
    Sums rest = *this;
    rest.maxima += row;
    rest.totals += row;
    rest.out += row * plan.width;
    return rest;
  }
};

// Scratch memory of one thread. T is what products are made of.
template <typename T, typename cache_t>
struct Workspace : Scratch {
  int64_t depth;          // of a query, with zeros to whole vectors
  int64_t scores_row;     // kTile + one vector of zeros behind a row's weights
  T* queries;             // (kBlockRows, depth)
  float* scores;          // (kBlockRows, scores_row)
  T* weights;             // (kBlockRows, scores_row); float32 weights replace the scores
  float* row;             // one query or new token
  Row* rows;              // (kBlockRows)
  Range* visible;         // (kBlockRows), within the tile
  float* key_scales;      // (kTile)
  float* value_scales;    // (kTile)
  cache_t* key_copies;    // (kTile, D) where keys are not in place, else the last kLanes of a cache
  cache_t* value_copies;  // (kTile, Dv) where values are not in place

  Workspace(const AttentionDecodeParams& p, void* memory) : Scratch(memory) {
    depth = round_up(p.head_dim, kLanes * kDepth<T>);
    scores_row = kTile + kLanes;
    take(queries, kBlockRows * depth);
    take(scores, kBlockRows * scores_row);
    if constexpr (kDepth<T> == 1) {
      weights = scores;
    } else {
      take(weights, kBlockRows * scores_row);
    }
    take(row, most(p.head_dim, p.value_dim));
    take(rows, kBlockRows);
    take(visible, kBlockRows);
    take(key_scales, kTile);
    take(value_scales, kTile);
    take(key_copies, (is_in_place(p, p.key_strides) ? kLanes : kTile) * p.head_dim);
    take(value_copies, (is_in_place(p, p.value_strides) ? 0 : kTile) * p.value_dim);
  }
};

}  // namespace gpt4fast::cpu::GPT4FAST_LEVEL
