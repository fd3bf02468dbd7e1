// Attention of a few queries over a cache (flash decoding: Dao et al., 2023), bound by reading the cache. All query
// rows that share a key/value head form one matrix. A head's keys are split into tasks, whose number depends on the
// arguments but not on the threads; each task appends the new tokens that fall to it, runs through its keys in tiles
// with a running maximum and leaves unnormalised sums, and the last task of a head combines them in order. Compiled
// once per CPU level.
#include "../attention.h"

#include "attention_append.h"
#include "attention_decode_products.h"
#include "attention_rows.h"
#include "attention_scores.h"

namespace gpt4fast::cpu::GPT4FAST_LEVEL {
namespace {

constexpr int64_t kTile = 128;                  // keys
constexpr int64_t kBlockRows = 32;              // query rows whose scores of a tile stay in L1
constexpr int64_t kScoresRow = kTile + kLanes;  // one vector of zeros behind a row's weights

// The keys of a sequence that its queries see, and those that are appended.
Range touched_keys(const AttentionDecodeParams& p, const Sequence& sequence) {
  const Row first(p, sequence, 0, 0), last(p, sequence, 0, p.query_length * (p.query_heads / p.kv_heads) - 1);
  Range keys = {first.begin, most(first.begin, last.end)};
  if (p.new_key) {
    keys = keys.empty() ? Range{sequence.offset, sequence.offset} : keys;
    keys = {least(keys.first, sequence.offset), most(keys.last, sequence.offset + p.query_length)};
  }
  return keys;
}

// How the work is cut.
struct Plan {
  int64_t rows;   // query rows of a key/value head
  int64_t width;  // of a row of sums
  int64_t split;  // keys of a task
  int64_t tasks = 0;

  explicit Plan(const AttentionDecodeParams& p) {
    rows = p.query_length * (p.query_heads / p.kv_heads);
    width = round_up(p.value_dim, 2 * kLanes);
    int64_t keys = 0;
    for (int64_t b = 0; b < p.batch; ++b) {
      const Range touched = touched_keys(p, Sequence(p, b));
      keys += touched.last - touched.first;
    }
    // At most some 128 tasks besides one for each head. The sums take at most half a number for each number of a key
    // and value: with many rows, tasks have more keys.
    split = most(most(2 * kTile, 8 * rows), keys * p.kv_heads / 128);
    split = round_up(split, kTile);
    for (int64_t b = 0; b < p.batch; ++b) {
      tasks += p.kv_heads * splits(touched_keys(p, Sequence(p, b)));
    }
  }

  int64_t splits(Range keys) const { return most<int64_t>(1, (keys.last - keys.first + split - 1) / split); }
  int64_t sums_size() const { return round_up(rows * (2 + width), 16); }
};

// What a task leaves for each of its rows.
struct Sums {
  float* maxima;  // (rows), of the scores
  float* totals;  // (rows), of the weights relative to the maximum
  float* out;     // (rows, width)

  Sums(const Plan& plan, void* memory, int64_t task)
      : maxima(static_cast<float*>(memory) + task * plan.sums_size() + plan.rows * plan.width),
        totals(maxima + plan.rows),
        out(maxima - plan.rows * plan.width) {}
};

// Scratch memory of one thread. T is what products are made of.
template <typename T, typename cache_t>
struct Workspace {
  T* queries;            // (kBlockRows, depth)
  float* scores;         // (kBlockRows, kScoresRow)
  T* weights;            // (kBlockRows, kScoresRow); float32 weights replace the scores
  float* row;            // one query or new token
  Row* rows;             // (kBlockRows)
  Range* visible;        // (kBlockRows), within the tile
  const cache_t** keys;  // (kTile) addresses, the last one repeated behind the end
  const cache_t** values;
  const cache_t** ahead;  // the keys of the next tile
  float* key_scales;      // (kTile)
  float* value_scales;
  cache_t* key_copies;  // (kTile, D) where the numbers of a key are no neighbours, else nothing
  cache_t* value_copies;
  int64_t bytes = 0;

  Workspace(const AttentionDecodeParams& p, void* memory) : base_(static_cast<char*>(memory)) {
    take(queries, kBlockRows * padded_depth(p.head_dim));
    take(scores, kBlockRows * kScoresRow);
    if constexpr (kDepth<T> == 1) {
      weights = scores;
    } else {
      take(weights, kBlockRows * kScoresRow);
    }
    take(row, most(p.head_dim, p.value_dim));
    take(rows, kBlockRows);
    take(visible, kBlockRows);
    take(keys, kTile);
    take(values, kTile);
    take(ahead, kTile);
    take(key_scales, kTile);
    take(value_scales, kTile);
    take(key_copies, p.key_strides[3] == 1 ? 0 : kTile * p.head_dim);
    take(value_copies, p.value_strides[3] == 1 ? 0 : kTile * p.value_dim);
  }

  static int64_t padded_depth(int64_t depth) { return round_up(depth, kLanes * kDepth<T>); }

 private:
  template <typename Item>
  void take(Item*& pointer, int64_t count) {
    pointer = reinterpret_cast<Item*>(base_ + bytes);
    bytes += round_up(count * static_cast<int64_t>(sizeof(Item)), 64);
  }

  char* base_;
};

template <typename scalar_t, typename cache_t>
class Kernel {
  using T = Compute<cache_t>;
  using Scratch = Workspace<T, cache_t>;

 public:
  Kernel(const AttentionDecodeParams& params, const Plan& cut, void* all_sums, void* memory)
      : p(params), plan(cut), sums_(all_sums), work(params, memory) {}

  // Task number `task`: the given keys of a head.
  void run(const Sequence& sequence, int64_t kv_head, Range keys, int64_t task) {
    if (p.new_key) {
      append(sequence, kv_head, keys);
    }
    const Sums sums(plan, sums_, task);
    for (int64_t first = 0; first < plan.rows; first += kBlockRows) {
      const int64_t count = least(kBlockRows, plan.rows - first);
      begin_rows(sequence, kv_head, first, count);
      Sums block = sums;
      block.maxima += first;
      block.totals += first;
      block.out += first * plan.width;
      for (int64_t i = 0; i < count; ++i) {
        block.maxima[i] = -kInfinity;
        block.totals[i] = 0.0f;
      }
      std::memset(block.out, 0, static_cast<size_t>(count * plan.width) * sizeof(float));
      look_ahead(sequence, kv_head, keys);
      for (int64_t key = keys.first; key < keys.last; key += kTile) {
        add_tile(sequence, kv_head, {key, least(key + kTile, keys.last)}, keys, count, block);
      }
    }
  }

  // Combines the sums of a head's tasks [first, first + count).
  void finish(const Sequence& sequence, int64_t kv_head, int64_t first, int64_t count) {
    for (int64_t i = 0; i < plan.rows; ++i) {
      const Row row(p, sequence, kv_head, i);
      float maximum = -kInfinity;
      for (int64_t s = 0; s < count; ++s) {
        maximum = most(maximum, Sums(plan, sums_, first + s).maxima[i]);
      }
      const float level = maximum == -kInfinity ? 0.0f : maximum;
      float total = 0.0f;
      float* const out = Sums(plan, sums_, first).out + i * plan.width;
      for (int64_t s = 0; s < count; ++s) {
        const Sums part(plan, sums_, first + s);
        const float factor = exp2<5>(exponent_(broadcast(part.maxima[i]), broadcast(level)))[0];
        total += part.totals[i] * factor;
        for (int64_t d = 0; d < plan.width; d += kLanes) {
          const Vector before = s == 0 ? Vector{} : load(out + d);
          store(out + d, multiply_add(load(part.out + i * plan.width + d), broadcast(factor), before));
        }
      }
      const Vector factor = broadcast(total == 0.0f ? 0.0f : 1.0f / total);
      for (int64_t d = 0; d < plan.width; d += kLanes) {
        store(out + d, load(out + d) * factor);
      }
      scalar_t* target = static_cast<scalar_t*>(p.out) + sequence.index * p.out_strides[0] +
                         row.head * p.out_strides[1] + row.query * p.out_strides[2];
      store_row(out, p.value_dim, target, 1);
      float* lse = p.lse + (sequence.index * p.query_heads + row.head) * p.query_length + row.query;
      *lse = total == 0.0f ? -kInfinity : exponent_.lse(maximum, total);
    }
  }

 private:
  // The addresses of a cache's rows [first, first + count) of a head.
  template <typename Item, typename Data, size_t kCount>
  void locate(Data* cache, const int64_t (&strides)[kCount], const Sequence& sequence, int64_t kv_head, int64_t first,
              int64_t count, Item** rows) const {
    Item* const data = static_cast<Item*>(cache) + kv_head * strides[1];
    for (int64_t i = 0; i < count;) {
      const int64_t number = (first + i) / p.block_size, within = (first + i) % p.block_size;
      const int64_t block = p.block_table ? p.block_table[sequence.index * p.blocks_per_row + number] : sequence.index;
      Item* const start = data + block * strides[0] + within * strides[2];
      const int64_t run = least(count - i, p.block_size - within);
      for (int64_t j = 0; j < run; ++j) {
        rows[i + j] = start + j * strides[2];
      }
      i += run;
    }
  }

  // Writes the new tokens that belong to the given keys.
  void append(const Sequence& sequence, int64_t kv_head, Range keys) {
    const int64_t first = most(keys.first, sequence.offset);
    const int64_t last = least(keys.last, sequence.offset + p.query_length);
    for (int64_t key = first; key < last; ++key) {
      const int64_t token = key - sequence.offset;
      const auto write = [&](const void* source, const int64_t (&strides)[4], int64_t dim, void* cache,
                             const int64_t (&cache_strides)[4], float* scales, const int64_t (&scale_strides)[3],
                             bool rotary) {
        const scalar_t* from = static_cast<const scalar_t*>(source) + sequence.index * strides[0] +
                               kv_head * strides[1] + token * strides[2];
        pack_row(from, strides[3], dim, dim, work.row);
        if (rotary) {
          rotate(p, key, work.row);
        }
        cache_t* target;
        locate(cache, cache_strides, sequence, kv_head, key, 1, &target);
        if constexpr (sizeof(cache_t) == 1) {
          float* scale;
          locate(scales, scale_strides, sequence, kv_head, key, 1, &scale);
          *scale = quantize_row(work.row, dim, target, cache_strides[3]);
        } else {
          store_row(work.row, dim, target, cache_strides[3]);
        }
      };
      write(p.new_key, p.new_key_strides, p.head_dim, p.key_cache, p.key_strides, p.key_scales, p.key_scale_strides,
            p.cos != nullptr);
      write(p.new_value, p.new_value_strides, p.value_dim, p.value_cache, p.value_strides, p.value_scales,
            p.value_scale_strides, false);
    }
  }

  void begin_rows(const Sequence& sequence, int64_t kv_head, int64_t first, int64_t count) {
    if (sequence.index == begun_sequence_ && kv_head == begun_head_ && first == begun_row_) {
      return;
    }
    begun_sequence_ = sequence.index;
    begun_head_ = kv_head;
    begun_row_ = first;
    const int64_t depth = Scratch::padded_depth(p.head_dim);
    std::memset(work.queries, 0, static_cast<size_t>(count * depth) * sizeof(T));
    for (int64_t i = 0; i < count; ++i) {
      const Row& row = work.rows[i] = Row(p, sequence, kv_head, first + i);
      const scalar_t* query = static_cast<const scalar_t*>(p.query) + sequence.index * p.query_strides[0] +
                              row.head * p.query_strides[1] + row.query * p.query_strides[2];
      pack_row(query, p.query_strides[3], p.head_dim, p.head_dim, work.row);
      if (p.cos) {
        rotate(p, row.position, work.row);
      }
      store_row(work.row, p.head_dim, work.queries + i * depth, 1);
    }
  }

  // The addresses of a cache's rows, repeated up to whole vectors, or of contiguous copies of them.
  void locate_tile(const void* cache, const int64_t (&strides)[4], const Sequence& sequence, int64_t kv_head,
                   Range keys, const cache_t** rows) const {
    const int64_t count = keys.last - keys.first;
    locate(cache, strides, sequence, kv_head, keys.first, count, rows);
    for (int64_t i = count; i < round_up(count, kLanes); ++i) {
      rows[i] = rows[count - 1];
    }
  }

  void copy_rows(int64_t count, int64_t stride, int64_t dim, cache_t* copies, const cache_t** rows) const {
    for (int64_t i = 0; i < round_up(count, kLanes) && stride != 1; ++i) {
      pack_row(rows[i], stride, dim, dim, copies + i * dim);
      rows[i] = copies + i * dim;
    }
  }

  // The tile of keys that is next, which the products with values bring into the caches.
  void look_ahead(const Sequence& sequence, int64_t kv_head, Range keys) const {
    locate_tile(p.key, p.key_strides, sequence, kv_head, {keys.first, least(keys.first + kTile, keys.last)},
                work.ahead);
  }

  void gather(const float* scales, const int64_t (&strides)[3], const Sequence& sequence, int64_t kv_head, Range keys,
              float* target) const {
    const float* addresses[kTile];
    const int64_t count = keys.last - keys.first;
    locate(scales, strides, sequence, kv_head, keys.first, count, addresses);
    for (int64_t i = 0; i < count; ++i) {
      target[i] = *addresses[i];
    }
  }

  void add_tile(const Sequence& sequence, int64_t kv_head, Range tile, Range all, int64_t rows, const Sums& sums) {
    const int64_t count = tile.last - tile.first;
    const cache_t** const before = work.keys;
    work.keys = work.ahead;
    work.ahead = before;
    locate_tile(p.value, p.value_strides, sequence, kv_head, tile, work.values);
    look_ahead(sequence, kv_head, {tile.last < all.last ? tile.last : tile.first, all.last});
    copy_rows(count, p.key_strides[3], p.head_dim, work.key_copies, work.keys);
    copy_rows(count, p.value_strides[3], p.value_dim, work.value_copies, work.values);
    if constexpr (sizeof(cache_t) == 1) {
      gather(p.key_scales, p.key_scale_strides, sequence, kv_head, tile, work.key_scales);
      gather(p.value_scales, p.value_scale_strides, sequence, kv_head, tile, work.value_scales);
    }
    const int64_t depth = Scratch::padded_depth(p.head_dim);
    for (int64_t k = 0; k < count; k += kLanes) {
      for_each_block<kDotRows>(rows, [&](auto number, int64_t first) {
        multiply_keys<decltype(number)::value>(work.queries + first * depth, depth, work.keys + k, work.values + k,
                                               p.head_dim, work.scores + first * kScoresRow + k, kScoresRow);
      });
    }
    for (int64_t row = 0; row < rows; ++row) {
      soften(tile, row, sums);
    }
    for_each_block<kTileRows>(rows, [&](auto number, int64_t first) {
      constexpr int kRows = decltype(number)::value;
      Range common = {0, count};
      for (int64_t row = first; row < first + kRows; ++row) {
        common = {most(common.first, work.visible[row].first), least(common.last, work.visible[row].last)};
      }
      common.last = most(common.first, common.last);
      add_block<kRows>(common, first, sums);
      // What only some rows see may not be multiplied by a weight of 0 of another: it may be NaN.
      for (int64_t row = first; row < first + kRows; ++row) {
        const Range seen = work.visible[row];
        add_block<1>({seen.first, least(seen.last, common.first)}, row, sums);
        add_block<1>({most(seen.first, common.last), seen.last}, row, sums);
      }
    });
  }

  template <int kRows>
  void add_block(Range keys, int64_t row, const Sums& sums) const {
    if (!keys.empty()) {
      const Weighted<T, cache_t> x = {work.values + keys.first, work.ahead + keys.first, keys.last - keys.first,
                                      work.weights + row * kScoresRow + keys.first, kScoresRow};
      add_values<kRows, widest_tile(kRows)>(x, p.value_dim, sums.out + row * plan.width, plan.width);
    }
  }

  // Turns one row's products into weights relative to the running maximum.
  void soften(Range tile, int64_t row, const Sums& sums) {
    const Row& query = work.rows[row];
    const int64_t count = tile.last - tile.first;
    const Range seen = {least(most<int64_t>(query.begin - tile.first, 0), count),
                        least(most<int64_t>(query.end - tile.first, 0), count)};
    work.visible[row] = seen;
    if (seen.empty()) {
      return;
    }
    const Range columns = {seen.first / kLanes * kLanes, round_up(seen.last, kLanes)};
    float* const scores = work.scores + row * kScoresRow;
    if constexpr (sizeof(cache_t) == 1) {
      for (int64_t k = columns.first; k < columns.last; k += kLanes) {
        store(scores + k, load(scores + k) * load(work.key_scales + k));
      }
    }
    if (is_general_) {
      adjust_scores(p, query, tile.first, columns, nullptr, scores, nullptr);
    }
    hide_scores(seen, columns, scores);
    Vector largest_lanes = broadcast(-kInfinity);
    for (int64_t k = columns.first; k < columns.last; k += kLanes) {
      largest_lanes = maximum(largest_lanes, load(scores + k));
    }
    raise_maximum(row, largest(largest_lanes), sums);
    const Vector level = broadcast(sums.maxima[row] == -kInfinity ? 0.0f : sums.maxima[row]);
    Vector total = {};
    for (int64_t k = columns.first; k < columns.last; k += kLanes) {
      Vector weight = exp2<kDepth<T> == 1 ? 5 : 4>(exponent_(load(scores + k), level));
      total = total + weight;
      if constexpr (sizeof(cache_t) == 1) {
        weight = weight * load(work.value_scales + k);
      }
      store(work.weights + row * kScoresRow + k, weight);
    }
    sums.totals[row] += sum(total);
    // A pair of keys may end behind the last one.
    store(work.weights + row * kScoresRow + columns.last, Vector{});
  }

  void raise_maximum(int64_t row, float maximum, const Sums& sums) const {
    if (maximum > sums.maxima[row]) {
      const Vector rescale = exp2<5>(exponent_(broadcast(sums.maxima[row]), broadcast(maximum)));
      sums.maxima[row] = maximum;
      sums.totals[row] *= rescale[0];
      for (int64_t d = 0; d < plan.width; d += kLanes) {
        float* const out = sums.out + row * plan.width + d;
        store(out, load(out) * rescale);
      }
    }
  }

  const AttentionDecodeParams& p;
  const Plan& plan;
  void* sums_;
  Scratch work;
  const bool is_general_ = has_adjustments(p) || p.scale <= 0.0f;  // scores are more than products times a factor
  const Exponent exponent_{is_general_ ? kLog2E : static_cast<double>(p.scale) * kLog2E};
  int64_t begun_sequence_ = -1, begun_head_ = -1, begun_row_ = -1;
};

int64_t sums_bytes(const Plan& plan) {
  return plan.tasks * plan.sums_size() * static_cast<int64_t>(sizeof(float));
}

template <typename scalar_t, typename cache_t>
void run_tasks(const AttentionDecodeParams& p, void* workspace, int64_t* counters, int64_t thread) {
  const Plan plan(p);
  const int64_t bytes = Workspace<Compute<cache_t>, cache_t>(p, nullptr).bytes;
  Kernel<scalar_t, cache_t> kernel(p, plan, workspace,
                                   static_cast<char*>(workspace) + sums_bytes(plan) + thread * bytes);
  int64_t b = 0, before = 0;  // tasks of the sequences before b
  for (int64_t task; (task = __atomic_fetch_add(&counters[0], 1, __ATOMIC_RELAXED)) < plan.tasks;) {
    const auto splits_of = [&](int64_t i) { return plan.splits(touched_keys(p, Sequence(p, i))); };
    for (; task >= before + p.kv_heads * splits_of(b); ++b) {
      before += p.kv_heads * splits_of(b);
    }
    const Sequence sequence(p, b);
    const Range keys = touched_keys(p, sequence);
    const int64_t splits = plan.splits(keys), head = (task - before) / splits, split = (task - before) % splits;
    const int64_t first = keys.first + split * plan.split;
    kernel.run(sequence, head, {first, least(first + plan.split, keys.last)}, task);
    const int64_t done = __atomic_add_fetch(&counters[1 + b * p.kv_heads + head], 1, __ATOMIC_ACQ_REL);
    if (done == splits) {
      kernel.finish(sequence, head, task - split, splits);
    }
  }
}

template <typename Use>
auto with_types(const AttentionDecodeParams& p, Use use) {
  const auto with_cache = [&](auto type) {
    return p.cache_dtype == ElementType::int8 ? use(type, int8_t{}) : use(type, type);
  };
  switch (p.dtype) {
    case ElementType::bfloat16: return with_cache(BFloat16{});
    case ElementType::float16: return with_cache(Half{});
    default: return with_cache(float{});
  }
}

int64_t workspace_bytes(const AttentionDecodeParams& p, int64_t threads) {
  return with_types(p, [&](auto, auto cache) {
    using cache_t = decltype(cache);
    return sums_bytes(Plan(p)) + threads * Workspace<Compute<cache_t>, cache_t>(p, nullptr).bytes;
  });
}

void run(const AttentionDecodeParams& p, void* workspace, int64_t* counters, int64_t thread) {
  with_types(
      p, [&](auto type, auto cache) { run_tasks<decltype(type), decltype(cache)>(p, workspace, counters, thread); });
}

}  // namespace

extern const AttentionDecodeKernel attention_decode_kernel = {workspace_bytes, run};

}  // namespace gpt4fast::cpu::GPT4FAST_LEVEL
