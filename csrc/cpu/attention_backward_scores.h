#pragma once

// The part that all gradients of attention share: for a block of query rows and a tile of keys, the weights P and the
// gradient of the scores, dS = P * (dO V^T - delta), from the saved logarithm of the sum of exponentials.

#include "attention_backward.h"

#include "attention_pack.h"
#include "attention_rows.h"
#include "attention_scores.h"
#include "attention_tasks.h"
#include "tile_product.h"
#include "scratch.h"
#include "with_element_type.h"

namespace gpt4fast::cpu::GPT4FAST_LEVEL {

// Rows that the gradients of keys and values are summed over at a time. In float32 the sum of half of them has a
// rounding error like that of torch; in bfloat16 the error is of other things.
template <typename T>
inline constexpr int64_t kBlockRows = kDepth<T> == 1 ? kBackwardBlockRows / 2 : kBackwardBlockRows;

inline constexpr int64_t kGroupRows = 24;  // whose scores and their gradients, 2 x 6 KiB, stay in L1

inline int64_t tiles_of(const AttentionParams& p) {
  int64_t keys = 0;
  for (int64_t b = 0; b < p.batch; ++b) {
    keys = most(keys, Sequence(p, b).keys);
  }
  return (keys + kKeyBlock - 1) / kKeyBlock;
}

inline void clear(float* numbers, int64_t count) {
  std::memset(numbers, 0, static_cast<size_t>(count) * sizeof(float));
}

// Turns float32 sums into numbers of a tensor. Returns whether all are finite.
template <typename scalar_t>
inline bool write_row(const float* sums, float factor, int64_t count, scalar_t* target, int64_t stride) {
  Vector zeros = {};  // NaN where a sum is infinite or NaN
  for (int64_t d = 0; d < count; d += kLanes) {
    const Vector value = load(sums + d) * factor;
    zeros = multiply_add(value, Vector{}, zeros);
    const int64_t rest = least(count - d, kLanes);
    if (stride == 1 && rest == kLanes) {
      store(target + d, value);
    } else if (stride == 1) {
      store(target + d, value, rest);
    } else {
      scalar_t numbers[kLanes];
      store(numbers, value);
      for (int64_t i = 0; i < rest; ++i) {
        target[(d + i) * stride] = numbers[i];
      }
    }
  }
  return sum(zeros) == 0.0f;
}

// Where row `row` and column `column` of a matrix lie whose pairs run along the rows: (rows / kDepth, columns, kDepth).
template <typename T>
inline int64_t paired(int64_t row, int64_t column, int64_t columns) {
  return row / kDepth<T> * kDepth<T> * columns + column * kDepth<T> + row % kDepth<T>;
}

template <typename scalar_t>
class ScoreGradients {
 protected:
  using T = Compute<scalar_t>;

  ScoreGradients(const AttentionBackwardParams& params, Scratch& scratch)
      : p(params),
        depth(padded_depth<T>(params.head_dim)),
        value_depth(padded_depth<T>(params.value_dim)),
        width(padded_columns(params.head_dim)),
        value_width(padded_columns(params.value_dim)),
        row_width(round_up(params.head_dim, kLanes * kDepth<T>)),
        value_row_width(round_up(params.value_dim, kLanes * kDepth<T>)),
        dropout(params) {
    const int64_t tiles = tiles_of(p);
    scratch.take(rows, kBlockRows<T>);
    scratch.take(levels, kBlockRows<T>);
    scratch.take(deltas, kBlockRows<T>);
    scratch.take(queries, kBlockRows<T> * row_width);
    scratch.take(grad_outs, kBlockRows<T> * value_row_width);
    scratch.take(out, value_row_width);
    float** const of_groups[] = {&products, &grad_products, &bias, &cap_slopes, &kept};
    for (float** floats : of_groups) {
      scratch.take(*floats, kGroupRows * kKeyBlock);
    }
    scratch.take(keys_transposed, tiles * depth * kKeyBlock);
    scratch.take(values_transposed, tiles * value_depth * kKeyBlock);
    scratch.take(is_packed, tiles);
  }

  void begin_head(const Sequence& of_sequence, int64_t of_head) {
    sequence = of_sequence;
    kv_head = of_head;
    std::memset(is_packed, 0, static_cast<size_t>((sequence.keys + kKeyBlock - 1) / kKeyBlock));
    keys = {static_cast<const scalar_t*>(p.key) + sequence.storage * p.key_strides[0] + kv_head * p.key_strides[1] +
                sequence.first_key * p.key_strides[2],
            p.key_strides[2], p.key_strides[3], p.head_dim};
    values = {static_cast<const scalar_t*>(p.value) + sequence.storage * p.value_strides[0] +
                  kv_head * p.value_strides[1] + sequence.first_key * p.value_strides[2],
              p.value_strides[2], p.value_strides[3], p.value_dim};
    last_key = 0;  // that any row sees
    if (sequence.queries > 0) {
      last_key = Row(p, sequence, kv_head, sequence.queries * (p.query_heads / p.kv_heads) - 1).end;
    }
  }

  // Rows first, first + step, ... of the queries * Hq / Hk rows that share the key/value head. A pair is filled up with
  // a row that sees nothing. Such a row has no gradients, whatever is in it: all of it is 0 here.
  void begin_rows(int64_t first, int64_t step, int64_t given) {
    count = given;
    has_blind_rows = false;
    for (int64_t i = 0; i < round_up(given, kDepth<T>); ++i) {
      T* query = queries + i * row_width;
      T* grad_out = grad_outs + i * value_row_width;
      Row& row = rows[i];
      row = i < given ? Row(p, sequence, kv_head, first + i * step) : rows[i - 1];
      const int64_t at = sequence.first_query + row.query;
      const float lse = p.lse[(sequence.storage * p.query_heads + row.head) * p.query_length + at];
      if (i == given || row.begin >= row.end || lse == -kInfinity) {
        row.begin = row.end = i == 0 ? 0 : rows[i - 1].begin;  // from row to row begin never decreases
        has_blind_rows = true;
        levels[i] = -kInfinity;
        deltas[i] = 0.0f;
        std::memset(query, 0, static_cast<size_t>(row_width) * sizeof(T));
        std::memset(grad_out, 0, static_cast<size_t>(value_row_width) * sizeof(T));
        continue;
      }
      levels[i] = -lse;
      pack_row(static_cast<const scalar_t*>(p.query) + offset(row, p.query_strides), p.query_strides[3], p.head_dim,
               row_width, query);
      pack_row(static_cast<const scalar_t*>(p.grad_out) + offset(row, p.grad_out_strides), p.grad_out_strides[3],
               p.value_dim, value_row_width, grad_out);
      pack_row(static_cast<const scalar_t*>(p.out) + offset(row, p.out_strides), p.out_strides[3], p.value_dim,
               value_row_width, out);
      Vector delta = {};
      for (int64_t d = 0; d < value_row_width; d += kLanes * kDepth<T>) {
        delta = Product<T>::add(Product<T>::load(grad_out + d), Product<T>::load(out + d), delta);
      }
      deltas[i] = sum(delta);
      if (p.grad_lse) {
        deltas[i] -= p.grad_lse[sequence.storage * p.grad_lse_strides[0] + row.head * p.grad_lse_strides[1] +
                                at * p.grad_lse_strides[2]];
      }
    }
  }

  int64_t offset(const Row& row, const int64_t (&strides)[4]) const {
    return sequence.storage * strides[0] + row.head * strides[1] + (sequence.first_query + row.query) * strides[2];
  }

  // Once per head: all blocks of rows share it. Returns whether that was now.
  bool pack_tile(int64_t tile) {
    if (is_packed[tile]) {
      return false;
    }
    is_packed[tile] = true;
    const int64_t key = tile * kKeyBlock, count = most<int64_t>(least(kKeyBlock, last_key - key), 0);
    pack_transposed(rows_from(keys, key), count, keys_transposed + tile * depth * kKeyBlock);
    pack_transposed(rows_from(values, key), count, values_transposed + tile * value_depth * kKeyBlock);
    return true;
  }

  static Rows<scalar_t> rows_from(Rows<scalar_t> all, int64_t first) {
    all.data += first * all.row_stride;
    return all;
  }

  // Where no row is blind, begin and end never decrease from row to row.
  Range seen_by_any(int64_t tile, int64_t first, int64_t number) const {
    if (has_blind_rows) {
      return visible_columns(rows + first, number, tile * kKeyBlock);
    }
    Row bounds = rows[first];
    bounds.end = rows[first + number - 1].end;
    return visible_columns(bounds, tile * kKeyBlock);
  }

  // Whether each of the rows sees the whole tile.
  bool seen_by_all(int64_t tile, int64_t first, int64_t number) const {
    const int64_t key = tile * kKeyBlock;
    if (has_blind_rows) {
      return all_see_all(rows + first, number, key);
    }
    return rows[first + number - 1].begin <= key && key + kKeyBlock <= rows[first].end;
  }

  // How many rows from `first` on to take together: a group where all see the whole tile, else a few, which see about
  // the same.
  int64_t rows_together(int64_t tile, int64_t first) const {
    const int64_t left = round_up(count, kDepth<T>) - first, group = least(kGroupRows, left);
    return seen_by_all(tile, first, group) ? group : least<int64_t>(kTileRows, left);
  }

  // Computes weights, with dropout, and gradients of scores of `number` rows from `first` on, whole pairs, and calls
  // emit(row, column, weights, grads) with a vector of each of a pair's rows. kCapped: gradients of the scores after
  // the soft cap, where a mask is added, else of the products query . key but for the scale. Returns the columns
  // computed, in whole vectors; what is hidden among them is 0.
  template <bool kGeneral, bool kCapped, typename Emit>
  Range score_rows(int64_t tile, int64_t first, int64_t number, Emit emit) {
    const int64_t key = tile * kKeyBlock;
    const Range seen = seen_by_any(tile, first, number);
    if (seen.empty()) {
      return {0, 0};
    }
    const Range columns = {seen.first / kLanes * kLanes, round_up(seen.last, kLanes)};
    if constexpr (kGeneral) {
      bool any_visible = !p.mask;
      for (int64_t i = 0; p.mask && i < number; ++i) {
        any_visible |= read_mask(p, sequence, rows[first + i], key, columns, bias + i * kKeyBlock);
      }
      if (!any_visible) {
        return {0, 0};
      }
    }
    const int64_t vectors = (columns.last - columns.first) / kLanes;
    multiply<false>(
        number, LeftOperand<T>{queries + first * row_width, row_width, kDepth<T>},
        RightOperand<T>{keys_transposed + tile * depth * kKeyBlock + columns.first * kDepth<T>, kKeyBlock * kDepth<T>},
        depth / kDepth<T>, vectors, products + columns.first, kKeyBlock);
    multiply<false>(number, LeftOperand<T>{grad_outs + first * value_row_width, value_row_width, kDepth<T>},
                    RightOperand<T>{values_transposed + tile * value_depth * kKeyBlock + columns.first * kDepth<T>,
                                    kKeyBlock * kDepth<T>},
                    value_depth / kDepth<T>, vectors, grad_products + columns.first, kKeyBlock);
    const bool whole = seen_by_all(tile, first, number);
    for (int64_t i = 0; i < number; i += kDepth<T>) {
      prefetch.step(kDepth<T>);
      if (whole) {
        soften<kGeneral, kCapped, true>(key, {0, kKeyBlock}, first, i, emit);
      } else {
        soften<kGeneral, kCapped, false>(key, columns, first, i, emit);
      }
    }
    return columns;
  }

  const AttentionBackwardParams& p;
  const int64_t depth, value_depth;          // of products over D and Dv
  const int64_t width, value_width;          // of products whose results have these columns
  const int64_t row_width, value_row_width;  // of rows that are read in whole vectors
  Dropout dropout;
  Prefetch prefetch;

  Sequence sequence{};
  int64_t kv_head = 0, last_key = 0;
  Rows<scalar_t> keys, values;
  T* keys_transposed;    // (tiles, padded_depth(D) / kDepth, kKeyBlock, kDepth)
  T* values_transposed;  // (tiles, padded_depth(Dv) / kDepth, kKeyBlock, kDepth)
  bool* is_packed;       // (tiles)

  int64_t count = 0;
  bool has_blind_rows = false;
  Row* rows;      // (kBlockRows)
  float* levels;  // (kBlockRows), what is added to the scores before exp: the weights sum to 1
  float* deltas;  // (kBlockRows), what is subtracted from the weights' gradients
  T* queries;     // (kBlockRows, row_width)
  T* grad_outs;   // (kBlockRows, value_row_width)
  T* out;         // (value_row_width), of the row at hand

 private:
  // Turns products query . key into weights, and products grad_out . value into the scores' gradients.
  template <bool kGeneral, bool kCapped, bool kAllVisible, typename Emit>
  [[gnu::always_inline]] void soften(int64_t key, Range columns, int64_t first, int64_t i, Emit emit) {
    constexpr int kDegree = kDepth<T> == 1 ? 5 : 4;
    Vector level[kDepth<T>], delta[kDepth<T>];
    Range visible[kDepth<T>];
    for (int64_t j = 0; j < kDepth<T>; ++j) {
      const Row& row = rows[first + i + j];
      level[j] = broadcast(levels[first + i + j]);
      delta[j] = broadcast(deltas[first + i + j]);
      visible[j] = visible_columns(row, key);
      if constexpr (kGeneral) {
        const int64_t at = (i + j) * kKeyBlock;
        adjust_scores(p, row, key, columns, p.mask ? bias + at : nullptr, products + at, cap_slopes + at);
        if (p.dropout_p != 0.0f) {
          for (int64_t k = 0; k < kKeyBlock; k += kLanes) {
            store(kept + at + k, broadcast(dropout.scale));
          }
          dropout.drop(sequence, row, key, kept + at);
        }
      }
    }
    for (int64_t k = columns.first; k < columns.last; k += kLanes) {
      Vector weights[kDepth<T>], grads[kDepth<T>];
#pragma GCC unroll 2
      for (int64_t j = 0; j < kDepth<T>; ++j) {
        const int64_t at = (i + j) * kKeyBlock + k;
        const Vector score = load(products + at);
        const Vector exponent = kGeneral ? score + level[j] : multiply_add(score, broadcast(p.scale), level[j]);
        Vector weight = exp2<kDegree>(exponent * broadcast(static_cast<float>(kLog2E)));
        Vector grad = load(grad_products + at);
        if constexpr (kGeneral) {
          const Vector keep = p.dropout_p != 0.0f ? load(kept + at) : broadcast(1.0f);
          grad = weight * multiply_add(grad, keep, Vector{} - delta[j]);
          if (!kCapped && p.softcap != 0.0f) {
            grad = grad * load(cap_slopes + at);
          }
          grad = select(equal(score, broadcast(-kInfinity)), Vector{}, grad);
          weight = weight * keep;
        } else {
          grad = weight * (grad - delta[j]);
        }
        if (!kAllVisible && (k < visible[j].first || k + kLanes > visible[j].last)) {
          const Mask inside = lanes_between(visible[j].first - k, visible[j].last - k);
          weight = select(inside, weight, Vector{});
          grad = select(inside, grad, Vector{});
        }
        weights[j] = weight;
        grads[j] = grad;
      }
      emit(first + i, k, weights, grads);
    }
  }

  // Of a group of rows, (kGroupRows, kKeyBlock):
  float* products;       // query . key, then scores
  float* grad_products;  // grad_out . value
  float* bias;
  float* cap_slopes;  // the derivative of the soft cap
  float* kept;        // what dropout multiplies weights with
};

}  // namespace gpt4fast::cpu::GPT4FAST_LEVEL
