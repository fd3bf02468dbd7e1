// Transposed convolution with a kernel of twice the stride by the minimal filtering algorithm F(2, 2) of Winograd (as
// in Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 2016), in place of the products of pixels of
// conv_transpose_kernel.cpp. Outputs whose fine place is f = stride * i + phase are made of two inputs,
//   y[i] = d[i - 1] g0 + d[i] g1    with the taps g1 = w[phase], g0 = w[phase + stride],
// and two neighbours of one phase take three multiplications instead of four,
//   y[i] = A + B,  y[i + 1] = B + C,  A = (d[i] - d[i - 1]) (-g0),  B = d[i] (g0 + g1),  C = (d[i + 1] - d[i]) g1,
// along each dimension: 9 / 16 of the multiplications in two dimensions, 27 / 64 in three. All phases share the values
// and the differences of the inputs, which a block keeps side by side. Everything is computed in float32: differences
// rounded to bfloat16 would be too coarse.
// The adjoint, a convolution, sums over the phases of its inputs, and d are those of one phase,
//   y[i] = sum over phases of d[i] g0 + d[i + 1] g1    with the taps g0 = w[phase], g1 = w[phase + stride],
// the same three multiplications around d[i + 1]. Each phase has its own values and differences, and all have the same
// outputs. Compiled once per CPU level.
#include "../conv_transpose.h"

#include "conv_transpose_blocks.h"
#include "conv_transpose_inputs.h"
#include "conv_transpose_winograd_tiles.h"
#include "conv_transpose_winograd_weight.h"
#include "conv_transpose_write.h"
#include "placed_product.h"
#include "scratch.h"
#include "with_element_type.h"

namespace gpt4fast::cpu::GPT4FAST_LEVEL {
namespace {

constexpr int64_t kMostOutputs = 2048;        // of a block, whose sums then take 512 KiB
constexpr int64_t kMostInputBytes = 5 << 20;  // of what a block keeps of its inputs, read in order
constexpr int64_t kSteps = 128;               // of a product whose right operand stays in L1: 32 KiB
// In three dimensions sums and differences lose more bits: with 128 steps errors are 2.2 times torch's, with 64 1.6.
constexpr int64_t kStepsInThreeDimensions = 64;

struct Plan : Scratch {
  WeightLayout<float> layout;
  Blocks blocks;
  float* inputs;     // (input_phases, images, D, H, W, groups, depth): values and differences
  float* sums;       // (block, width), with a stride more of outputs along each axis
  RowPlace* places;  // of a phase
  int64_t* pixels;   // where the values of a block's inputs lie
  float* lines;      // (kLanes, line_step of the block)

  Plan(const ConvTransposeParams& p, int64_t threads, void* memory)
      : Scratch(memory), layout(winograd_layout(p)), blocks(p, kMostOutputs, 2) {
    const int64_t pixel = p.groups * layout.depth;
    for (int64_t outputs = kMostOutputs;
         outputs > 64 && (most_kept(p) * pixel * static_cast<int64_t>(sizeof(float)) > kMostInputBytes ||
                          blocks.count() * p.groups * layout.blocks < 2 * threads);) {
      outputs /= 2;
      blocks = Blocks(p, outputs, 2);
    }
    const Block largest = blocks.largest();
    int64_t outputs = largest.count[0], pixels_kept = largest.count[0];
    for (int axis = 0; axis < 3; ++axis) {
      const int64_t phases = p.is_adjoint ? p.stride[axis] : 1;
      pixels_kept *= least(phases * Kept::most_length(p, largest.count[axis + 1], axis), p.in_size[axis]);
      outputs *= largest.count[axis + 1] + (is_absent(p, axis) ? 0 : output_step(p, axis));
    }
    take(inputs, most_kept(p) * pixel);
    take(sums, outputs * layout.width);
    take(places, outputs);
    take(pixels, pixels_kept);
    take(lines, p.channels_last ? 0 : kLanes * line_step(largest));
  }

 private:
  // Values and differences that any of the blocks keeps.
  int64_t most_kept(const ConvTransposeParams& p) const {
    const Block largest = blocks.largest();
    int64_t kept = input_phases(p) * largest.count[0];
    for (int axis = 0; axis < 3; ++axis) {
      kept *= Kept::most_length(p, largest.count[axis + 1], axis);
    }
    return kept;
  }
};

template <typename scalar_t>
class Kernel {
 public:
  Kernel(const ConvTransposeParams& params, int64_t threads, const void* packed, void* memory)
      : p(params), plan(params, threads, memory), packed_(static_cast<const float*>(packed)) {}

  void run(int64_t thread, int64_t threads) {
    for_each_task(
        plan.blocks, p.groups, plan.layout.blocks, thread, threads, [&](const Block& outputs) { begin(outputs); },
        [&](int64_t group, int64_t block) { compute(group, block); });
  }

 private:
  void begin(const Block& outputs) {
    outputs_ = outputs;
    strides_[3] = p.groups * plan.layout.depth;
    padded_ = outputs;
    for (int axis = 2; axis >= 0; --axis) {
      kept_[axis] = Kept(p, outputs, axis);
      strides_[axis] = strides_[axis + 1] * kept_[axis].length;
      for (int64_t phase = 0; phase < p.stride[axis]; ++phase) {
        if (Phase(p, outputs, axis, phase).is_padded) {
          padded_.count[axis + 1] = outputs.count[axis + 1] + output_step(p, axis);
        }
      }
    }
    int64_t phase_step = outputs_.count[0] * strides_[0];
    for (int axis = 2; axis >= 0; --axis) {
      phase_steps_[axis] = phase_step;
      phase_step *= p.stride[axis];
    }
    copy_values();
    for (int axis = 2; axis >= 0; --axis) {
      if (!kept_[axis].absent) {
        subtract_along(axis);
      }
    }
  }

  // Inputs outside of the image are zero.
  void copy_values() {
    Block inputs = outputs_;
    for (int axis = 0; axis < 3; ++axis) {
      const Span span = input_span(axis);
      inputs.first[axis + 1] = most<int64_t>(span.first, 0);
      inputs.count[axis + 1] =
          most<int64_t>(least(span.first + span.count, p.in_size[axis]) - inputs.first[axis + 1], 0);
    }
    list_pixels();
    const auto* input = static_cast<const scalar_t*>(p.input);
    for_each_run(inputs, p.in_size, p.input_strides, [&](int64_t offset, int64_t first, int64_t count) {
      for (int64_t group = 0; group < p.groups; ++group) {
        copy_pixels<float>(p, input + offset + group * plan.layout.group_inputs * p.input_strides[1], count,
                           plan.layout.group_inputs, plan.layout.depth,
                           [&](int64_t i) { return plan.inputs + plan.pixels[first + i] + group * plan.layout.depth; });
      }
    });
  }

  // Where the values of the inputs go, in the order of the inputs, and zeros for those outside of the image.
  void list_pixels() {
    int64_t* pixel = plan.pixels;
    const Span depths = input_span(0), rows = input_span(1), columns = input_span(2);
    for (int64_t image = 0; image < outputs_.count[0]; ++image) {
      for (int64_t d = depths.first; d < depths.first + depths.count; ++d) {
        for (int64_t h = rows.first; h < rows.first + rows.count; ++h) {
          const bool inside = 0 <= d && d < p.in_size[0] && 0 <= h && h < p.in_size[1];
          const int64_t line = image * strides_[0] + target_of(0, d) + target_of(1, h);
          for (int64_t w = columns.first; w < columns.first + columns.count; ++w) {
            const int64_t to = line + target_of(2, w);
            if (inside && 0 <= w && w < p.in_size[2]) {
              *pixel++ = to;
            } else {
              std::memset(plan.inputs + to, 0, static_cast<size_t>(strides_[3]) * sizeof(float));
            }
          }
        }
      }
    }
  }

  // The inputs along an axis whose values a block keeps; some may be outside of the image.
  struct Span {
    int64_t first, count;
  };

  Span input_span(int axis) const {
    const int64_t first = kept_[axis].place(0), count = kept_[axis].place(kept_[axis].length - 1) - first + 1;
    const int64_t stride = p.stride[axis];
    return p.is_adjoint ? Span{stride * first - p.padding[axis], stride * count} : Span{first, count};
  }

  // How far along an axis the value of an input is brought.
  int64_t target_of(int axis, int64_t input) const {
    if (!p.is_adjoint) {
      return kept_[axis].index_of(input) * strides_[axis + 1];
    }
    const int64_t place = divide_down(input + p.padding[axis], p.stride[axis]);
    const int64_t phase = input + p.padding[axis] - place * p.stride[axis];
    return phase * phase_steps_[axis] + kept_[axis].index_of(place) * strides_[axis + 1];
  }

  // The differences between neighbours along an axis, in the lines of values of the axes before.
  void subtract_along(int axis) {
    const int64_t step = strides_[axis + 1];
    const int64_t lines = input_phases(p) * outputs_.count[0] * strides_[0] / strides_[axis];
    for (int64_t line = 0; line < lines; ++line) {
      int64_t rest = line;
      bool has_values = true;
      for (int before = axis - 1; before >= 0; --before) {
        has_values = has_values && kept_[before].has_value(rest % kept_[before].length);
        rest /= kept_[before].length;
      }
      if (!has_values) {
        continue;
      }
      float* to = plan.inputs + line * strides_[axis];
      const int64_t last = kept_[axis].length - 1;
      for (int64_t index = 0; index <= last; index += 2, to += 2 * step) {
        subtract(index < last ? to + step : to, index > 0 ? to - step : to, step, to);
      }
    }
  }

  static void subtract(const float* a, const float* b, int64_t count, float* to) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
      store(to + i, load(a + i) - load(b + i));
    }
    for (; i < count; ++i) {
      to[i] = a[i] - b[i];
    }
  }

  void compute(int64_t group, int64_t block) {
    const WeightLayout<float>& layout = plan.layout;
    std::memset(plan.sums, 0, static_cast<size_t>(padded_.size() * layout.width) * sizeof(float));
    const float* weight = packed_ + (group * layout.blocks + block) * layout.block_size();
    const float* input = plan.inputs + group * layout.depth;
    for (int64_t d = 0; d < p.stride[0]; ++d) {
      const Phase depths(p, outputs_, 0, d);
      for (int64_t h = 0; h < p.stride[1]; ++h) {
        const Phase rows(p, outputs_, 1, h);
        for (int64_t w = 0; w < p.stride[2]; ++w) {
          const int64_t count = find_places(depths, rows, Phase(p, outputs_, 2, w));
          const int64_t phases[3] = {d, h, w};
          const int64_t own = d * phase_steps_[0] + h * phase_steps_[1] + w * phase_steps_[2];
          add_phase(phases, count, input + (p.is_adjoint ? own : 0), weight);
        }
      }
    }
    drop_padding();
    write_outputs<scalar_t>(p, outputs_, plan.sums, layout.width, group * layout.group_outputs + block * layout.width,
                            layout.channels(block), plan.lines);
  }

  // The products of one phase.
  void add_phase(const int64_t (&phases)[3], int64_t count, const float* input, const float* weight) {
    const WeightLayout<float>& layout = plan.layout;
    const bool three = !kept_[0].absent && !kept_[1].absent && !kept_[2].absent;
    const int64_t parts = divide_up(layout.depth, three ? kStepsInThreeDimensions : kSteps);
    int64_t a[3], most_of[3];
    for (int axis = 0; axis < 3; ++axis) {
      most_of[axis] = kept_[axis].absent ? 1 : 3;
    }
    for (a[0] = 0; a[0] < most_of[0]; ++a[0]) {
      for (a[1] = 0; a[1] < most_of[1]; ++a[1]) {
        for (a[2] = 0; a[2] < most_of[2]; ++a[2]) {
          int64_t matrix = 0, kept = 0;
          Targets targets = {1, {0}};
          for (int axis = 0; axis < 3; ++axis) {
            matrix = matrix * products_of(p, axis) + phases[axis] * most_of[axis] + a[axis];
            kept += a[axis] * strides_[axis + 1];
            extend(targets, axis, a[axis]);
          }
          for (int64_t part = 0; part < parts; ++part) {
            const int64_t first = layout.depth * part / parts, last = layout.depth * (part + 1) / parts;
            add_product(layout.width / kLanes, count, input + kept + first, plan.places,
                        weight + (matrix * layout.depth + first) * layout.width, last - first, plan.sums, targets);
          }
        }
      }
    }
  }

  // Which of a tile's outputs along an axis the first (A), second (B) or third (C) product is added to.
  void extend(Targets& targets, int axis, int64_t product) const {
    int64_t next = output_step(p, axis) * plan.layout.width;  // to the tile's second output
    for (int later = axis + 1; later < 3; ++later) {
      next *= padded_.count[later + 1];
    }
    if (product == 2) {
      for (int64_t i = 0; i < targets.count; ++i) {
        targets.distances[i] += next;
      }
    } else if (product == 1) {
      for (int64_t i = 0; i < targets.count; ++i) {
        targets.distances[targets.count + i] = targets.distances[i] + next;
      }
      targets.count *= 2;
    }
  }

  // Lists what the first product of each tile reads, and the tile's first output.
  int64_t find_places(const Phase& depths, const Phase& rows, const Phase& columns) {
    const int64_t width = plan.layout.width;
    int64_t tile[3], between[3];  // from one tile to the next: what is kept, and outputs
    for (int axis = 0; axis < 3; ++axis) {
      tile[axis] = (kept_[axis].absent ? 1 : 4) * strides_[axis + 1];
      between[axis] = (kept_[axis].absent ? 1 : 2) * output_step(p, axis);
    }
    RowPlace* place = plan.places;
    for (int64_t image = 0; image < outputs_.count[0]; ++image) {
      for (int64_t i = 0; i < depths.tiles; ++i) {
        for (int64_t j = 0; j < rows.tiles; ++j) {
          const int64_t line =
              (image * padded_.count[1] + depths.out + i * between[0]) * padded_.count[2] + rows.out + j * between[1];
          RowPlace next = {image * strides_[0] + kept_[0].begin(depths) * strides_[1] + i * tile[0] +
                               kept_[1].begin(rows) * strides_[2] + j * tile[1] + kept_[2].begin(columns) * strides_[3],
                           (line * padded_.count[3] + columns.out) * width};
          for (int64_t k = 0; k < columns.tiles; ++k) {
            *place++ = next;
            next.left += tile[2];
            next.sums += between[2] * width;
          }
        }
      }
    }
    return place - plan.places;
  }

  // Moves the sums of the block's outputs together.
  void drop_padding() {
    if (padded_.size() == outputs_.size()) {
      return;
    }
    const size_t bytes = static_cast<size_t>(outputs_.count[3] * plan.layout.width) * sizeof(float);
    float* to = plan.sums;
    for (int64_t image = 0; image < outputs_.count[0]; ++image) {
      for (int64_t d = 0; d < outputs_.count[1]; ++d) {
        for (int64_t h = 0; h < outputs_.count[2]; ++h, to += outputs_.count[3] * plan.layout.width) {
          const int64_t line = (image * padded_.count[1] + d) * padded_.count[2] + h;
          std::memmove(to, plan.sums + line * padded_.count[3] * plan.layout.width, bytes);
        }
      }
    }
  }

  const ConvTransposeParams& p;
  Plan plan;
  const float* packed_;
  Block outputs_, padded_;  // padded: what whole tiles cover
  Kept kept_[3];
  int64_t strides_[4];      // of what is kept: image, D, H, W
  int64_t phase_steps_[3];  // from one phase of the inputs along D, H and W to the next
};

int64_t packed_bytes(const ConvTransposeParams& p) {
  const WeightLayout<float> layout = winograd_layout(p);
  return p.groups * layout.blocks * layout.block_size() * static_cast<int64_t>(sizeof(float));
}

void pack(const ConvTransposeParams& p, void* packed, int64_t thread, int64_t threads) {
  const WeightLayout<float> layout = winograd_layout(p);
  with_element_type(p.dtype, [&](auto type) {
    pack_share(p, layout, packed, thread, threads, [&](int64_t group, int64_t block, float* target) {
      pack_winograd_block<decltype(type)>(p, layout, group, block, target);
    });
  });
}

int64_t workspace(const ConvTransposeParams& p, int64_t threads) {
  return Plan(p, threads, nullptr).bytes;
}

void run(const ConvTransposeParams& p, const void* packed, void* memory, int64_t thread, int64_t threads) {
  with_element_type(p.dtype,
                    [&](auto type) { Kernel<decltype(type)>(p, threads, packed, memory).run(thread, threads); });
}

}  // namespace

extern const ConvTransposeKernel conv_transpose_winograd_kernel = {packed_bytes, pack, workspace, run};

}  // namespace gpt4fast::cpu::GPT4FAST_LEVEL
