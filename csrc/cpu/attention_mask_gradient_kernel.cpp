// The gradient of a float mask that is added to attention's scores: that of the scores, summed where the mask is
// broadcast. A task owns one tile of it and computes what all heads and rows put in, so nothing as large as the scores
// is ever stored. Compiled once per CPU level.
#include "attention_backward_scores.h"

namespace gpt4fast::cpu::GPT4FAST_LEVEL {
namespace {

template <typename scalar_t>
class Kernel : ScoreGradients<scalar_t> {
  using Base = ScoreGradients<scalar_t>;
  using Base::count, Base::p, Base::rows;
  using typename Base::T;

 public:
  Kernel(const AttentionBackwardParams& params, Scratch&& scratch)
      : Base(params, scratch), has_row_(params.grad_mask_strides[2] != 0), has_key_(params.grad_mask_strides[3] != 0) {
    scratch.take(sums_, kBackwardBlockRows * kKeyBlock);
    scratch.take(errors_, kBackwardBlockRows * kKeyBlock);
    bytes = scratch.bytes;
  }

  int64_t bytes;

  void run(const MaskGradientTask& task) {
    const int64_t group = p.query_heads / most<int64_t>(p.kv_heads, 1);
    const Range batch = p.grad_mask_strides[0] != 0 ? Range{task.batch, task.batch + 1} : Range{0, p.batch};
    const Range heads = p.grad_mask_strides[1] != 0 ? Range{task.head, task.head + 1} : Range{0, p.query_heads};
    clear(sums_, kBackwardBlockRows * kKeyBlock);
    clear(errors_, kBackwardBlockRows * kKeyBlock);
    for (int64_t b = batch.first; b < batch.last; ++b) {
      for (int64_t head = heads.first; head < heads.last; ++head) {
        this->begin_head(Sequence(p, b), head / group);
        for (int64_t query = task.first_query; query < task.last_query; query += kBlockRows<T>) {
          this->begin_rows(query * group + head % group, group, least(kBlockRows<T>, task.last_query - query));
          const Range seen = visible_tiles(rows, count);
          for (int64_t tile = most(seen.first, task.first_tile); tile < least(seen.last, task.last_tile); ++tile) {
            this->pack_tile(tile);
            add_tile(tile, query - task.first_query);
          }
        }
      }
    }
    write(task);
  }

 private:
  void add_tile(int64_t tile, int64_t start) {
    for (int64_t first = 0, number; first < count; first += number) {
      number = this->rows_together(tile, first);
      this->template score_rows<true, true>(tile, first, number,
                                            [&](int64_t row, int64_t k, const Vector*, const Vector* grads) {
                                              for (int64_t i = 0; i < kDepth<T>; ++i) {
                                                add(start + row + i, k, grads[i]);
                                              }
                                            });
    }
  }

  // Sums over many heads and rows carry the exact rounding errors of their additions along (Knuth's TwoSum): torch adds
  // up in a tree.
  void add(int64_t row, int64_t k, Vector grads) {
    const int64_t at = (has_row_ ? row : 0) * kKeyBlock + (has_key_ ? k : 0);
    const Vector old = load(sums_ + at), sum = old + grads, added = sum - old;
    store(sums_ + at, sum);
    store(errors_ + at, load(errors_ + at) + ((old - (sum - added)) + (grads - added)));
  }

  void write(const MaskGradientTask& task) {
    const int64_t (&strides)[4] = p.grad_mask_strides;
    const int64_t key = task.first_tile * kKeyBlock, keys = least(kKeyBlock, p.kv_length - key);
    for (int64_t query = task.first_query; query < (has_row_ ? task.last_query : task.first_query + 1); ++query) {
      float* target = p.grad_mask + task.batch * strides[0] + task.head * strides[1] + query * strides[2];
      float* sums = sums_ + (query - task.first_query) * kKeyBlock;
      const float* errors = errors_ + (query - task.first_query) * kKeyBlock;
      for (int64_t k = 0; k < kKeyBlock; k += kLanes) {
        store(sums + k, load(sums + k) + load(errors + k));
      }
      if (has_key_) {
        write_row(sums, 1.0f, keys, target + key * strides[3], strides[3]);
      } else {
        *target = sum(load(sums));
      }
    }
  }

  const bool has_row_, has_key_;  // else the mask is broadcast along that axis
  float* sums_;                   // (kBackwardBlockRows, kKeyBlock); without a key axis the first vector of each row
  float* errors_;                 // of the sums
};

int64_t workspace_bytes(const AttentionBackwardParams& p) {
  return with_element_type(p.dtype, [&](auto type) { return Kernel<decltype(type)>(p, Scratch(nullptr)).bytes; });
}

void run(const AttentionBackwardParams& p, const MaskGradientTask& task, void* workspace) {
  with_element_type(p.dtype, [&](auto type) { Kernel<decltype(type)>(p, Scratch(workspace)).run(task); });
}

}  // namespace

extern const MaskGradientKernel mask_gradient_kernel = {workspace_bytes, run};

}  // namespace gpt4fast::cpu::GPT4FAST_LEVEL
