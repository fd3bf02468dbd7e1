// Attention of a few queries over a cache (flash decoding: Dao et al., 2023), bound by reading the cache. All query
// rows that share a key/value head form one matrix. A head's keys are split into tasks; each appends the new tokens
// that fall to it, runs through its keys in tiles with a running maximum, and leaves unnormalised sums, which the last
// task of a head combines in order. Compiled once per CPU level.
#include "../attention.h"

#include "attention_append.h"
#include "attention_decode_plan.h"
#include "attention_decode_products.h"
#include "attention_scores.h"

namespace gpt4fast::cpu::GPT4FAST_LEVEL {
namespace {

// Bytes of a cache that are fetched before they are needed; more where rows take longer to multiply than to read.
constexpr int64_t bytes_ahead(int64_t rows) {
  return rows < 4 ? 8192 : 12288;
}

template <typename scalar_t, typename cache_t>
class Kernel {
  using T = Compute<cache_t>;
  using Head = CacheHead<const cache_t>;
  static constexpr bool kIsQuantized = sizeof(cache_t) == 1;

 public:
  Kernel(const AttentionDecodeParams& params, const Plan& cut, void* all_sums, void* memory)
      : p(params), plan(cut), sums_(all_sums), work(params, memory) {}

  // Task number `task`: the given keys of a head.
  void run(const Sequence& sequence, int64_t kv_head, Range keys, int64_t task) {
    if (p.appends) {
      append(sequence, kv_head, keys);
    }
    last_key_ = touched_keys(p, sequence).last;
    const Sums sums(plan, sums_, task);
    for (int64_t first = 0; first < plan.rows; first += kBlockRows) {
      const int64_t count = least(kBlockRows, plan.rows - first);
      begin_rows(sequence, kv_head, first, count);
      const Sums block = sums.from(first, plan);
      for (int64_t i = 0; i < count; ++i) {
        block.maxima[i] = -kInfinity;
        block.totals[i] = 0.0f;
      }
      std::memset(block.out, 0, static_cast<size_t>(count * plan.width) * sizeof(float));
      for (int64_t key = keys.first; key < keys.last; key += kTile) {
        add_tile(sequence, kv_head, {key, least(key + kTile, keys.last)}, count, block);
      }
    }
  }

  // Combines the sums of a head's tasks [first, first + count).
  void finish(const Sequence& sequence, int64_t kv_head, int64_t first, int64_t count) {
    for (int64_t i = 0; i < plan.rows; ++i) {
      const Row row(p, sequence, kv_head, i);
      float maximum = -kInfinity;
      for (int64_t task = first; task < first + count; ++task) {
        maximum = most(maximum, Sums(plan, sums_, task).maxima[i]);
      }
      const float level = maximum == -kInfinity ? 0.0f : maximum;
      float total = 0.0f;
      float* const out = Sums(plan, sums_, first).from(i, plan).out;
      for (int64_t task = first; task < first + count; ++task) {
        const Sums part = Sums(plan, sums_, task).from(i, plan);
        const float factor = exp2<5>(exponent_(broadcast(*part.maxima), broadcast(level)))[0];
        total += *part.totals * factor;
        for (int64_t d = 0; d < plan.width; d += kLanes) {
          const Vector before = task == first ? Vector{} : load(out + d);
          store(out + d, multiply_add(load(part.out + d), broadcast(factor), before));
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
  // Writes the new tokens that belong to the given keys.
  void append(const Sequence& sequence, int64_t kv_head, Range keys) {
    const int64_t last = least(keys.last, sequence.offset + p.query_length);
    const auto write = [&](const void* source, const int64_t (&strides)[4], int64_t dim, void* cache,
                           const int64_t (&cache_strides)[4], float* scales, const int64_t (&scale_strides)[3],
                           bool rotary) {
      for (int64_t key = most(keys.first, sequence.offset); key < last; ++key) {
        const scalar_t* from = static_cast<const scalar_t*>(source) + sequence.index * strides[0] +
                               kv_head * strides[1] + (key - sequence.offset) * strides[2];
        pack_row(from, strides[3], dim, dim, work.row);
        if (rotary) {
          rotate(p, key, work.row);
        }
        cache_t* target = CacheHead<cache_t>(p, cache, cache_strides, sequence.index, kv_head).at(key);
        if constexpr (kIsQuantized) {
          *CacheHead<float>(p, scales, scale_strides, sequence.index, kv_head).at(key) =
              quantize_row(work.row, dim, target, cache_strides[3]);
        } else {
          store_row(work.row, dim, target, cache_strides[3]);
        }
      }
    };
    write(p.new_key, p.new_key_strides, p.head_dim, p.key_cache, p.key_strides, p.key_scales, p.key_scale_strides,
          p.cos != nullptr);
    write(p.new_value, p.new_value_strides, p.value_dim, p.value_cache, p.value_strides, p.value_scales,
          p.value_scale_strides, false);
  }

  void begin_rows(const Sequence& sequence, int64_t kv_head, int64_t first, int64_t count) {
    if (sequence.index == begun_sequence_ && kv_head == begun_head_ && first == begun_row_) {
      return;
    }
    begun_sequence_ = sequence.index;
    begun_head_ = kv_head;
    begun_row_ = first;
    std::memset(work.queries, 0, static_cast<size_t>(count * work.depth) * sizeof(T));
    for (int64_t i = 0; i < count; ++i) {
      const Row& row = work.rows[i] = Row(p, sequence, kv_head, first + i);
      const scalar_t* query = static_cast<const scalar_t*>(p.query) + sequence.index * p.query_strides[0] +
                              row.head * p.query_strides[1] + row.query * p.query_strides[2];
      pack_row(query, p.query_strides[3], p.head_dim, p.head_dim, work.row);
      if (p.cos) {
        rotate(p, row.position, work.row);
      }
      store_row(work.row, p.head_dim, work.queries + i * work.depth, 1);
    }
  }

  void add_tile(const Sequence& sequence, int64_t kv_head, Range tile, int64_t rows, const Sums& sums) {
    score(Head(p, p.key, p.key_strides, sequence.index, kv_head), tile, rows);
    if constexpr (kIsQuantized) {
      const auto gather = [&](const float* scales, const int64_t (&strides)[3], float* target) {
        const CacheHead<const float> head(p, scales, strides, sequence.index, kv_head);
        head.for_each_run(tile, 0, 0, [&](const Run<const float>& run, int64_t first) {
          for (int64_t i = 0; i < run.count; ++i) {
            target[first + i] = run.data[i * run.stride];
          }
        });
      };
      gather(p.key_scales, p.key_scale_strides, work.key_scales);
      gather(p.value_scales, p.value_scale_strides, work.value_scales);
    }
    for (int64_t row = 0; row < rows; ++row) {
      soften(tile, row, sums);
    }
    const Head values(p, p.value, p.value_strides, sequence.index, kv_head);
    const bool in_place = is_in_place(p, p.value_strides);
    if (!in_place) {
      copy_rows(values, p.value_strides[3], p.value_dim, values_ahead_, tile, work.value_copies);
    }
    const auto add = [&](auto number, Range keys, int64_t row) {
      if (keys.empty()) {
        return;
      }
      constexpr int kRows = decltype(number)::value;
      const auto add_run = [&](const Run<const cache_t>& run, int64_t first) {
        const Sums to = sums.from(row, plan);
        add_values<kRows, widest_tile(kRows)>(work.weights + row * work.scores_row + keys.first + first,
                                              work.scores_row, run, 0, p.value_dim, to.out, plan.width);
      };
      if (!in_place) {
        add_run({work.value_copies + keys.first * p.value_dim, p.value_dim, keys.last - keys.first, 0}, 0);
      } else {
        values.for_each_run({tile.first + keys.first, tile.first + keys.last}, values_ahead_, last_key_, add_run);
      }
    };
    for_each_block<kTileRows>(rows, [&](auto number, int64_t first) {
      constexpr int kRows = decltype(number)::value;
      Range common = {0, tile.last - tile.first};
      for (int64_t row = first; row < first + kRows; ++row) {
        common = {most(common.first, work.visible[row].first), least(common.last, work.visible[row].last)};
      }
      common.last = most(common.first, common.last);
      add(number, common, first);
      // What only some rows see may not be multiplied by a weight of 0 of another: it may be NaN.
      for (int64_t row = first; row < first + kRows; ++row) {
        const Range seen = work.visible[row];
        add(Constant<1>{}, {seen.first, least(seen.last, common.first)}, row);
        add(Constant<1>{}, {most(seen.first, common.last), seen.last}, row);
      }
    });
  }

  // Products of the query rows with a tile's keys, and with some behind it up to whole vectors.
  void score(const Head& head, Range tile, int64_t rows) const {
    const auto multiply = [&](const Run<const cache_t>& run, int64_t first_key) {
      for_each_block<kDotRows>(rows, [&](auto number, int64_t first) {
        multiply_keys<decltype(number)::value>(work.queries + first * work.depth, work.depth, run, p.head_dim,
                                               work.scores + first * work.scores_row + first_key, work.scores_row);
      });
    };
    const int64_t count = round_up(tile.last - tile.first, kLanes);
    int64_t in_place = 0;
    if (is_in_place(p, p.key_strides)) {
      in_place = p.block_table ? count : least(count, (p.kv_length - tile.first) / kLanes * kLanes);
      head.for_each_run({tile.first, tile.first + in_place}, keys_ahead_, last_key_, multiply);
    }
    if (in_place < count) {
      copy_rows(head, p.key_strides[3], p.head_dim, keys_ahead_, {tile.first + in_place, tile.last}, work.key_copies);
      multiply({work.key_copies, p.head_dim, count - in_place, 0}, in_place);
    }
  }

  void copy_rows(const Head& head, int64_t stride, int64_t dim, int64_t distance, Range keys, cache_t* copies) const {
    head.for_each_run(keys, distance, last_key_, [&](const Run<const cache_t>& run, int64_t first) {
      for (int64_t i = 0; i < run.count; ++i) {
        const cache_t* row = run.data + i * run.stride;
        for (int64_t d = 0; d < dim; d += kCacheLine / static_cast<int64_t>(sizeof(cache_t))) {
          __builtin_prefetch(row + run.ahead + d);
        }
        pack_row(row, stride, dim, dim, copies + (first + i) * dim);
      }
    });
  }

  int64_t rows_ahead(int64_t dim) const {
    return bytes_ahead(plan.rows) / most<int64_t>(dim * static_cast<int64_t>(sizeof(cache_t)), 1) + 1;
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
    float* const scores = work.scores + row * work.scores_row;
    if constexpr (kIsQuantized) {
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
      if constexpr (kIsQuantized) {
        weight = weight * load(work.value_scales + k);
      }
      store(work.weights + row * work.scores_row + k, weight);
    }
    sums.totals[row] += sum(total);
    // A pair of keys may end behind the last one.
    store(work.weights + row * work.scores_row + columns.last, Vector{});
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
  Workspace<T, cache_t> work;
  const bool is_general_ = has_adjustments(p) || p.scale <= 0.0f;  // scores are more than products times a factor
  const Exponent exponent_{is_general_ ? kLog2E : static_cast<double>(p.scale) * kLog2E};
  const int64_t keys_ahead_ = rows_ahead(p.head_dim), values_ahead_ = rows_ahead(p.value_dim);
  int64_t last_key_ = 0;  // of the sequence
  int64_t begun_sequence_ = -1, begun_head_ = -1, begun_row_ = -1;
};

template <typename scalar_t, typename cache_t>
void run_tasks(const AttentionDecodeParams& p, void* workspace, int64_t* counters, int64_t thread, int64_t threads) {
  const Plan plan(p);
  const int64_t bytes = Workspace<Compute<cache_t>, cache_t>(p, nullptr).bytes;
  Kernel<scalar_t, cache_t> kernel(p, plan, workspace,
                                   static_cast<char*>(workspace) + plan.sums_bytes() + thread * bytes);
  int64_t* const heads_done = counters + threads;
  const auto tasks_of = [&](int64_t b) { return p.kv_heads * plan.splits(touched_keys(p, Sequence(p, b))); };
  for (int64_t i = 0; i < threads; ++i) {
    const int64_t owner = (thread + i) % threads;
    const int64_t first_task = owner * plan.tasks / threads, last_task = (owner + 1) * plan.tasks / threads;
    int64_t b = 0, before = 0;  // tasks of the sequences before b
    for (int64_t task; (task = first_task + __atomic_fetch_add(&counters[owner], 1, __ATOMIC_RELAXED)) < last_task;) {
      for (; task >= before + tasks_of(b); ++b) {
        before += tasks_of(b);
      }
      const Sequence sequence(p, b);
      const Range keys = touched_keys(p, sequence);
      const int64_t splits = plan.splits(keys), head = (task - before) / splits, split = (task - before) % splits;
      const int64_t first = keys.first + split * plan.split;
      kernel.run(sequence, head, {first, least(first + plan.split, keys.last)}, task);
      if (__atomic_add_fetch(&heads_done[b * p.kv_heads + head], 1, __ATOMIC_ACQ_REL) == splits) {
        kernel.finish(sequence, head, task - split, splits);
      }
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

int64_t threads_worth_waking(const AttentionDecodeParams& p) {
  return Plan(p).threads(p);
}

int64_t workspace_bytes(const AttentionDecodeParams& p, int64_t threads) {
  return with_types(p, [&](auto, auto cache) {
    using cache_t = decltype(cache);
    const Plan plan(p);
    return plan.sums_bytes() + threads * Workspace<Compute<cache_t>, cache_t>(p, nullptr).bytes;
  });
}

void run(const AttentionDecodeParams& p, void* workspace, int64_t* counters, int64_t thread, int64_t threads) {
  with_types(p, [&](auto type, auto cache) {
    run_tasks<decltype(type), decltype(cache)>(p, workspace, counters, thread, threads);
  });
}

}  // namespace

extern const AttentionDecodeKernel attention_decode_kernel = {threads_worth_waking, workspace_bytes, run};

}  // namespace gpt4fast::cpu::GPT4FAST_LEVEL
