// Transposed convolution on the CPU as products of pixels, without an im2col buffer: each tap of the kernel multiplies
// the inputs that it reads by its (channels, output channels) matrix and adds the result to the outputs that it
// reaches. No product with an inserted zero or with padding is ever formed, whatever the stride and the dilation. A
// task is a block of outputs for as many output channels as a tile of registers holds. The same loops, with the grids'
// roles exchanged, compute the convolution that is the gradient of the input. Compiled once per CPU level.
#include "../conv_transpose.h"

#include <type_traits>
#include <utility>

#include "conv_transpose_blocks.h"
#include "conv_transpose_inputs.h"
#include "conv_transpose_weight.h"
#include "conv_transpose_write.h"
#include "placed_product.h"
#include "scratch.h"
#include "with_element_type.h"

namespace gpt4fast::cpu::GPT4FAST_LEVEL {
namespace {

constexpr int64_t kMostOutputs = 512;           // of a block, whose sums then take 128 KiB of L2
constexpr int64_t kMostInputBytes = 384 << 10;  // of a block's inputs, in L2 too
constexpr int64_t kSteps = 128;                 // of a product whose right operand stays in L1: 32 KiB

template <typename T>
WeightLayout<T> layout_of(const ConvTransposeParams& p) {
  return WeightLayout<T>(p, taps_of(p));
}

template <typename scalar_t>
void pack_block(const ConvTransposeParams& p, const WeightLayout<Compute<scalar_t>>& layout, int64_t group,
                int64_t block, Compute<scalar_t>* target) {
  using T = Compute<scalar_t>;
  for_each_weight_vector<scalar_t>(
      p, layout, group, block, [&](int64_t c, int64_t lane, const scalar_t* from, int64_t lanes) {
        for (int64_t tap = 0; tap < layout.matrices; tap += kLanes) {
          const int64_t taps = least(kLanes, layout.matrices - tap);
          Vector rows[kDepth<T>][kLanes] = {};
          for (int64_t i = 0; i < kDepth<T> && c + i < layout.group_inputs; ++i) {
            read_taps(p, from + i * p.weight_strides[0], tap, taps, lanes, rows[i]);
          }
          for (int64_t j = 0; j < taps; ++j) {
            T* to = target + ((tap + j) * layout.depth + c) * layout.width + lane * kDepth<T>;
            if constexpr (kDepth<T> == 1) {
              store(to, rows[0][j]);
            } else {
              store_interleaved(to, rows[0][j], rows[1][j]);
            }
          }
        }
      });
}

template <typename scalar_t>
void pack(const ConvTransposeParams& p, void* packed, int64_t thread, int64_t threads) {
  const auto layout = layout_of<Compute<scalar_t>>(p);
  pack_share(p, layout, packed, thread, threads, [&](int64_t group, int64_t block, auto* target) {
    pack_block<scalar_t>(p, layout, group, block, target);
  });
}

// How a call is cut, and what a thread needs for it.
template <typename scalar_t>
struct Plan : Scratch {
  using T = Compute<scalar_t>;

  WeightLayout<T> layout;
  bool in_place;  // the input is read as it lies
  bool by_taps;   // otherwise each tap's inputs are copied by themselves, since a block's would be many more
  Blocks blocks;
  T* inputs;         // (images, D, H, W, groups, depth), by taps of one group
  float* sums;       // (block, width)
  RowPlace* places;  // (block)
  float* lines;      // (kLanes, line_step of the block)

  Plan(const ConvTransposeParams& p, int64_t threads, void* memory)
      : Scratch(memory),
        layout(layout_of<T>(p)),
        in_place(std::is_same_v<T, scalar_t> && p.input_strides[1] == 1 && layout.depth == layout.group_inputs),
        by_taps(false),
        blocks(p, kMostOutputs) {
    const int64_t columns = p.groups * layout.blocks;
    const int64_t work = p.batch * p.out_size[0] * p.out_size[1] * p.out_size[2] * columns;
    const auto is_uneven = [&] {  // a thread may have a tenth more to do than its share
      const int64_t most_tasks = divide_up(blocks.count() * columns, threads);
      return most_tasks * blocks.largest().size() * threads * 10 > work * 11;
    };
    const auto copied = [&] {
      const int64_t pixels = by_taps ? blocks.most_inputs_of_tap() : p.groups * blocks.most_inputs();
      return in_place ? 0 : pixels * layout.depth;
    };
    const auto are_many = [&] { return copied() * static_cast<int64_t>(sizeof(T)) > kMostInputBytes; };
    const auto cut = [&] {
      blocks = Blocks(p, kMostOutputs);
      for (int64_t outputs = kMostOutputs; outputs > 16 && (are_many() || (outputs > 64 && is_uneven()));) {
        outputs /= 2;
        blocks = Blocks(p, outputs);
      }
    };
    cut();
    by_taps = are_many() && blocks.most_inputs() > layout.matrices * blocks.most_inputs_of_tap();
    if (by_taps) {
      cut();
    }
    const int64_t outputs = blocks.largest().size();
    take(inputs, copied());
    take(sums, outputs * layout.width);
    take(places, outputs);
    take(lines, p.channels_last ? 0 : kLanes * line_step(blocks.largest()));
  }
};

template <typename scalar_t>
class Kernel {
  using T = Compute<scalar_t>;

 public:
  Kernel(const ConvTransposeParams& params, int64_t threads, const void* packed, void* memory)
      : p(params), plan(params, threads, memory), packed_(static_cast<const T*>(packed)) {}

  void run(int64_t thread, int64_t threads) {
    for_each_task(
        plan.blocks, p.groups, plan.layout.blocks, thread, threads, [&](const Block& outputs) { begin(outputs); },
        [&](int64_t group, int64_t block) { compute(group, block); });
  }

 private:
  void begin(const Block& outputs) {
    outputs_ = outputs;
    inputs_ = inputs_of(p, outputs);
    if (plan.in_place) {
      input_ = static_cast<const T*>(p.input);
      for (int axis = 0; axis < 4; ++axis) {
        strides_[axis] = p.input_strides[axis == 0 ? 0 : axis + 1];
        input_ += inputs_.first[axis] * strides_[axis];
      }
      return;
    }
    input_ = plan.inputs;
    if (!plan.by_taps) {
      copy_inputs(inputs_, 0, p.groups);
    }
  }

  // Brings inputs of some groups into the order (images, D, H, W, channels).
  void copy_inputs(const Block& inputs, int64_t first_group, int64_t groups) {
    strides_[3] = groups * plan.layout.depth;
    for (int axis = 2; axis >= 0; --axis) {
      strides_[axis] = strides_[axis + 1] * inputs.count[axis + 1];
    }
    const auto* input = static_cast<const scalar_t*>(p.input);
    for_each_run(inputs, p.in_size, p.input_strides, [&](int64_t offset, int64_t pixel, int64_t count) {
      for (int64_t group = 0; group < groups; ++group) {
        T* target = plan.inputs + pixel * strides_[3] + group * plan.layout.depth;
        copy_pixels<T>(p, input + offset + (first_group + group) * plan.layout.group_inputs * p.input_strides[1], count,
                       plan.layout.group_inputs, plan.layout.depth,
                       [&](int64_t i) { return target + i * strides_[3]; });
      }
    });
  }

  // find_places for a copy of what one tap multiplies.
  [[gnu::noinline]] int64_t find_copied_places(int64_t group, Reached depths, Reached rows, Reached columns) {
    Reached* const reached[3] = {&depths, &rows, &columns};
    Block inputs = inputs_;
    for (int axis = 0; axis < 3; ++axis) {
      Reached& along = *reached[axis];
      inputs.first[axis + 1] += along.in;
      inputs.count[axis + 1] = along.count == 0 ? 0 : (along.count - 1) * along.in_step + 1;
      along.in = 0;
    }
    copy_inputs(inputs, group, 1);
    return find_places(depths, rows, columns);
  }

  // Inlined by GCC 12 it takes 1.7 times as long for 16 channels in bfloat16.
  [[gnu::noinline]] void compute(int64_t group, int64_t block) {
    const WeightLayout<T>& layout = plan.layout;
    std::memset(plan.sums, 0, static_cast<size_t>(outputs_.size() * layout.width) * sizeof(float));
    const T* weight = packed_ + (group * layout.blocks + block) * layout.block_size();
    const T* input = input_ + group * (plan.in_place ? layout.group_inputs : plan.by_taps ? 0 : layout.depth);
    for (int64_t d = 0; d < p.kernel[0]; ++d) {
      const Reached depths = reached_by(p, outputs_, inputs_, 0, d);
      for (int64_t h = 0; h < p.kernel[1]; ++h) {
        const Reached rows = reached_by(p, outputs_, inputs_, 1, h);
        for (int64_t w = 0; w < p.kernel[2]; ++w, weight += layout.depth * layout.width) {
          const Reached columns = reached_by(p, outputs_, inputs_, 2, w);
          const int64_t count =
              plan.by_taps ? find_copied_places(group, depths, rows, columns) : find_places(depths, rows, columns);
          const int64_t steps = layout.depth / kDepth<T>, parts = most(divide_up(steps, kSteps), fewest_parts_);
          for (int64_t part = 0; part < parts; ++part) {
            const int64_t first = steps * part / parts, last = steps * (part + 1) / parts;
            add_product(layout.width / kLanes, count, input + first * kDepth<T>, plan.places,
                        weight + first * layout.width * kDepth<T>, last - first, plan.sums);
          }
        }
      }
    }
    write_outputs<scalar_t>(p, outputs_, plan.sums, layout.width, group * layout.group_outputs + block * layout.width,
                            layout.channels(block), plan.lines);
  }

  // Lists the pairs of an input and an output that one tap connects.
  int64_t find_places(const Reached& depths, const Reached& rows, const Reached& columns) {
    const int64_t width = plan.layout.width;
    RowPlace* place = plan.places;
    for (int64_t image = 0; image < outputs_.count[0]; ++image) {
      for (int64_t i = 0; i < depths.count; ++i) {
        for (int64_t j = 0; j < rows.count; ++j) {
          const int64_t line = (image * outputs_.count[1] + depths.out + i * depths.out_step) * outputs_.count[2] +
                               rows.out + j * rows.out_step;
          RowPlace next = {image * strides_[0] + (depths.in + i * depths.in_step) * strides_[1] +
                               (rows.in + j * rows.in_step) * strides_[2] + columns.in * strides_[3],
                           (line * outputs_.count[3] + columns.out) * width};
          for (int64_t k = 0; k < columns.count; ++k) {
            *place++ = next;
            next.left += columns.in_step * strides_[3];
            next.sums += columns.out_step * width;
          }
        }
      }
    }
    return place - plan.places;
  }

  const ConvTransposeParams& p;
  Plan<scalar_t> plan;
  const T* packed_;
  // Of the sum over channels. Torch adds in two runs at least: one alone errs by up to 2.4 times as much.
  const int64_t fewest_parts_ = has_one_tap(p) && plan.layout.depth > 64 ? 2 : 1;
  Block outputs_, inputs_;
  const T* input_;      // of the block's first pixel
  int64_t strides_[4];  // between pixels: image, D, H, W
};

int64_t packed_bytes(const ConvTransposeParams& p) {
  return with_element_type(p.dtype, [&](auto type) {
    using T = Compute<decltype(type)>;
    const auto layout = layout_of<T>(p);
    return p.groups * layout.blocks * layout.block_size() * static_cast<int64_t>(sizeof(T));
  });
}

void pack(const ConvTransposeParams& p, void* packed, int64_t thread, int64_t threads) {
  with_element_type(p.dtype, [&](auto type) { pack<decltype(type)>(p, packed, thread, threads); });
}

int64_t workspace(const ConvTransposeParams& p, int64_t threads) {
  return with_element_type(p.dtype, [&](auto type) { return Plan<decltype(type)>(p, threads, nullptr).bytes; });
}

void run(const ConvTransposeParams& p, const void* packed, void* memory, int64_t thread, int64_t threads) {
  with_element_type(p.dtype,
                    [&](auto type) { Kernel<decltype(type)>(p, threads, packed, memory).run(thread, threads); });
}

}  // namespace

extern const ConvTransposeKernel conv_transpose_kernel = {packed_bytes, pack, workspace, run};

}  // namespace gpt4fast::cpu::GPT4FAST_LEVEL
