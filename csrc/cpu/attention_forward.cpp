// Flash attention (Dao et al., 2022) on the CPU: one pass over blocks of keys with a running maximum and sum, so
// scratch memory does not grow with the length. A task is one batch row, one key/value head and a block of query rows;
// the query heads that share the key/value head are rows of the same block, so keys and values are read once for all of
// them.
#include "../attention.h"

#include <algorithm>
#include <cmath>
#include <tuple>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "../common/checks.h"
#include "../common/dtypes.h"
#include "attention_softmax.h"
#include "attention_tiles.h"

namespace gpt4fast::cpu {
namespace {

constexpr int64_t kFewRows = 2;  // up to this many rows a tile of converted keys costs more than it saves

// Scratch memory of one thread.
struct Workspace {
  float* query;   // (kQueryBlock, round_up(D)), scaled
  float* scores;  // (kQueryBlock, kKeyBlock), then the probabilities
  float* bias;    // (kQueryBlock, kKeyBlock), the mask: -inf is invisible
  float* out;     // (kQueryBlock, round_up(Dv))
  float* key;     // (kKeyBlock, round_up(D))
  float* value;   // (kKeyBlock, round_up(Dv))

  Workspace(const AttentionForwardParams& p, float* memory) {
    query = memory;
    scores = query + kQueryBlock * round_up(p.head_dim);
    bias = scores + kQueryBlock * kKeyBlock;
    out = bias + kQueryBlock * kKeyBlock;
    key = out + kQueryBlock * round_up(p.value_dim);
    value = key + kKeyBlock * round_up(p.head_dim);
  }
};

template <typename scalar_t>
class Block {
 public:
  Block(const AttentionForwardParams& params, float* memory) : p(params), work(params, memory) {}

  // Query rows [start, start + count) of the Lq * (Hq / Hk) rows that share one key/value head. The heads of one query
  // are neighbours, so a block spans few queries and sees few keys under a causal mask.
  void run(int64_t batch, int64_t kv_head, int64_t start, int64_t count) {
    read_rows(batch, kv_head, start, count);
    const int64_t width = round_up(p.value_dim);
    std::fill(work.out, work.out + count * width, 0.0f);
    const auto* keys = static_cast<const scalar_t*>(p.key) + batch * p.key_strides[0] + kv_head * p.key_strides[1];
    const auto* values =
        static_cast<const scalar_t*>(p.value) + batch * p.value_strides[0] + kv_head * p.value_strides[1];
    int64_t begin = p.kv_length, end = 0;
    for (int64_t i = 0; i < count; ++i) {
      if (rows[i].begin < rows[i].end) {
        begin = std::min(begin, rows[i].begin);
        end = std::max(end, rows[i].end);
      }
    }
    for (int64_t key = begin; key < end; key += kKeyBlock) {
      add_block(batch, key, std::min(kKeyBlock, end - key), count, keys + key * p.key_strides[2],
                values + key * p.value_strides[2]);
    }
    write(batch, count, width);
  }

 private:
  void read_rows(int64_t batch, int64_t kv_head, int64_t start, int64_t count) {
    const int64_t group = p.query_heads / p.kv_heads;
    const int64_t offset = p.query_offsets ? p.query_offsets[batch] : p.query_offset;
    const int64_t starts = std::max<int64_t>(p.kv_starts ? p.kv_starts[batch] : 0, 0);
    const int64_t length = std::min(p.kv_lengths ? p.kv_lengths[batch] : p.kv_length, p.kv_length);
    const int64_t width = round_up(p.head_dim);
    for (int64_t i = 0; i < count; ++i) {
      Row& row = rows[i];
      row.query = (start + i) / group;
      row.head = kv_head * group + (start + i) % group;
      row.position = row.query + offset;
      row.begin = starts;
      row.end = length;
      if (p.window_left >= 0) {
        row.begin = std::max(row.begin, row.position - p.window_left);
      }
      if (p.is_causal) {
        row.end = std::min(row.end, row.position + 1);
      }
      if (p.window_right >= 0) {
        row.end = std::min(row.end, row.position + p.window_right + 1);
      }
      row.slope = p.alibi_slopes ? p.alibi_slopes[batch * p.alibi_strides[0] + row.head * p.alibi_strides[1]] : 0.0f;
      row.maximum = -kInfinity;
      row.total = 0.0f;
      const scalar_t* query = static_cast<const scalar_t*>(p.query) + batch * p.query_strides[0] +
                              row.head * p.query_strides[1] + row.query * p.query_strides[2];
      float* target = work.query + i * width;
      copy_tile(query, p.query_strides + 2, 1, p.head_dim, target);
      for (int64_t d = 0; d < width; d += kLanes) {
        store(target + d, load(target + d) * p.scale);
      }
    }
  }

  void add_block(int64_t batch, int64_t key, int64_t keys, int64_t count, const scalar_t* key_data,
                 const scalar_t* value_data) {
    int64_t first = count, last = 0;  // rows that see any key of this block
    for (int64_t i = 0; i < count; ++i) {
      Row& row = rows[i];
      row.first = std::clamp<int64_t>(row.begin - key, 0, keys);
      row.last = std::clamp<int64_t>(row.end - key, row.first, keys);
      if (row.first < row.last && p.mask && !read_mask(p, batch, row, key, work.bias + i * kKeyBlock)) {
        row.last = row.first;
      }
      if (row.first < row.last) {
        first = std::min(first, i);
        last = i + 1;
      }
    }
    if (first >= last) {
      return;
    }
    const int64_t rows_seen = last - first;
    const float* query = work.query + first * round_up(p.head_dim);
    float* scores = work.scores + first * kKeyBlock;
    with_tile(key_data, p.key_strides + 2, keys, p.head_dim, rows_seen, work.key,
              [&](auto tile) { compute_scores(query, rows_seen, round_up(p.head_dim), tile, keys, scores); });
    float rescale[kQueryBlock];
    for (int64_t i = first; i < last; ++i) {
      rescale[i] =
          soften(p, rows[i], key, keys, p.mask ? work.bias + i * kKeyBlock : nullptr, work.scores + i * kKeyBlock);
    }
    const int64_t width = round_up(p.value_dim);
    with_tile(value_data, p.value_strides + 2, keys, p.value_dim, rows_seen, work.value, [&](auto tile) {
      compute_out(scores, rows + first, rows_seen, tile, rescale + first, work.out + first * width, width);
    });
  }

  // Calls use with the keys or values of a block as they lie in memory where that is as fast, else with a float copy.
  template <typename Use>
  void with_tile(const scalar_t* data, const int64_t* strides, int64_t count, int64_t dim, int64_t rows_seen,
                 float* copy, Use use) {
    const bool direct = strides[1] == 1 && dim % kLanes == 0;
    if (direct && (std::is_same_v<scalar_t, float> || rows_seen <= kFewRows)) {
      use(Tile<scalar_t>{data, strides[0]});
    } else {
      copy_tile(data, strides, count, dim, copy);
      use(Tile<float>{copy, round_up(dim)});
    }
  }

  void write(int64_t batch, int64_t count, int64_t width) {
    for (int64_t i = 0; i < count; ++i) {
      const Row& row = rows[i];
      const int64_t index = (batch * p.query_heads + row.head) * p.query_length + row.query;
      scalar_t* target = static_cast<scalar_t*>(p.out) + index * p.value_dim;
      const float total = row.total == 0.0f ? 1.0f : row.total;  // nothing seen: the sums are 0 already
      for (int64_t d = 0; d < p.value_dim; ++d) {
        target[d] = static_cast<scalar_t>(work.out[i * width + d] / total);
      }
      p.lse[index] = row.total == 0.0f ? -kInfinity : row.maximum + std::log(row.total);
    }
  }

  const AttentionForwardParams& p;
  Workspace work;
  Row rows[kQueryBlock];
};

}  // namespace

int64_t attention_forward_workspace(const AttentionForwardParams& p) {
  return (kQueryBlock + kKeyBlock) * (round_up(p.head_dim) + round_up(p.value_dim)) + 2 * kQueryBlock * kKeyBlock;
}

template <typename scalar_t>
void attention_forward(const AttentionForwardParams& p, float* workspace, int64_t threads) {
  const int64_t group_rows = p.query_length * (p.query_heads / p.kv_heads);
  const int64_t blocks = (group_rows + kQueryBlock - 1) / kQueryBlock;
  const int64_t tasks = p.batch * p.kv_heads * blocks;
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) {
      Block<scalar_t> block(p, workspace + thread * attention_forward_workspace(p));
      for (int64_t task = tasks * thread / threads; task < tasks * (thread + 1) / threads; ++task) {
        // Late blocks see more keys under a causal mask: taking turns from both ends gives each thread equal work.
        const int64_t turn = task % blocks;
        const int64_t start = (turn % 2 ? blocks - 1 - turn / 2 : turn / 2) * kQueryBlock;
        const int64_t head = task / blocks;
        block.run(head / p.kv_heads, head % p.kv_heads, start, std::min(kQueryBlock, group_rows - start));
      }
    }
  });
}

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kLargest = int64_t{1} << 60;  // sums of two positions stay below 2^63

void check_index(const std::optional<Tensor>& index, const char* name, int64_t batch, bool limited) {
  if (!index) {
    return;
  }
  STD_TORCH_CHECK(index->is_cpu(), "expected ", name, " to be on the CPU");
  STD_TORCH_CHECK(index->scalar_type() == ScalarType::Long, "expected ", name, " to be int64, but its dtype is ",
                  name_of(index->scalar_type()));
  STD_TORCH_CHECK(index->dim() == 1 && index->size(0) == batch && index->is_contiguous(), "expected ", name,
                  " to be contiguous of shape (", batch, "), but its shape is ", shape_of(*index));
  for (int64_t i = 0; limited && i < batch; ++i) {
    const int64_t value = index->const_data_ptr<int64_t>()[i];
    STD_TORCH_CHECK(-kLargest <= value && value <= kLargest, "expected ", name, " to be at most 2^60, but it is ",
                    value);
  }
}

const int64_t* index_data(const std::optional<Tensor>& index) {
  return index ? index->const_data_ptr<int64_t>() : nullptr;
}

MaskKind mask_kind_of(const std::optional<Tensor>& mask) {
  if (!mask) {
    return MaskKind::none;
  }
  switch (mask->scalar_type()) {
    case ScalarType::Bool: return MaskKind::boolean;
    case ScalarType::Float: return MaskKind::float32;
    case ScalarType::BFloat16: return MaskKind::bfloat16;
    case ScalarType::Half: return MaskKind::float16;
    default:
      STD_TORCH_CHECK(false, "expected attn_mask to be bool, float32, bfloat16 or float16, but its dtype is ",
                      name_of(mask->scalar_type()));
  }
}

template <size_t kCount>
void copy_strides(const Tensor& tensor, int64_t (&strides)[kCount]) {
  std::copy_n(tensor.strides().data(), kCount, strides);
}

std::tuple<Tensor, Tensor> forward(const Tensor& query, const Tensor& key, const Tensor& value,
                                   const std::optional<Tensor>& attn_mask, bool is_causal, double scale,
                                   int64_t query_offset, const std::optional<Tensor>& query_offsets,
                                   const std::optional<Tensor>& kv_lengths, const std::optional<Tensor>& kv_starts,
                                   int64_t window_left, int64_t window_right, double softcap,
                                   const std::optional<Tensor>& alibi_slopes) {
  CHECK_CPU(query);
  CHECK_CPU(key);
  CHECK_CPU(value);
  CHECK_DIM(query, 4);
  CHECK_DIM(key, 4);
  CHECK_DIM(value, 4);
  CHECK_DTYPE(key, query.scalar_type());
  CHECK_DTYPE(value, query.scalar_type());

  AttentionForwardParams p{};
  p.batch = query.size(0);
  p.query_heads = query.size(1);
  p.query_length = query.size(2);
  p.head_dim = query.size(3);
  p.kv_heads = key.size(1);
  p.kv_length = key.size(2);
  p.value_dim = value.size(3);
  CHECK_SIZE(key, 0, p.batch);
  CHECK_SIZE(key, 3, p.head_dim);
  CHECK_SIZE(value, 0, p.batch);
  CHECK_SIZE(value, 1, p.kv_heads);
  CHECK_SIZE(value, 2, p.kv_length);
  STD_TORCH_CHECK(p.kv_heads > 0 ? p.query_heads % p.kv_heads == 0 : p.query_heads == 0,
                  "expected the heads of query to be a multiple of those of key, but they are ", p.query_heads, " and ",
                  p.kv_heads);
  STD_TORCH_CHECK(p.head_dim < kLargest >> 20 && p.value_dim < kLargest >> 20,
                  "expected the last dimension of query and value to be less than 2^40, but their shapes are ",
                  shape_of(query), " and ", shape_of(value));
  STD_TORCH_CHECK(-kLargest <= query_offset && query_offset <= kLargest,
                  "expected query_offset to be at most 2^60, but it is ", query_offset);
  STD_TORCH_CHECK(window_left >= -1, "expected window_left to be at least -1, but it is ", window_left);
  STD_TORCH_CHECK(window_right >= -1, "expected window_right to be at least -1, but it is ", window_right);
  check_index(query_offsets, "query_offsets", p.batch, true);
  check_index(kv_lengths, "kv_lengths", p.batch, false);
  check_index(kv_starts, "kv_starts", p.batch, false);
  p.mask_kind = mask_kind_of(attn_mask);
  if (attn_mask) {
    CHECK_CPU(*attn_mask);
    STD_TORCH_CHECK(attn_mask->dim() == 4 && attn_mask->size(0) == p.batch && attn_mask->size(1) == p.query_heads &&
                        attn_mask->size(2) == p.query_length && attn_mask->size(3) == p.kv_length,
                    "expected attn_mask to be expanded to shape (", p.batch, ", ", p.query_heads, ", ", p.query_length,
                    ", ", p.kv_length, "), but its shape is ", shape_of(*attn_mask));
    p.mask = attn_mask->const_data_ptr();
    copy_strides(*attn_mask, p.mask_strides);
  }
  if (alibi_slopes) {
    CHECK_CPU(*alibi_slopes);
    CHECK_DTYPE(*alibi_slopes, ScalarType::Float);
    STD_TORCH_CHECK(
        alibi_slopes->dim() == 2 && alibi_slopes->size(0) == p.batch && alibi_slopes->size(1) == p.query_heads,
        "expected alibi_slopes to be expanded to shape (", p.batch, ", ", p.query_heads, "), but its shape is ",
        shape_of(*alibi_slopes));
    p.alibi_slopes = alibi_slopes->const_data_ptr<float>();
    copy_strides(*alibi_slopes, p.alibi_strides);
  }
  copy_strides(query, p.query_strides);
  copy_strides(key, p.key_strides);
  copy_strides(value, p.value_strides);
  p.query = query.const_data_ptr();
  p.key = key.const_data_ptr();
  p.value = value.const_data_ptr();
  p.query_offsets = index_data(query_offsets);
  p.kv_lengths = index_data(kv_lengths);
  p.kv_starts = index_data(kv_starts);
  p.is_causal = is_causal;
  p.scale = static_cast<float>(scale);
  p.softcap = static_cast<float>(softcap);
  p.query_offset = query_offset;
  p.window_left = std::min(window_left, 2 * kLargest);
  p.window_right = std::min(window_right, 2 * kLargest);

  return DTYPE_SWITCH(query.scalar_type(), "query", scalar_t, [&] {
    const Tensor out =
        torch::stable::new_empty(query, {p.batch, p.query_heads, p.query_length, p.value_dim}, query.scalar_type());
    const Tensor lse = torch::stable::new_empty(query, {p.batch, p.query_heads, p.query_length}, ScalarType::Float);
    p.out = out.mutable_data_ptr();
    p.lse = lse.mutable_data_ptr<float>();
    if (lse.numel() > 0) {
      // A thread is worth waking for some ten microseconds of work.
      const double work = double(lse.numel()) * double(p.kv_length + 1) * double(p.head_dim + p.value_dim + 1);
      const int64_t threads = std::max<int64_t>(
          1, std::min<int64_t>(torch::stable::get_num_threads(), static_cast<int64_t>(std::min(work / 65536.0, 1e6))));
      const int64_t size = attention_forward_workspace(p);
      const Tensor workspace = torch::stable::new_empty(query, {threads, size}, ScalarType::Float);
      attention_forward<scalar_t>(p, workspace.mutable_data_ptr<float>(), threads);
    }
    return std::make_tuple(out, lse);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gpt4fast, CPU, m) {
  m.impl("attention_forward", TORCH_BOX(&forward));
}

}  // namespace gpt4fast::cpu
