// Flash attention (Dao et al., 2022) on the CPU: one pass over tiles of keys with a running maximum and sum, so that
// scratch memory does not grow with the square of the length. A task is one sequence, one key/value head and a block of
// query rows. For each tile, six rows at a time go through scores, softmax and the product with the values while their
// scores are in L1. Compiled once per CPU level.
#include "../attention.h"

#include <type_traits>

#include "attention_pack.h"
#include "attention_tasks.h"
#include "attention_rows.h"
#include "attention_scores.h"
#include "scratch.h"
#include "tile_product.h"
#include "with_element_type.h"

namespace gpt4fast::cpu::GPT4FAST_LEVEL {
namespace {

// The running maximum follows the true one only when it falls behind by this much, in powers of 2: until then the
// weights are at most 2^8 times too large, which float32 and bfloat16 represent as well, and nothing is rescaled.
constexpr float kSlack = 8.0f;

constexpr int64_t kManyRows = 192;  // of a block whose queries and sums then fit in half of L2 (1 MiB) for D <= 128
constexpr int64_t kFewRows = 96;    // for larger D

int64_t block_rows(const AttentionForwardParams& p) {
  return p.head_dim + p.value_dim <= 256 ? kManyRows : kFewRows;
}

int64_t longest_sequence(const AttentionForwardParams& p) {
  int64_t keys = 0;
  for (int64_t b = 0; b < p.batch; ++b) {
    keys = most(keys, Sequence(p, b).keys);
  }
  return keys;
}

// Scratch memory of one thread. T is what products are made of.
template <typename T>
struct Workspace : Scratch {
  T* queries;       // (block_rows, padded_depth(D))
  float* out;       // (block_rows, padded_columns(Dv))
  Vector* totals;   // (block_rows)
  float* scores;    // (kTileRows, kKeyBlock)
  float* bias;      // (kTileRows, kKeyBlock)
  T* weights;       // (kTileRows, kKeyBlock); float32 weights replace the scores
  Row* rows;        // (block_rows)
  float* maxima;    // (block_rows), of the scores
  T* keys;          // (tiles, padded_depth(D) / kDepth, kKeyBlock, kDepth)
  T* values;        // (tiles, kKeyBlock / kDepth, padded_columns(Dv), kDepth)
  bool* is_packed;  // (tiles)

  Workspace(const AttentionForwardParams& p, void* memory) : Scratch(memory) {
    const int64_t rows_count = block_rows(p), depth = padded_depth<T>(p.head_dim), width = padded_columns(p.value_dim);
    const int64_t tiles = (longest_sequence(p) + kKeyBlock - 1) / kKeyBlock;
    take(queries, rows_count * depth);
    take(out, rows_count * width);
    take(totals, rows_count);
    take(scores, kTileRows * kKeyBlock);
    take(bias, kTileRows * kKeyBlock);
    if constexpr (kDepth<T> == 1) {
      weights = scores;
    } else {
      take(weights, kTileRows * kKeyBlock);
    }
    take(rows, rows_count);
    take(maxima, rows_count);
    take(keys, tiles * depth * kKeyBlock);
    take(values, tiles * kKeyBlock * width);
    take(is_packed, tiles);
  }
};

template <typename scalar_t>
class Kernel {
  using T = Compute<scalar_t>;

 public:
  Kernel(const AttentionForwardParams& params, void* memory) : p(params), work(params, memory), dropout(params) {}

  // next is the task to come, or null.
  void run(const Task& task, const Task* next) {
    begin_head(task);
    if (next && !next->same_head(task)) {
      const int64_t groups = (task.count + kTileRows - 1) / kTileRows;
      const int64_t tiles = (task.sequence.keys + kKeyBlock - 1) / kKeyBlock;
      prefetch_ = Prefetch(p, *next, most<int64_t>(groups * tiles, 1), static_cast<const scalar_t*>(nullptr));
    }
    careful_ = false;
    compute(task);
    if (!write(task)) {
      // An infinity or NaN came in, perhaps from a value that a row does not see, since 0 * NaN is NaN.
      careful_ = true;
      compute(task);
      write(task);
    }
  }

 private:
  void compute(const Task& task) {
    begin_rows(task.sequence, task.kv_head, task.start, task.count);
    const Range tiles = visible_tiles(work.rows, task.count);
    for (int64_t tile = tiles.first; tile < tiles.last; ++tile) {
      pack(task.sequence, tile);
      for (int64_t row = 0; row < task.count; row += kTileRows) {
        prefetch_.step();
        if (is_general_) {
          add_tile<true>(task.sequence, tile, row, least<int64_t>(kTileRows, task.count - row));
        } else {
          add_tile<false>(task.sequence, tile, row, least<int64_t>(kTileRows, task.count - row));
        }
      }
    }
  }

  void begin_head(const Task& task) {
    if (head_.same_head(task)) {
      return;
    }
    head_ = task;
    const Sequence& sequence = task.sequence;
    std::memset(work.is_packed, 0, static_cast<size_t>((sequence.keys + kKeyBlock - 1) / kKeyBlock));
    keys_ = {static_cast<const scalar_t*>(p.key) + sequence.storage * p.key_strides[0] +
                 task.kv_head * p.key_strides[1] + sequence.first_key * p.key_strides[2],
             p.key_strides[2], p.key_strides[3], p.head_dim};
    values_ = {static_cast<const scalar_t*>(p.value) + sequence.storage * p.value_strides[0] +
                   task.kv_head * p.value_strides[1] + sequence.first_key * p.value_strides[2],
               p.value_strides[2], p.value_strides[3], p.value_dim};
    queries_ = {static_cast<const scalar_t*>(p.query) + sequence.storage * p.query_strides[0] +
                    task.kv_head * group_size() * p.query_strides[1] + sequence.first_query * p.query_strides[2],
                p.query_strides[2], p.query_strides[3], p.head_dim};
  }

  void begin_rows(const Sequence& sequence, int64_t kv_head, int64_t start, int64_t count) {
    const int64_t depth = padded_depth<T>(p.head_dim), width = padded_columns(p.value_dim);
    for (int64_t i = 0; i < count; ++i) {
      const Row& row = work.rows[i] = Row(p, sequence, kv_head, start + i);
      work.maxima[i] = -kInfinity;
      work.totals[i] = Vector{};
      if (!queries_in_place()) {
        const scalar_t* query =
            queries_.data + row.query * queries_.row_stride + (row.head - kv_head * group_size()) * p.query_strides[1];
        pack_row(query, queries_.stride, p.head_dim, depth, work.queries + i * depth);
      }
    }
    std::memset(work.out, 0, static_cast<size_t>(count * width) * sizeof(float));
  }

  int64_t group_size() const { return p.query_heads / p.kv_heads; }

  // Whether queries can be read as they lie: then they are not copied.
  bool queries_in_place() const {
    return std::is_same_v<T, scalar_t> && p.query_heads == p.kv_heads && queries_.stride == 1 &&
           p.head_dim % kDepth<T> == 0;
  }

  bool values_in_place() const {
    return std::is_same_v<T, scalar_t> && kDepth<T> == 1 && values_.stride == 1 && values_.row_stride == p.value_dim &&
           p.value_dim % kLanes == 0;
  }

  LeftOperand<T> queries_of(int64_t row) const {
    if constexpr (std::is_same_v<T, scalar_t>) {
      if (queries_in_place()) {
        return {queries_.data + work.rows[row].query * queries_.row_stride, queries_.row_stride, kDepth<T>};
      }
    }
    const int64_t depth = padded_depth<T>(p.head_dim);
    return {work.queries + row * depth, depth, kDepth<T>};
  }

  RightOperand<T> keys_of(int64_t tile, int64_t column) const {
    const T* packed = work.keys + tile * padded_depth<T>(p.head_dim) * kKeyBlock;
    return {packed + column * kDepth<T>, kKeyBlock * kDepth<T>};
  }

  RightOperand<T> values_of(int64_t tile, int64_t column) const {
    if constexpr (std::is_same_v<T, scalar_t>) {
      if (values_in_place()) {
        return {values_.data + (tile * kKeyBlock + column) * values_.row_stride, values_.row_stride};
      }
    }
    const int64_t width = padded_columns(p.value_dim);
    return {work.values + (tile * kKeyBlock + column) * width, width * kDepth<T>};
  }

  // Once per head: all blocks of rows share it.
  void pack(const Sequence& sequence, int64_t tile) {
    if (work.is_packed[tile]) {
      return;
    }
    work.is_packed[tile] = true;
    const int64_t key = tile * kKeyBlock, count = least(kKeyBlock, sequence.keys - key);
    pack_transposed(rows_from(keys_, key), count, work.keys + tile * padded_depth<T>(p.head_dim) * kKeyBlock);
    if (!values_in_place()) {
      pack_right(rows_from(values_, key), count, kKeyBlock, work.values + key * padded_columns(p.value_dim));
    }
  }

  template <bool kGeneral>
  void add_tile(const Sequence& sequence, int64_t tile, int64_t first, int64_t count) {
    const int64_t key = tile * kKeyBlock;
    const Range seen = visible_columns(work.rows + first, count, key);
    if (seen.empty()) {
      return;
    }
    const Range columns = {seen.first / kLanes * kLanes, round_up(seen.last, kLanes)};
    const bool seen_by_all = all_see_all(work.rows + first, count, key);
    if constexpr (kGeneral) {
      bool any_visible = !p.mask;
      for (int64_t i = 0; p.mask && i < count; ++i) {
        any_visible |= read_mask(p, sequence, work.rows[first + i], key, columns, work.bias + i * kKeyBlock);
      }
      if (!any_visible) {
        return;
      }
    }
    multiply<false>(count, queries_of(first), keys_of(tile, columns.first), padded_depth<T>(p.head_dim) / kDepth<T>,
                    (columns.last - columns.first) / kLanes, work.scores + columns.first, kKeyBlock);
    for (int64_t i = 0; i < count; ++i) {
      const Row& row = work.rows[first + i];
      float* scores = work.scores + i * kKeyBlock;
      if constexpr (kGeneral) {
        adjust_scores(p, row, key, columns, p.mask ? work.bias + i * kKeyBlock : nullptr, scores, nullptr);
      }
      if (seen_by_all) {
        soften<kGeneral>({0, kKeyBlock}, first + i, scores);
      } else {
        hide_scores(visible_columns(row, key), columns, scores);
        soften<kGeneral>(columns, first + i, scores);
      }
      if constexpr (kGeneral) {
        if (p.dropout_p != 0.0) {
          dropout.drop(sequence, row, key, scores);
        }
      }
      if constexpr (kDepth<T> != 1) {
        for (int64_t k = columns.first; k < columns.last; k += kLanes) {
          store(work.weights + i * kKeyBlock + k, load(scores + k));
        }
      }
    }
    add_values(tile, first, count, {seen.first / kDepth<T> * kDepth<T>, round_up(seen.last, kDepth<T>)});
  }

  // Turns one row's scores into weights relative to the running maximum.
  template <bool kGeneral>
  [[gnu::always_inline]] void soften(Range columns, int64_t row, float* scores) {
    constexpr int kDegree = kDepth<T> == 1 ? 5 : 4;
    Vector largest_lanes = broadcast(-kInfinity);
    for (int64_t k = columns.first; k < columns.last; k += kLanes) {
      largest_lanes = maximum(largest_lanes, load(scores + k));
    }
    if (any(greater(largest_lanes, broadcast(work.maxima[row] + kSlack / exponent_.high)))) {
      raise_maximum(row, largest(largest_lanes));
    }
    const Vector level = broadcast(work.maxima[row] == -kInfinity ? 0.0f : work.maxima[row]);
    Vector total = work.totals[row];
    for (int64_t k = columns.first; k < columns.last; k += kLanes) {
      const Vector weight = exp2<kDegree>(exponent_(load(scores + k), level));
      total = total + weight;
      store(scores + k, weight);
    }
    work.totals[row] = total;
  }

  [[gnu::noinline]] void raise_maximum(int64_t row, float maximum) {
    const float before = work.maxima[row];
    work.maxima[row] = maximum;
    if (before == -kInfinity) {
      return;  // nothing was summed yet
    }
    const Vector rescale = exp2<5>(exponent_(broadcast(before), broadcast(maximum)));
    work.totals[row] = work.totals[row] * rescale;
    const int64_t width = padded_columns(p.value_dim);
    for (float* out = work.out + row * width; out < work.out + (row + 1) * width; out += kLanes) {
      store(out, load(out) * rescale);
    }
  }

  void add_values(int64_t tile, int64_t first, int64_t count, Range keys) {
    const int64_t width = padded_columns(p.value_dim);
    float* out = work.out + first * width;
    if (!careful_) {
      multiply<true>(count, LeftOperand<T>{work.weights + keys.first, kKeyBlock, kDepth<T>},
                     values_of(tile, keys.first), (keys.last - keys.first) / kDepth<T>, width / kLanes, out, width);
      return;
    }
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t d = 0; d < p.value_dim; ++d) {
        float total = 0.0f;
        for (int64_t k = keys.first; k < keys.last; ++k) {
          const float weight = to_float(work.weights + i * kKeyBlock + k);
          const scalar_t* value = values_.data + (tile * kKeyBlock + k) * values_.row_stride + d * values_.stride;
          total = weight != 0.0f ? total + weight * to_float(value) : total;
        }
        out[i * width + d] += total;
      }
    }
  }

  // Returns whether all sums are finite.
  bool write(const Task& task) {
    const Sequence& sequence = task.sequence;
    const int64_t width = padded_columns(p.value_dim);
    bool finite = true;
    for (int64_t i = 0; i < task.count; ++i) {
      const Row& row = work.rows[i];
      const int64_t query = sequence.first_query + row.query;
      const float total = sum(work.totals[i]);
      const Vector factor = broadcast(total == 0.0f ? 0.0f : dropout.scale / total);
      scalar_t* target = static_cast<scalar_t*>(p.out) + sequence.storage * p.out_strides[0] +
                         row.head * p.out_strides[1] + query * p.out_strides[2];
      Vector zeros = {};
      for (int64_t d = 0; d < p.value_dim; d += kLanes) {
        const Vector out = load(work.out + i * width + d);
        zeros = zeros + out * 0.0f;
        if (d + kLanes <= p.value_dim) {
          store(target + d, out * factor);
        } else {
          store(target + d, out * factor, p.value_dim - d);
        }
      }
      finite = finite && sum(zeros) == 0.0f;
      float* lse = p.lse + (sequence.storage * p.query_heads + row.head) * p.query_length + query;
      *lse = total == 0.0f ? -kInfinity : exponent_.lse(work.maxima[i], total);
    }
    return finite;
  }

  static Rows<scalar_t> rows_from(Rows<scalar_t> all, int64_t first) {
    all.data += first * all.row_stride;
    return all;
  }

  const AttentionForwardParams& p;
  Workspace<T> work;
  Dropout dropout;
  const bool is_general_ = has_adjustments(p) || p.dropout_p != 0.0 || p.scale <= 0.0f;
  const Exponent exponent_{is_general_ ? kLog2E : p.scale * kLog2E};
  Prefetch prefetch_;
  Task head_ = {{}, -1, 0, 0};  // whose keys and values are packed
  bool careful_ = false;        // leave out values of weight 0
  Rows<scalar_t> queries_, keys_, values_;
};

// Each thread takes a run of neighbouring tasks that costs its share, so that it packs few heads.
template <typename scalar_t>
void run_tasks(const AttentionForwardParams& p, void* workspace, int64_t thread, int64_t threads) {
  int64_t total = 0;
  for_each_task(p, block_rows(p), [&](const Task& task) { total += cost_of(p, task); });
  const double share = static_cast<double>(total) / static_cast<double>(threads);
  Kernel<scalar_t> kernel(p, workspace);
  Task present = {};  // of no rows: none yet
  int64_t before = 0;
  for_each_task(p, block_rows(p), [&](const Task& task) {
    if (static_cast<int64_t>(static_cast<double>(before) / share) == thread) {
      if (present.count > 0) {
        kernel.run(present, &task);
      }
      present = task;
    }
    before += cost_of(p, task);
  });
  if (present.count > 0) {
    kernel.run(present, nullptr);
  }
}

int64_t workspace_bytes(const AttentionForwardParams& p) {
  return with_element_type(p.dtype, [&](auto type) { return Workspace<Compute<decltype(type)>>(p, nullptr).bytes; });
}

void run(const AttentionForwardParams& p, void* workspace, int64_t thread, int64_t threads) {
  with_element_type(p.dtype, [&](auto type) { run_tasks<decltype(type)>(p, workspace, thread, threads); });
}

}  // namespace

extern const AttentionForwardKernel attention_forward_kernel = {workspace_bytes, run};

}  // namespace gpt4fast::cpu::GPT4FAST_LEVEL
