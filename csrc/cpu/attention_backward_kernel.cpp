// Flash attention's backward pass (Dao, 2023) on the CPU. Weights are computed again from the saved logarithm of the
// sum of exponentials, a block of query rows and a tile of keys at a time, so that scratch memory does not grow with
// the square of the length. Five products: Q K^T and dO V^T for the weights P and the gradient of the scores dS, then
// dQ += dS K, dV += P^T dO and dK += dS^T Q. Every sum runs over ascending keys or rows, however the work is split into
// tasks. Compiled once per CPU level.
#include "attention_backward_scores.h"

namespace gpt4fast::cpu::GPT4FAST_LEVEL {
namespace {

static_assert(kKeyBlock == kBackwardTileKeys);
static_assert(kBlockRows % kTileRows == 0 && kTileRows % 2 == 0);

// Turns float32 sums into numbers of a tensor.
template <typename scalar_t>
void write_row(const float* sums, float factor, int64_t count, scalar_t* target, int64_t stride) {
  for (int64_t d = 0; d < count; d += kLanes) {
    const Vector value = load(sums + d) * factor;
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
}

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
  using Base::count, Base::depth, Base::keys, Base::kv_head, Base::last_key, Base::p, Base::rows, Base::sequence,
      Base::value_width, Base::width;
  using typename Base::T;

 public:
  Kernel(const AttentionBackwardParams& params, Scratch&& scratch) : Base(params, scratch) {
    const int64_t tiles = tiles_of(p);
    if constexpr (kDepth<T> == 1) {
      query_pairs = this->queries;
      grad_out_pairs = this->grad_outs;
    } else {
      scratch.take(query_pairs, kBlockRows * width);
      scratch.take(grad_out_pairs, kBlockRows * value_width);
    }
    scratch.take(grad_queries, kBlockRows * width);
    scratch.take(weight_pairs, kBlockRows * kKeyBlock);
    scratch.take(grad_score_pairs, kBlockRows * kKeyBlock);
    if constexpr (kDepth<T> == 1) {
      grad_score_rows = grad_score_pairs;
    } else {
      scratch.take(grad_score_rows, kBlockRows * kKeyBlock);
    }
    scratch.take(key_pairs, tiles * kKeyBlock * width);
    scratch.take(keys_finite, tiles);
    scratch.take(grad_keys, tiles * kKeyBlock * width);
    scratch.take(grad_values, tiles * kKeyBlock * value_width);
    scratch.take(mask_sums, kBlockRows * kKeyBlock);
    scratch.take(mask_errors, kBlockRows * kKeyBlock);
    bytes = scratch.bytes;
  }

  int64_t bytes;

  void run(const AttentionBackwardTask& task) {
    this->begin_head(Sequence(p, task.sequence), task.kv_head);
    const size_t tile_keys = static_cast<size_t>((task.last_tile - task.first_tile) * kKeyBlock);
    if (task.gradient_of_keys && tile_keys > 0) {
      std::memset(grad_keys + task.first_tile * kKeyBlock * width, 0, tile_keys * width * sizeof(float));
      std::memset(grad_values + task.first_tile * kKeyBlock * value_width, 0, tile_keys * value_width * sizeof(float));
    }
    const bool is_general = has_adjustments(p) || p.dropout_p != 0.0f;
    for (int64_t row = task.first_row; row < task.last_row; row += kBlockRows) {
      this->begin_rows(row, 1, least(kBlockRows, task.last_row - row));
      if (task.gradient_of_keys) {
        pair_rows(this->queries, width, query_pairs);
        pair_rows(this->grad_outs, value_width, grad_out_pairs);
      }
      std::memset(grad_queries, 0, static_cast<size_t>(count * width) * sizeof(float));
      const Range seen = visible_tiles(rows, count);
      for (int64_t tile = most(seen.first, task.first_tile); tile < least(seen.last, task.last_tile); ++tile) {
        pack(tile);
        if (is_general) {
          add_tile<true>(task, tile);
        } else {
          add_tile<false>(task, tile);
        }
      }
      if (task.gradient_of_queries) {
        write_queries();
      }
    }
    if (task.gradient_of_keys) {
      write_keys(task);
    }
  }

  // Sums over many heads and rows carry their rounding error along (Kahan, 1965): torch adds up in a tree.
  void run_mask(const MaskGradientTask& task) {
    const int64_t (&strides)[4] = p.grad_mask_strides;
    const int64_t group = p.query_heads / most<int64_t>(p.kv_heads, 1);
    const bool has_batch = strides[0] != 0, has_head = strides[1] != 0, has_row = strides[2] != 0,
               has_key = strides[3] != 0;
    std::memset(mask_sums, 0, sizeof(float) * kBlockRows * kKeyBlock);
    std::memset(mask_errors, 0, sizeof(float) * kBlockRows * kKeyBlock);
    for (int64_t b = has_batch ? task.batch : 0; b < (has_batch ? task.batch + 1 : p.batch); ++b) {
      for (int64_t head = has_head ? task.head : 0; head < (has_head ? task.head + 1 : p.query_heads); ++head) {
        this->begin_head(Sequence(p, b), head / group);
        for (int64_t query = task.first_query; query < task.last_query; query += kBlockRows) {
          this->begin_rows(query * group + head % group, group, least(kBlockRows, task.last_query - query));
          const Range seen = visible_tiles(rows, count);
          for (int64_t tile = most(seen.first, task.first_tile); tile < least(seen.last, task.last_tile); ++tile) {
            this->pack_tile(tile);
            add_mask(tile, has_row, has_key);
          }
        }
      }
    }
    write_mask(task, has_row, has_key);
  }

 private:
  void pair_rows(const T* from, int64_t columns, T* target) {
    if constexpr (kDepth<T> == 2) {
      for (int64_t row = 0; row < count; row += 2) {
        for (int64_t d = 0; d < columns; d += kLanes) {
          store_interleaved(target + paired<T>(row, d, columns), from + row * columns + d,
                            from + (row + 1) * columns + d);
        }
      }
    }
  }

  void pack(int64_t tile) {
    if (this->pack_tile(tile)) {
      const int64_t key = tile * kKeyBlock, given = most<int64_t>(least(kKeyBlock, last_key - key), 0);
      keys_finite[tile] =
          pack_right(this->rows_from(keys, key), given, kKeyBlock, key_pairs + tile * kKeyBlock * width);
    }
  }

  template <bool kGeneral>
  void add_tile(const AttentionBackwardTask& task, int64_t tile) {
    Range all = {kKeyBlock, 0};
    const int64_t padded = round_up(count, kDepth<T>);
    for (int64_t row = 0; row < padded; row += kTileRows) {
      const int64_t number = least<int64_t>(kTileRows, padded - row);
      const Range columns = this->template score_rows<kGeneral, false>(
          tile, row, number, [this](int64_t row, int64_t k, const Vector* weights, const Vector* grads) {
            keep_scores(row, k, weights, grads);
          });
      clear_scores(row, number, {0, columns.first});
      clear_scores(row, number, {columns.last, kKeyBlock});
      if (!columns.empty()) {
        all = {least(all.first, columns.first), most(all.last, columns.last)};
        if (task.gradient_of_queries) {
          add_queries(tile, row, number, columns);
        }
      }
    }
    if (task.gradient_of_keys && !all.empty()) {
      add_keys(tile, all);
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

  void add_queries(int64_t tile, int64_t row, int64_t number, Range columns) {
    float* sums = grad_queries + row * width;
    const T* grads = grad_score_rows + row * kKeyBlock;
    if (keys_finite[tile]) {
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

  void add_keys(int64_t tile, Range columns) {
    const int64_t key = tile * kKeyBlock;
    int64_t first = 0, last = 0;
    for (int64_t k = columns.first; k < columns.last; k += kTileRows) {
      const int64_t number = least<int64_t>(kTileRows, columns.last - k);
      // The rows that see any of these keys lie between two that never go back.
      while (first < count && rows[first].end <= key + k) {
        ++first;
      }
      while (last < count && rows[last].begin < key + k + number) {
        ++last;
      }
      const Range seeing = {first / kDepth<T> * kDepth<T>, round_up(last, kDepth<T>)};
      add_transposed(weight_pairs, this->grad_outs, grad_out_pairs, this->grad_outs_finite, value_width, seeing, k,
                     number, grad_values + (key + k) * value_width);
      add_transposed(grad_score_pairs, this->queries, query_pairs, this->queries_finite, width, seeing, k, number,
                     grad_keys + (key + k) * width);
    }
  }

  // sums (number, columns) += left[seeing, k to k + number]^T @ right[seeing].
  void add_transposed(const T* left, const T* right_rows, const T* right_pairs, bool finite, int64_t columns,
                      Range seeing, int64_t k, int64_t number, float* sums) {
    if (seeing.empty()) {
      return;
    }
    if (finite) {
      multiply<true>(number,
                     LeftOperand<T>{left + paired<T>(seeing.first, k, kKeyBlock), kDepth<T>, kKeyBlock * kDepth<T>},
                     RightOperand<T>{right_pairs + seeing.first * columns, columns * kDepth<T>},
                     (seeing.last - seeing.first) / kDepth<T>, columns / kLanes, sums, columns);
      return;
    }
    for (int64_t i = 0; i < number; ++i) {
      for (int64_t row = seeing.first; row < seeing.last; ++row) {
        add_row(to_float(left + paired<T>(row, k + i, kKeyBlock)), right_rows + row * columns, 1, columns,
                sums + i * columns);
      }
    }
  }

  void write_queries() {
    for (int64_t i = 0; i < count; ++i) {
      write_row(grad_queries + i * width, p.scale, p.head_dim,
                static_cast<scalar_t*>(p.grad_query) + this->offset(rows[i], p.grad_query_strides),
                p.grad_query_strides[3]);
    }
  }

  void write_keys(const AttentionBackwardTask& task) {
    const auto address = [&](void* tensor, const int64_t (&strides)[4], int64_t key) {
      return static_cast<scalar_t*>(tensor) + sequence.storage * strides[0] + kv_head * strides[1] +
             (sequence.first_key + key) * strides[2];
    };
    const int64_t last = least(task.last_tile * kKeyBlock, sequence.keys);
    for (int64_t key = task.first_tile * kKeyBlock; key < last; ++key) {
      write_row(grad_keys + key * width, p.scale, p.head_dim, address(p.grad_key, p.grad_key_strides, key),
                p.grad_key_strides[3]);
      write_row(grad_values + key * value_width, 1.0f, p.value_dim, address(p.grad_value, p.grad_value_strides, key),
                p.grad_value_strides[3]);
    }
  }

  void add_mask(int64_t tile, bool has_row, bool has_key) {
    const int64_t padded = round_up(count, kDepth<T>);
    for (int64_t first = 0; first < padded; first += kTileRows) {
      this->template score_rows<true, true>(
          tile, first, least<int64_t>(kTileRows, padded - first),
          [&](int64_t row, int64_t k, const Vector*, const Vector* grads) {
            for (int64_t i = 0; i < kDepth<T>; ++i) {
              const int64_t at = (has_row ? row + i : 0) * kKeyBlock + (has_key ? k : 0);
              const Vector old = load(mask_sums + at), addend = grads[i] - load(mask_errors + at), sum = old + addend;
              store(mask_errors + at, (sum - old) - addend);
              store(mask_sums + at, sum);
            }
          });
    }
  }

  void write_mask(const MaskGradientTask& task, bool has_row, bool has_key) {
    const int64_t (&strides)[4] = p.grad_mask_strides;
    const int64_t key = task.first_tile * kKeyBlock, keys_here = least(kKeyBlock, p.kv_length - key);
    for (int64_t query = task.first_query; query < (has_row ? task.last_query : task.first_query + 1); ++query) {
      float* target = p.grad_mask + task.batch * strides[0] + task.head * strides[1] + query * strides[2];
      const float* sums = mask_sums + (query - task.first_query) * kKeyBlock;
      if (has_key) {
        write_row(sums, 1.0f, keys_here, target + key * strides[3], strides[3]);
      } else {
        *target = sum(load(sums));
      }
    }
  }

  T* query_pairs;       // (kBlockRows / kDepth, width, kDepth)
  T* grad_out_pairs;    // (kBlockRows / kDepth, value_width, kDepth)
  float* grad_queries;  // (kBlockRows, width)
  T* weight_pairs;      // (kBlockRows / kDepth, kKeyBlock, kDepth)
  T* grad_score_pairs;  // (kBlockRows / kDepth, kKeyBlock, kDepth)
  T* grad_score_rows;   // (kBlockRows, kKeyBlock)
  T* key_pairs;         // (tiles, kKeyBlock / kDepth, width, kDepth)
  bool* keys_finite;    // (tiles)
  float* grad_keys;     // (tiles, kKeyBlock, width)
  float* grad_values;   // (tiles, kKeyBlock, value_width)
  float* mask_sums;     // (kBlockRows, kKeyBlock) of the mask's gradient; without a key axis one vector per row
  float* mask_errors;   // of the sums
};

template <typename Use>
auto with_type(ElementType dtype, Use use) {
  switch (dtype) {
    case ElementType::bfloat16: return use(BFloat16{});
    case ElementType::float16: return use(Half{});
    default: return use(float{});
  }
}

int64_t workspace_bytes(const AttentionBackwardParams& p) {
  return with_type(p.dtype, [&](auto type) { return Kernel<decltype(type)>(p, Scratch(nullptr)).bytes; });
}

void run(const AttentionBackwardParams& p, const AttentionBackwardTask& task, void* workspace) {
  with_type(p.dtype, [&](auto type) { Kernel<decltype(type)>(p, Scratch(workspace)).run(task); });
}

void run_mask(const AttentionBackwardParams& p, const MaskGradientTask& task, void* workspace) {
  with_type(p.dtype, [&](auto type) { Kernel<decltype(type)>(p, Scratch(workspace)).run_mask(task); });
}

}  // namespace

extern const AttentionBackwardKernel attention_backward_kernel = {workspace_bytes, run, run_mask};

}  // namespace gpt4fast::cpu::GPT4FAST_LEVEL
