// Flash attention's backward pass (Dao, 2023) on the CPU. Weights are computed again from the saved logarithm of the
// sum of exponentials, a block of query rows and a tile of keys at a time, so that scratch memory does not grow with
// the square of the length. Five products: Q K^T and dO V^T for the weights P and the gradient of the scores dS, then
// dQ += dS K, dV += P^T dO and dK += dS^T Q. Every sum runs over ascending keys or rows, however the work is split into
// tasks. Compiled once per CPU level.
#include "attention_backward_scores.h"

namespace gpt4fast::cpu::GPT4FAST_LEVEL {
namespace {

static_assert(kKeyBlock == kBackwardTileKeys);
static_assert(kBackwardBlockRows / 2 % kTileRows == 0 && kTileRows % 2 == 0);

// target += weight * source, unless the weight is 0: 0 * NaN is NaN.
template <typename T>
void add_row(float weight, const T* source, int64_t stride, int64_t count, float* target) {
  for (int64_t d = 0; weight != 0.0f && d < count; d += kLanes) {
    store(target + d,
          multiply_add(broadcast(weight), read_vector(source + d * stride, stride, count - d), load(target + d)));
  }
}

template <typename scalar_t>
class Kernel : ScoreGradients<scalar_t> {
  using Base = ScoreGradients<scalar_t>;
  using Base::count, Base::keys, Base::kv_head, Base::last_key, Base::p, Base::row_width, Base::rows, Base::sequence,
      Base::value_row_width, Base::value_width, Base::width;
  using typename Base::T;

 public:
  Kernel(const AttentionBackwardParams& params, Scratch&& scratch) : Base(params, scratch) {
    const int64_t tiles = tiles_of(p);
    if constexpr (kDepth<T> == 1) {
      query_pairs = this->queries;
      grad_out_pairs = this->grad_outs;
    } else {
      scratch.take(query_pairs, kBlockRows<T> * width);
      scratch.take(grad_out_pairs, kBlockRows<T> * value_width);
    }
    scratch.take(grad_queries, kBlockRows<T> * width);
    scratch.take(weight_pairs, kBlockRows<T> * kKeyBlock);
    scratch.take(grad_score_pairs, kBlockRows<T> * kKeyBlock);
    if constexpr (kDepth<T> == 1) {
      grad_score_rows = grad_score_pairs;
    } else {
      scratch.take(grad_score_rows, kBlockRows<T> * kKeyBlock);
    }
    scratch.take(key_pairs, tiles * kKeyBlock * width);
    scratch.take(grad_keys, tiles * kKeyBlock * width);
    scratch.take(grad_values, tiles * kKeyBlock * value_width);
    bytes = scratch.bytes;
  }

  int64_t bytes;

  void run(const AttentionBackwardTask& task, const AttentionBackwardTask* next) {
    this->begin_head(Sequence(p, task.sequence), task.kv_head);
    if (next && (next->sequence != task.sequence || next->kv_head != task.kv_head)) {
      begin_prefetch(task, *next);
    }
    compute(task, false);
  }

 private:
  // An infinity or NaN may lie where a row does not see it, and 0 * NaN is NaN. Sums that are not finite, of a block of
  // rows or a tile of keys, are therefore computed again, carefully: weights of 0 are left out.
  void compute(const AttentionBackwardTask& task, bool careful) {
    if (task.gradient_of_keys) {
      const int64_t first = task.first_tile * kKeyBlock;
      const int64_t last = round_up(least(task.last_tile * kKeyBlock, sequence.keys), kLanes);
      clear(grad_keys + first * width, (last - first) * width);
      clear(grad_values + first * value_width, (last - first) * value_width);
    }
    for (int64_t row = task.first_row; row < task.last_row; row += kBlockRows<T>) {
      this->begin_rows(row, 1, least(kBlockRows<T>, task.last_row - row));
      if (task.gradient_of_keys) {
        pair_rows(this->queries, row_width, width, query_pairs);
        pair_rows(this->grad_outs, value_row_width, value_width, grad_out_pairs);
      }
      add_tiles(task, careful);
      if (task.gradient_of_queries && !write_queries()) {
        AttentionBackwardTask again = task;
        again.gradient_of_keys = false;
        add_tiles(again, true);
        write_queries();
      }
    }
    for (int64_t tile = task.first_tile; task.gradient_of_keys && tile < task.last_tile; ++tile) {
      if (!write_keys(tile) && !careful) {
        AttentionBackwardTask again = task;
        again.first_tile = tile;
        again.last_tile = tile + 1;
        again.gradient_of_queries = false;
        compute(again, true);
      }
    }
  }

  void add_tiles(const AttentionBackwardTask& task, bool careful) {
    const bool is_general = has_adjustments(p) || p.dropout_p != 0.0f;
    const Range seen = visible_tiles(rows, count);
    clear(grad_queries, count * width);
    for (int64_t tile = most(seen.first, task.first_tile); tile < least(seen.last, task.last_tile); ++tile) {
      pack(tile);
      if (is_general) {
        add_tile<true>(task, tile, careful);
      } else {
        add_tile<false>(task, tile, careful);
      }
    }
  }

  // While this task runs, the head of the next.
  void begin_prefetch(const AttentionBackwardTask& task, const AttentionBackwardTask& next) {
    int64_t steps = 1;
    for (int64_t row = task.first_row; row < task.last_row; row += kBlockRows<T>) {
      const int64_t here = least(kBlockRows<T>, task.last_row - row);
      const Row ends[2] = {{p, sequence, kv_head, row}, {p, sequence, kv_head, row + here - 1}};
      const Range tiles = visible_tiles(ends, 2);
      steps += (tiles.last - tiles.first) * here;
    }
    const Sequence to(p, next.sequence);
    const int64_t group = p.query_heads / p.kv_heads, head = next.kv_head * group;
    this->prefetch.template add<scalar_t>(p.key, p.key_strides, to, next.kv_head, 1, to.first_key, to.keys, p.head_dim);
    this->prefetch.template add<scalar_t>(p.value, p.value_strides, to, next.kv_head, 1, to.first_key, to.keys,
                                          p.value_dim);
    this->prefetch.template add<scalar_t>(p.query, p.query_strides, to, head, group, to.first_query, to.queries,
                                          p.head_dim);
    this->prefetch.template add<scalar_t>(p.out, p.out_strides, to, head, group, to.first_query, to.queries,
                                          p.value_dim);
    this->prefetch.template add<scalar_t>(p.grad_out, p.grad_out_strides, to, head, group, to.first_query, to.queries,
                                          p.value_dim);
    this->prefetch.begin(steps);
  }

  void pair_rows(const T* from, int64_t stride, int64_t columns, T* target) {
    if constexpr (kDepth<T> == 2) {
      for (int64_t row = 0; row < count; row += 2) {
        for (int64_t d = 0; d < columns; d += kLanes) {
          store_interleaved(target + paired<T>(row, d, columns), from + row * stride + d,
                            from + (row + 1) * stride + d);
        }
      }
    }
  }

  void pack(int64_t tile) {
    if (this->pack_tile(tile)) {
      const int64_t key = tile * kKeyBlock, given = most<int64_t>(least(kKeyBlock, last_key - key), 0);
      pack_right(this->rows_from(keys, key), given, round_up(given, kLanes), key_pairs + key * width);
    }
  }

  template <bool kGeneral>
  void add_tile(const AttentionBackwardTask& task, int64_t tile, bool careful) {
    Range all = {kKeyBlock, 0};
    for (int64_t row = 0, number; row < count; row += number) {
      number = this->rows_together(tile, row);
      const Range columns = this->template score_rows<kGeneral, false>(
          tile, row, number, [this](int64_t row, int64_t k, const Vector* weights, const Vector* grads) {
            keep_scores(row, k, weights, grads);
          });
      clear_scores(row, number, {0, columns.first});
      clear_scores(row, number, {columns.last, kKeyBlock});
      if (!columns.empty()) {
        all = {least(all.first, columns.first), most(all.last, columns.last)};
        if (task.gradient_of_queries) {
          add_queries(tile, row, number, columns, careful);
        }
      }
    }
    if (task.gradient_of_keys && !all.empty()) {
      add_keys(tile, all, careful);
    }
  }

  // One vector of each row of a pair, as products want them.
  [[gnu::always_inline]] void keep_scores(int64_t row, int64_t k, const Vector* weights, const Vector* grads) {
    T* weight_pair = weight_pairs + paired<T>(row, k, kKeyBlock);
    T* grad_pair = grad_score_pairs + paired<T>(row, k, kKeyBlock);
    if constexpr (kDepth<T> == 1) {
      store(weight_pair, weights[0]);
      store(grad_pair, grads[0]);
    } else {
      T* grad_row = grad_score_rows + row * kKeyBlock + k;
      store_interleaved(weight_pair, weights[0], weights[1]);
      store_interleaved(grad_pair, grad_row, grad_row + kKeyBlock, grads[0], grads[1]);
    }
  }

  void clear_scores(int64_t row, int64_t number, Range columns) {
    const Vector zeros[kDepth<T>] = {};
    for (int64_t i = 0; i < number; i += kDepth<T>) {
      for (int64_t k = columns.first; k < columns.last; k += kLanes) {
        keep_scores(row + i, k, zeros, zeros);
      }
    }
  }

  void add_queries(int64_t tile, int64_t row, int64_t number, Range columns, bool careful) {
    float* sums = grad_queries + row * width;
    const T* grads = grad_score_rows + row * kKeyBlock;
    if (!careful) {
      multiply<true>(number, LeftOperand<T>{grads + columns.first, kKeyBlock, kDepth<T>},
                     RightOperand<T>{key_pairs + (tile * kKeyBlock + columns.first) * width, width * kDepth<T>},
                     (columns.last - columns.first) / kDepth<T>, width / kLanes, sums, width);
      return;
    }
    for (int64_t i = 0; i < number; ++i) {
      for (int64_t k = columns.first; k < columns.last; ++k) {
        const scalar_t* key = keys.data + (tile * kKeyBlock + k) * keys.row_stride;
        add_row(to_float(grads + i * kKeyBlock + k), key, keys.stride, keys.columns, sums + i * width);
      }
    }
  }

  void add_keys(int64_t tile, Range columns, bool careful) {
    const int64_t key = tile * kKeyBlock;
    const int64_t together = this->seen_by_all(tile, 0, count) ? kKeyBlock : kTileRows;
    int64_t first = 0, last = 0;
    for (int64_t k = columns.first; k < columns.last; k += together) {
      const int64_t number = least(together, columns.last - k);
      // The rows that see any of these keys lie between two that never go back.
      while (first < count && rows[first].end <= key + k) {
        ++first;
      }
      while (last < count && rows[last].begin < key + k + number) {
        ++last;
      }
      const Range seeing = {first / kDepth<T> * kDepth<T>, round_up(last, kDepth<T>)};
      float* values = grad_values + (key + k) * value_width;
      float* keys = grad_keys + (key + k) * width;
      if (seeing.empty()) {
        continue;
      }
      if (careful) {
        add_rows(weight_pairs, k, number, this->grad_outs, value_row_width, value_width, seeing, values);
        add_rows(grad_score_pairs, k, number, this->queries, row_width, width, seeing, keys);
      } else {
        add_product(weight_pairs, k, number, grad_out_pairs, value_width, seeing, values);
        add_product(grad_score_pairs, k, number, query_pairs, width, seeing, keys);
      }
    }
  }

  // sums (number, columns) += left[seeing, k to k + number]^T @ right[seeing].
  void add_product(const T* left, int64_t k, int64_t number, const T* right, int64_t columns, Range seeing,
                   float* sums) {
    multiply<true>(number,
                   LeftOperand<T>{left + paired<T>(seeing.first, k, kKeyBlock), kDepth<T>, kKeyBlock * kDepth<T>},
                   RightOperand<T>{right + seeing.first * columns, columns * kDepth<T>},
                   (seeing.last - seeing.first) / kDepth<T>, columns / kLanes, sums, columns);
  }

  // The same, carefully.
  void add_rows(const T* left, int64_t k, int64_t number, const T* right, int64_t stride, int64_t columns, Range seeing,
                float* sums) {
    for (int64_t i = 0; i < number; ++i) {
      for (int64_t row = seeing.first; row < seeing.last; ++row) {
        add_row(to_float(left + paired<T>(row, k + i, kKeyBlock)), right + row * stride, 1, columns,
                sums + i * columns);
      }
    }
  }

  bool write_queries() {
    bool finite = true;
    for (int64_t i = 0; i < count; ++i) {
      finite &= write_row(grad_queries + i * width, p.scale, p.head_dim,
                          static_cast<scalar_t*>(p.grad_query) + this->offset(rows[i], p.grad_query_strides),
                          p.grad_query_strides[3]);
    }
    return finite;
  }

  bool write_keys(int64_t tile) {
    const auto address = [&](void* tensor, const int64_t (&strides)[4], int64_t key) {
      return static_cast<scalar_t*>(tensor) + sequence.storage * strides[0] + kv_head * strides[1] +
             (sequence.first_key + key) * strides[2];
    };
    bool finite = true;
    for (int64_t key = tile * kKeyBlock; key < least((tile + 1) * kKeyBlock, sequence.keys); ++key) {
      finite &= write_row(grad_keys + key * width, p.scale, p.head_dim, address(p.grad_key, p.grad_key_strides, key),
                          p.grad_key_strides[3]);
      finite &= write_row(grad_values + key * value_width, 1.0f, p.value_dim,
                          address(p.grad_value, p.grad_value_strides, key), p.grad_value_strides[3]);
    }
    return finite;
  }

  T* query_pairs;       // (kBlockRows / kDepth, width, kDepth)
  T* grad_out_pairs;    // (kBlockRows / kDepth, value_width, kDepth)
  float* grad_queries;  // (kBlockRows, width)
  T* weight_pairs;      // (kBlockRows / kDepth, kKeyBlock, kDepth)
  T* grad_score_pairs;  // (kBlockRows / kDepth, kKeyBlock, kDepth)
  T* grad_score_rows;   // (kBlockRows, kKeyBlock)
  T* key_pairs;         // (tiles, kKeyBlock / kDepth, width, kDepth)
  float* grad_keys;     // (tiles, kKeyBlock, width)
  float* grad_values;   // (tiles, kKeyBlock, value_width)
};

int64_t workspace_bytes(const AttentionBackwardParams& p) {
  return with_element_type(p.dtype, [&](auto type) { return Kernel<decltype(type)>(p, Scratch(nullptr)).bytes; });
}

void run(const AttentionBackwardParams& p, const AttentionBackwardTask& task, const AttentionBackwardTask* next,
         void* workspace) {
  with_element_type(p.dtype, [&](auto type) { Kernel<decltype(type)>(p, Scratch(workspace)).run(task, next); });
}

}  // namespace

extern const AttentionBackwardKernel attention_backward_kernel = {workspace_bytes, run};

}  // namespace gpt4fast::cpu::GPT4FAST_LEVEL
