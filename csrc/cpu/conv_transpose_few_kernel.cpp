// Transposed convolution with few output channels, which would leave most lanes of conv_transpose_kernel.cpp empty.
// Here lanes are pixels. Outputs that are equal modulo the stride are reached by the same taps, so that neighbours
// among them are sums of one weight times neighbouring inputs; they stay in registers over all channels and taps. A
// block's inputs are copied into planes with zeros around them, where every tap is a shift. The weight must be finite:
// zero times infinity is NaN. Compiled once per CPU level.
#include "../conv_transpose.h"

#include <algorithm>

#include "attention_pack.h"
#include "conv_transpose_few_plan.h"
#include "conv_transpose_inputs.h"
#include "conv_transpose_prefetch.h"
#include "vector_activation.h"
#include "with_constant.h"
#include "with_element_type.h"

namespace gpt4fast::cpu::GPT4FAST_LEVEL {
namespace {

// (groups, kernel D * H, depth / kDepth, kernel W, outputs, kDepth)
template <typename scalar_t>
void pack(const ConvTransposeParams& p, void* packed, int64_t thread, int64_t threads) {
  using T = Compute<scalar_t>;
  const FewLayout layout(p);
  const int64_t columns = p.kernel[2], rows = layout.taps / columns, matrices = p.groups * rows;
  const int64_t depth = padded_depth<T>(layout.inputs), outputs = layout.outputs;
  for (int64_t matrix = matrices * thread / threads; matrix < matrices * (thread + 1) / threads; ++matrix) {
    const auto* source = static_cast<const scalar_t*>(p.weight) + matrix / rows * layout.inputs * p.weight_strides[0] +
                         tap_offset(p, matrix % rows * columns);
    T* target = static_cast<T*>(packed) + matrix * depth * columns * outputs;
    for (int64_t c = 0; c < depth; c += kDepth<T>) {
      for (int64_t i = 0; i < columns * outputs; ++i, target += kDepth<T>) {
        pack_row(
            source + c * p.weight_strides[0] + i % outputs * p.weight_strides[1] + i / outputs * p.weight_strides[4],
            p.weight_strides[0], least(kDepth<T>, layout.inputs - c), kDepth<T>, target);
      }
    }
  }
}

// Neighbouring taps of a row that are multiplied together: an input is loaded once for all that meet it. Tap i is in
// the list's tap's place less i.
struct OneTap {
  static constexpr int kTaps = 1, kShifts = 1, kPhases = 1;
  static constexpr int shift(int) { return 0; }
  static constexpr int phase(int) { return 0; }
};

// Kernel 4, stride 2 and an odd padding, which most networks have.
struct FourTaps {
  static constexpr int kTaps = 4, kShifts = 3, kPhases = 2;
  static constexpr int shift(int tap) { return (tap + 1) / 2; }
  static constexpr int phase(int tap) { return tap % 2; }
};

// sums (Together::kPhases, kOutputs, ...) = or, with add, += the taps' products, for so many vectors of pixels.
template <typename Together, int kOutputs, int kVectors, typename T>
void add_taps(const Tap* taps, int64_t count, FewOperand<T> input, FewOperand<T> weight, int64_t steps, bool add,
              float* sums, int64_t phase_step, int64_t output_step) {
  Vector total[Together::kPhases][kOutputs][kVectors] = {};
  for (int64_t i = 0; i < count; ++i) {
    const T *from = input.data + taps[i].input, *by = weight.data + taps[i].weight;
    for (int64_t step = 0; step < steps; ++step, from += input.step, by += weight.step) {
#pragma GCC unroll 4
      for (int shift = 0; shift < Together::kShifts; ++shift) {
        decltype(Product<T>::load(nullptr)) pixels[kVectors];
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          pixels[v] = Product<T>::load(from + (shift + v * kLanes) * kDepth<T>);
          keep_in_register(pixels[v]);  // most lie across two cache lines: 1.5 times as fast
        }
#pragma GCC unroll 4
        for (int tap = 0; tap < Together::kTaps; ++tap) {
          if (Together::shift(tap) != shift) {
            continue;
          }
#pragma GCC unroll 4
          for (int output = 0; output < kOutputs; ++output) {
            const auto value = Product<T>::broadcast(by + (output - tap * kOutputs) * kDepth<T>);
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v) {
              Vector& sum = total[Together::phase(tap)][output][v];
              sum = Product<T>::add(value, pixels[v], sum);
            }
          }
        }
      }
    }
  }
#pragma GCC unroll 4
  for (int phase = 0; phase < Together::kPhases; ++phase) {
#pragma GCC unroll 4
    for (int output = 0; output < kOutputs; ++output) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        float* to = sums + phase * phase_step + output * output_step + v * kLanes;
        store(to, add ? load(to) + total[phase][output][v] : total[phase][output][v]);
      }
    }
  }
}

template <typename scalar_t>
class Kernel {
  using T = Compute<scalar_t>;

 public:
  Kernel(const ConvTransposeParams& params, int64_t threads, const void* packed, void* memory)
      : p(params), plan(params, threads, memory), packed_(static_cast<const T*>(packed)) {
    plan.find_taps(p);
  }

  void run(int64_t thread, int64_t threads) {
    const int64_t tasks = plan.blocks.count() * p.groups, last = tasks * (thread + 1) / threads;
    for (int64_t task = tasks * thread / threads; task < last; ++task) {
      group_ = task % p.groups;
      outputs_ = plan.blocks[task / p.groups];
      for (int64_t image = 0; image < outputs_.count[0]; ++image) {
        copy_inputs(outputs_.first[0] + image);
        begin_prefetch(task, last, image);
        with_constant<1, 4>(plan.layout.outputs, [&](auto outputs) { compute<outputs()>(image); });
      }
    }
  }

 private:
  // Rows of the planes that one of the inputs fills: zeros, `given` pixels and zeros up to count.
  struct Row {
    int64_t before, given, count;
  };

  // In the order of memory, which processors prefetch.
  void copy_inputs(int64_t image) {
    int64_t first[3], count[3];
    for (int axis = 0; axis < 3; ++axis) {
      const FewAxis& at = plan.axes[axis];
      first[axis] = outputs_.first[axis + 1] / at.stride + at.first_shift;
      count[axis] = at.inputs(outputs_.count[axis + 1]);
    }
    Row columns = {least(most<int64_t>(-first[2], 0), count[2]), 0, count[2]};
    columns.given = most<int64_t>(least(first[2] + count[2], p.in_size[2]) - first[2] - columns.before, 0);
    const int64_t channels = plan.layout.inputs, planes = plan.depth / kDepth<T>, step = plan.pitch * kDepth<T>;
    const auto* input = static_cast<const scalar_t*>(p.input) + image * p.input_strides[0] +
                        group_ * channels * p.input_strides[1] + (first[2] + columns.before) * p.input_strides[4];
    const auto for_each_row = [&](auto use) {
      for (int64_t i = 0; i < count[0]; ++i) {
        for (int64_t j = 0; j < count[1]; ++j) {
          const int64_t d = first[0] + i, h = first[1] + j;
          Row row = columns;
          if (d < 0 || d >= p.in_size[0] || h < 0 || h >= p.in_size[1]) {
            row.before = row.given = 0;
          }
          use(row, d * p.input_strides[2] + h * p.input_strides[3],
              plan.planes + (i * plan.size[1] + j) * plan.size[2] * kDepth<T>);
        }
      }
    };
    if (has_planes(p)) {
      for (int64_t plane = 0; plane < planes; ++plane) {
        const scalar_t* channel = input + plane * kDepth<T> * p.input_strides[1];
        const bool is_single = (plane + 1) * kDepth<T> > channels;
        for_each_row([&](Row row, int64_t offset, T* target) {
          copy_row(row, channel + offset, is_single, target + plane * step);
        });
      }
      return;
    }
    for_each_row([&](Row row, int64_t offset, T* target) {
      for (int64_t plane = 0; plane < planes; ++plane) {
        fill_zeros(0, row.before, target + plane * step);
        fill_zeros(row.before + row.given, row.count, target + plane * step);
      }
      if (row.given > 0) {
        const Rows<scalar_t> pixels = {input + offset, p.input_strides[4], p.input_strides[1], channels};
        pack_transposed(pixels, row.given, target + row.before * kDepth<T>, step);
      }
    });
  }

  // Of kDepth channels, or of the last alone. In whole vectors: what stands behind is written later, or means nothing.
  void copy_row(Row row, const scalar_t* source, bool is_single, T* target) const {
    fill_zeros(0, row.before, target);
    for (int64_t i = 0; i < row.given; i += kLanes) {
      const Vector pixels = load_part(source + i, row.given - i);
      T* to = target + (row.before + i) * kDepth<T>;
      if constexpr (kDepth<T> == 1) {
        store(to, pixels);
      } else {
        const scalar_t* next = source + p.input_strides[1] + i;
        store_interleaved(to, pixels, is_single ? Vector{} : load_part(next, row.given - i));
      }
    }
    fill_zeros(row.before + round_up(row.given, kLanes), row.count, target);
  }

  static void fill_zeros(int64_t first, int64_t last, T* row) {
    for (int64_t i = first; i < last; i += kLanes) {
      std::memset(row + i * kDepth<T>, 0, kLanes * kDepth<T> * sizeof(T));
    }
  }

  // For the image to come, of this block or the next.
  void begin_prefetch(int64_t task, int64_t last_task, int64_t image) {
    const int64_t rows = divide_up(plan.axes[1].steps(outputs_.count[2]), plan.rows);
    if (++image == outputs_.count[0]) {
      ++task;
      image = 0;
    }
    if (task < last_task) {
      Block next = plan.blocks[task / p.groups];
      next.first[0] += image;
      next.count[0] = 1;
      prefetch_ = InputPrefetch(p, next, task % p.groups * plan.layout.inputs, plan.layout.inputs,
                                outputs_.count[1] * rows * plan.phases[1], static_cast<const scalar_t*>(nullptr));
    }
  }

  template <int kOutputs>
  void compute(int64_t image) {
    const int64_t columns = plan.axes[2].steps(outputs_.count[3]), all_rows = plan.axes[1].steps(outputs_.count[2]);
    for (int64_t d = 0; d < outputs_.count[1]; ++d) {
      for (int64_t row = 0; row < all_rows; row += plan.rows) {
        const int64_t rows = least(plan.rows, all_rows - row), pixels = (rows - 1) * plan.size[2] + columns;
        const T* input = plan.planes + (d / p.stride[0] * plan.size[1] + row) * plan.size[2] * kDepth<T>;
        for (int64_t phase = 0; phase < plan.phases[1]; ++phase) {
          const int64_t phases = (d % p.stride[0] * plan.phases[1] + phase) * plan.phases[2];
          prefetch_.step();
          add_up<kOutputs>(input, plan.first_taps + phases, pixels);
          for (int64_t i = 0, h = row * p.stride[1] + phase; i < rows && h < outputs_.count[2]; ++i, h += p.stride[1]) {
            with_activation(p.activation,
                            [&](auto activation) { write_row(image, d, h, i * plan.size[2], activation); });
          }
        }
      }
    }
  }

  // All phases along W of neighbouring rows of outputs, or of one, that have one phase along D and H.
  template <int kOutputs>
  void add_up(const T* input, const int64_t* first_taps, int64_t pixels) {
    if (plan.is_by_fours) {
      return add_phase<FourTaps, kOutputs>(input, first_taps, pixels, plan.sums);
    }
    for (int64_t phase = 0; phase < plan.phases[2]; ++phase) {
      add_phase<OneTap, kOutputs>(input, first_taps + phase, pixels, plan.sums + phase * plan.sums_step);
    }
  }

  template <typename Together, int kOutputs>
  void add_phase(const T* input, const int64_t* first_taps, int64_t pixels, float* sums) {
    const T* weight = packed_ + group_ * plan.layout.taps * plan.depth * kOutputs;
    const int64_t input_step = plan.pitch * kDepth<T>, weight_step = p.kernel[2] * kOutputs * kDepth<T>;
    const int64_t steps = plan.depth / kDepth<T>, runs = most<int64_t>(divide_up(steps, plan.steps), 1);
    const int64_t vectors = divide_up(pixels, kLanes);
    constexpr int kVectors = kTileVectors / Together::kPhases;
    const int64_t parts = divide_up(vectors, kVectors);
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t first = vectors * part / parts, count = vectors * (part + 1) / parts - first;
      for (int64_t run = 0; run < runs; ++run) {
        const int64_t begin = steps * run / runs, length = steps * (run + 1) / runs - begin;
        const FewOperand<T> from = {input + first * kLanes * kDepth<T> + begin * input_step, input_step};
        const FewOperand<T> by = {weight + begin * weight_step, weight_step};
        with_constant<1, kVectors>(count, [&](auto constant) {
          add_taps<Together, kOutputs, constant()>(plan.taps + first_taps[0], first_taps[1] - first_taps[0], from, by,
                                                   length, run > 0, sums + first * kLanes, plan.sums_step,
                                                   plan.phases[2] * plan.sums_step);
        });
      }
    }
  }

  // Finishes a row of outputs whose sums begin at `first`, and writes it.
  template <typename Activation>
  void write_row(int64_t image, int64_t d, int64_t h, int64_t first, Activation activation) {
    const int64_t outputs = plan.layout.outputs, count = outputs_.count[3], stride = p.stride[2];
    const int64_t image_size = p.out_size[0] * p.out_size[1] * p.out_size[2];
    const int64_t position =
        ((outputs_.first[1] + d) * p.out_size[1] + outputs_.first[2] + h) * p.out_size[2] + outputs_.first[3];
    auto* out = static_cast<scalar_t*>(p.out) + (outputs_.first[0] + image) * p.out_channels * image_size;
    for (int64_t output = 0; output < outputs; ++output) {
      const int64_t channel = group_ * outputs + output;
      const Vector scale = broadcast(p.scale[channel]), offset = broadcast(p.offset[channel]);
      const auto finished = [&](int64_t phase, int64_t i) {
        const float* sums = plan.sums + (output * plan.phases[2] + phase) * plan.sums_step + first;
        return activation(multiply_add(load(sums + i), scale, offset), p.negative_slope);
      };
      for (int64_t i = 0; i * stride < count; i += kLanes) {
        if (stride == 1) {
          store(plan.line + i, finished(0, i));
        } else if (stride == 2 && plan.phases[2] == 2) {
          Vector low, high;
          interleave(finished(0, i), finished(1, i), low, high);
          store(plan.line + 2 * i, low);
          store(plan.line + 2 * i + kLanes, high);
        } else {
          for (int64_t phase = 0; phase < plan.phases[2]; ++phase) {
            float values[kLanes];
            store(values, finished(phase, i));
            for (int64_t j = 0; j < least(kLanes, divide_up(count - phase, stride) - i); ++j) {
              plan.line[(i + j) * stride + phase] = values[j];
            }
          }
        }
      }
      for (int64_t i = 0; i < count; i += kLanes) {
        if (!p.channels_last) {
          store_part(out + channel * image_size + position + i, load(plan.line + i), count - i);
          continue;
        }
        scalar_t values[kLanes];
        store(values, load(plan.line + i));
        for (int64_t j = 0; j < least(kLanes, count - i); ++j) {
          out[(position + i + j) * p.out_channels + channel] = values[j];
        }
      }
    }
  }

  const ConvTransposeParams& p;
  FewPlan<scalar_t> plan;
  const T* packed_;
  InputPrefetch prefetch_;
  int64_t group_;
  Block outputs_;
};

int64_t packed_bytes(const ConvTransposeParams& p) {
  return with_element_type(p.dtype, [&](auto type) {
    using T = Compute<decltype(type)>;
    const FewLayout layout(p);
    return p.groups * layout.taps * layout.outputs * padded_depth<T>(layout.inputs) * static_cast<int64_t>(sizeof(T));
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
