// Transposed convolution with few output channels, which would leave most lanes of conv_transpose_kernel.cpp empty.
// Here lanes are pixels: one product of all taps' weights (taps * channels, input channels) and the inputs
// (input channels, pixels), whose rows are then added up where the taps overlap. Compiled once per CPU level.
#include "../conv_transpose.h"

#include <algorithm>
#include <utility>

#include "attention_pack.h"
#include "conv_transpose_few_plan.h"
#include "conv_transpose_write.h"
#include "with_element_type.h"

namespace gpt4fast::cpu::GPT4FAST_LEVEL {
namespace {

constexpr int64_t kSteps = 128;      // that are summed in one run
static_assert(kPanel == kKeyBlock);  // of pack_transposed

// (groups, taps, outputs, depth)
template <typename scalar_t>
void pack(const ConvTransposeParams& p, void* packed, int64_t thread, int64_t threads) {
  using T = Compute<scalar_t>;
  const FewLayout layout(p);
  const int64_t depth = padded_depth<T>(layout.inputs), rows = p.groups * layout.rows();
  for (int64_t row = rows * thread / threads; row < rows * (thread + 1) / threads; ++row) {
    const int64_t group = row / layout.rows(), tap = row % layout.rows() / layout.outputs;
    const auto* source = static_cast<const scalar_t*>(p.weight) + group * layout.inputs * p.weight_strides[0] +
                         row % layout.outputs * p.weight_strides[1] + tap_offset(p, tap);
    pack_row(source, p.weight_strides[0], layout.inputs, depth, static_cast<T*>(packed) + row * depth);
  }
}

template <typename scalar_t>
class Kernel {
  using T = Compute<scalar_t>;

 public:
  Kernel(const ConvTransposeParams& params, int64_t threads, const void* packed, void* memory)
      : p(params), plan(params, threads, memory), packed_(static_cast<const T*>(packed)) {}

  void run(int64_t thread, int64_t threads) {
    const int64_t tasks = plan.blocks.count() * p.groups;
    for (int64_t task = tasks * thread / threads; task < tasks * (thread + 1) / threads; ++task) {
      group_ = task % p.groups;
      begin(plan.blocks[task / p.groups]);
      multiply_inputs();
      with_activation(p.activation, [&](auto activation) { add_up(activation); });
    }
  }

 private:
  // What depends on the block's place in an image is kept for the next group, or image.
  void begin(const Block& outputs) {
    const bool is_like_last = std::equal(outputs.first + 1, outputs.first + 4, outputs_.first + 1) &&
                              std::equal(outputs.count + 1, outputs.count + 4, outputs_.count + 1);
    outputs_ = outputs;
    inputs_ = inputs_of(p, outputs);
    if (!is_like_last) {
      find_columns();
      find_meetings();
    }
  }

  void multiply_inputs() {
    const FewLayout& layout = plan.layout;
    const T* weight = packed_ + group_ * layout.rows() * plan.depth;
    const int64_t pixels = inputs_.size();
    for (int64_t first = 0; first < pixels; first += kPanel) {
      const int64_t count = least(kPanel, pixels - first), vectors = divide_up(count, kLanes);
      for_each_run(first, count, [&](const scalar_t* source, int64_t pixel, int64_t length) {
        copy_run(source, length, plan.panel + (pixel - first) * kDepth<T>);
      });
      const int64_t steps = plan.depth / kDepth<T>, parts = most<int64_t>(divide_up(steps, kSteps), 1);
      for (int64_t part = 0; part < parts; ++part) {
        const int64_t begin = steps * part / parts, length = steps * (part + 1) / parts - begin;
        const LeftOperand<T> left = {weight + begin * kDepth<T>, plan.depth, kDepth<T>};
        const RightOperand<T> right = {plan.panel + begin * kPanel * kDepth<T>, kPanel * kDepth<T>};
        if (part == 0) {
          multiply<false>(layout.rows(), left, right, length, vectors, plan.products + first, plan.pixels);
        } else {
          multiply<true>(layout.rows(), left, right, length, vectors, plan.products + first, plan.pixels);
        }
      }
    }
  }

  // Calls use(source, pixel, length) for pixels [first, first + count) of the block's inputs, in runs that lie at one
  // distance in memory.
  template <typename Use>
  void for_each_run(int64_t first, int64_t count, Use use) const {
    int64_t run = inputs_.count[3];
    if (run == p.in_size[2] && p.input_strides[3] == p.input_strides[4] * run) {
      run *= inputs_.count[2];
    }
    for (int64_t pixel = first; pixel < first + count;) {
      const int64_t length = least(run - pixel % run, first + count - pixel);
      const auto* source = static_cast<const scalar_t*>(p.input) + group_ * plan.layout.inputs * p.input_strides[1];
      int64_t rest = pixel;
      for (int axis = 3; axis >= 0; --axis) {
        source += (inputs_.first[axis] + rest % inputs_.count[axis]) * p.input_strides[axis == 0 ? 0 : axis + 1];
        rest /= inputs_.count[axis];
      }
      use(source, pixel, length);
      pixel += length;
    }
  }

  void copy_run(const scalar_t* source, int64_t count, T* target) {
    const int64_t channels = plan.layout.inputs;
    if (p.input_strides[4] != 1 || p.input_strides[1] == 1) {
      return pack_columns(Rows<scalar_t>{source, p.input_strides[4], p.input_strides[1], channels}, count, target);
    }
    for (int64_t c = 0; c < channels; c += kDepth<T>, target += kPanel * kDepth<T>) {
      const scalar_t* from = source + c * p.input_strides[1];
      for (int64_t i = 0; i < count; i += kLanes) {
        const int64_t left = count - i;
        const auto row = [&](int64_t channel) {
          const scalar_t* at = from + channel * p.input_strides[1] + i;
          return c + channel >= channels ? Vector{} : load_part(at, left);
        };
        if constexpr (kDepth<T> == 1) {
          store_part(target + i, row(0), left);
        } else if (left >= kLanes) {
          store_interleaved(target + i * kDepth<T>, row(0), row(1));
        } else {
          T pairs[kLanes * kDepth<T>];
          store_interleaved(pairs, row(0), row(1));
          std::memcpy(target + i * kDepth<T>, pairs, static_cast<size_t>(left * kDepth<T>) * sizeof(T));
        }
      }
    }
  }

  // The same for pixels whose channels are neighbours. Only whole panels are transposed in place.
  void pack_columns(Rows<scalar_t> pixels, int64_t count, T* target) {
    for (int64_t i = 0; i < count; i += kLanes) {
      const int64_t part = least(kLanes, count - i);
      Rows<scalar_t> some = pixels;
      some.data += i * pixels.row_stride;
      if (part == kLanes) {
        pack_transposed(some, part, target + i * kDepth<T>);
        continue;
      }
      for (int64_t j = 0; j < part; ++j) {
        const scalar_t* from = some.data + j * pixels.row_stride;
        for (int64_t c = 0; c < plan.depth; c += kDepth<T>) {
          pack_row(from + c * pixels.stride, pixels.stride, least(kDepth<T>, pixels.columns - c), kDepth<T>,
                   target + (c / kDepth<T> * kPanel + i + j) * kDepth<T>);
        }
      }
    }
  }

  // Sorts the columns of taps by the phase that they reach.
  void find_columns() {
    const int64_t stride = p.stride[2];
    int64_t count = 0;
    for (int64_t phase = 0; phase < plan.phases; ++phase) {
      plan.first_columns[phase] = count;
      for (int64_t tap = 0; tap < p.kernel[2]; ++tap) {
        const Reached reached = reached_by(p, outputs_, inputs_, 2, tap);
        if (reached.count > 0 && reached.out % stride == phase) {
          plan.columns[count++] = {tap, reached.out / stride, reached.count, reached.in};
        }
      }
    }
    plan.first_columns[plan.phases] = count;
  }

  void find_meetings() {
    std::fill_n(plan.meetings, outputs_.count[2], 0);
    for (int64_t tap = 0; tap < p.kernel[1]; ++tap) {
      const Reached reached = reached_by(p, outputs_, inputs_, 1, tap);
      for (int64_t i = 0; i < reached.count; ++i) {
        const int64_t row = reached.out + i * reached.out_step;
        plan.meeting[row * p.kernel[1] + plan.meetings[row]++] = {tap, reached.in + i};
      }
    }
  }

  template <typename Activation>
  void add_up(Activation activation) {
    const int64_t outputs = plan.layout.outputs, image_size = p.out_size[0] * p.out_size[1] * p.out_size[2];
    for (int64_t image = 0; image < outputs_.count[0]; ++image) {
      for (int64_t d = 0; d < outputs_.count[1]; ++d) {
        for (int64_t h = 0; h < outputs_.count[2]; ++h) {
          const int64_t rows = find_tap_rows(image, d, h);
          for (int64_t c = 0; c < outputs; ++c) {
            add_line(rows, c, activation);
          }
          const int64_t position =
              ((outputs_.first[1] + d) * p.out_size[1] + outputs_.first[2] + h) * p.out_size[2] + outputs_.first[3];
          write_lines((outputs_.first[0] + image) * image_size, position, image_size);
        }
      }
    }
  }

  int64_t find_tap_rows(int64_t image, int64_t d, int64_t h) {
    TapRow* row = plan.tap_rows;
    const MeetingRow* meeting = plan.meeting + h * p.kernel[1];
    for (int64_t i = 0; i < p.kernel[0]; ++i) {
      const int64_t in_d = input_of(0, i, d);
      for (int64_t j = 0; in_d >= 0 && j < plan.meetings[h]; ++j) {
        const int64_t line = (image * inputs_.count[1] + in_d) * inputs_.count[2] + meeting[j].input;
        *row++ = {(i * p.kernel[1] + meeting[j].tap) * p.kernel[2], plan.products + line * inputs_.count[3]};
      }
    }
    return row - plan.tap_rows;
  }

  // The input, counted from the block's first, that meets one output of the block by one tap; or -1.
  int64_t input_of(int axis, int64_t tap, int64_t output) const {
    const int64_t at = outputs_.first[axis + 1] + output + p.padding[axis] - tap * p.dilation[axis];
    const int64_t input = at / p.stride[axis];
    return at < 0 || at % p.stride[axis] != 0 || input >= p.in_size[axis] ? -1 : input - inputs_.first[axis + 1];
  }

  // One channel's outputs of a line.
  template <typename Activation>
  void add_line(int64_t rows, int64_t c, Activation activation) {
    const int64_t channel = group_ * plan.layout.outputs + c, stride = p.stride[2], count = outputs_.count[3];
    const Vector scale = broadcast(p.scale[channel]), offset = broadcast(p.offset[channel]);
    float* line = plan.lines + c * plan.line_length;
    for (int64_t i = 0; i * stride < count; i += kLanes) {
      Vector even = {};
      for (int64_t phase = 0; phase < plan.phases; ++phase) {
        const Vector sums = add_phase(rows, c, phase, i);
        const Vector value = activation(multiply_add(sums, scale, offset), p.negative_slope);
        if (stride == 1) {
          store(line + i, value);
        } else if (stride == 2 && phase == 0) {
          even = value;
        } else if (stride == 2) {
          Vector low, high;
          interleave(even, value, low, high);
          store(line + 2 * i, low);
          store(line + 2 * i + kLanes, high);
        } else {
          float values[kLanes];
          store(values, value);
          for (int64_t j = 0; j < kLanes; ++j) {
            line[(i + j) * plan.phases + phase] = values[j];
          }
        }
      }
    }
  }

  // Outputs [start, start + kLanes) of one phase of a line.
  [[gnu::always_inline]] Vector add_phase(int64_t rows, int64_t c, int64_t phase, int64_t start) const {
    Vector sums = {};
    for (int64_t row = 0; row < rows; ++row) {
      const TapRow& taps = plan.tap_rows[row];
      for (int64_t k = plan.first_columns[phase]; k < plan.first_columns[phase + 1]; ++k) {
        const Column& column = plan.columns[k];
        const int64_t from = start - column.first;
        if (from + kLanes <= 0 || from >= column.count) {
          continue;
        }
        const int64_t tap = taps.tap + column.tap;
        const float* addends = taps.inputs + column.input + from;
        const Vector more = sums + load(addends + (tap * plan.layout.outputs + c) * plan.pixels);
        const bool whole = from >= 0 && from + kLanes <= column.count;
        sums = whole ? more : select(lanes_between(-from, column.count - from), more, sums);
      }
    }
    return sums;
  }

  void write_lines(int64_t image, int64_t position, int64_t image_size) {
    const int64_t outputs = plan.layout.outputs, count = outputs_.count[3];
    auto* out = static_cast<scalar_t*>(p.out) + image * p.out_channels;
    for (int64_t c = 0; c < outputs; ++c) {
      const float* line = plan.lines + c * plan.line_length;
      const int64_t channel = group_ * outputs + c;
      for (int64_t i = 0; i < count; i += kLanes) {
        if (!p.channels_last) {
          store_part(out + channel * image_size + position + i, load(line + i), count - i);
          continue;
        }
        scalar_t values[kLanes];
        store(values, load(line + i));
        for (int64_t j = 0; j < least(kLanes, count - i); ++j) {
          out[(position + i + j) * p.out_channels + channel] = values[j];
        }
      }
    }
  }

  const ConvTransposeParams& p;
  FewPlan<scalar_t> plan;
  const T* packed_;
  int64_t group_;
  Block outputs_ = {{0, -1, 0, 0}, {}}, inputs_;  // of no place yet
};

int64_t packed_bytes(const ConvTransposeParams& p) {
  return with_element_type(p.dtype, [&](auto type) {
    using T = Compute<decltype(type)>;
    const FewLayout layout(p);
    return p.groups * layout.rows() * padded_depth<T>(layout.inputs) * static_cast<int64_t>(sizeof(T));
  });
}

void pack(const ConvTransposeParams& p, void* packed, int64_t thread, int64_t threads) {
  with_element_type(p.dtype, [&](auto type) { pack<decltype(type)>(p, packed, thread, threads); });
}

int64_t workspace(const ConvTransposeParams& p, int64_t threads) {
  return with_element_type(p.dtype, [&](auto type) { return FewPlan<decltype(type)>(p, threads, nullptr).bytes; });
}

void run(const ConvTransposeParams& p, const void* packed, void* memory, int64_t thread, int64_t threads) {
  with_element_type(p.dtype,
                    [&](auto type) { Kernel<decltype(type)>(p, threads, packed, memory).run(thread, threads); });
}

}  // namespace

extern const ConvTransposeKernel conv_transpose_few_kernel = {packed_bytes, pack, workspace, run};

}  // namespace gpt4fast::cpu::GPT4FAST_LEVEL
