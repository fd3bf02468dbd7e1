// The module gpt4fast._C: what was built, and the CPU level. It knows nothing of torch; operators are registered with
// torch by the libraries themselves.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/cpu_level.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
  std::vector<std::string> levels;
  for (const gpt4fast::CpuLevel level : gpt4fast::compiled_cpu_levels()) {
    levels.emplace_back(gpt4fast::name_of(level));
  }
  py::dict info;
  info["compiler"] = GPT4FAST_COMPILER;
  info["build_type"] = GPT4FAST_BUILD_TYPE;
  info["torch_built_against"] = GPT4FAST_TORCH_VERSION;
  info["torch_minimum"] = "2.10";
  info["cpu_features"] = gpt4fast::cpu_features();
  info["cpu_level_detected"] = gpt4fast::name_of(gpt4fast::detected_cpu_level());
  info["cpu_levels_compiled"] = levels;
  info["cpu_level"] = gpt4fast::name_of(gpt4fast::cpu_level());
  info["nvcc"] = GPT4FAST_CUDA_COMPILER;
  info["cuda_architectures"] = GPT4FAST_CUDA_ARCHITECTURES;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information and CPU level of gpt4fast's native libraries.";
  m.def("build_info", &build_info, "What the libraries were built with, and the CPU level they run at, as a dict.");
  m.def(
      "cpu_level", [] { return gpt4fast::name_of(gpt4fast::cpu_level()); },
      "The active CPU level. Raises ValueError where GPT4FAST_CPU_LEVEL names one that cannot run here.");
  m.def("force_cpu_level", &gpt4fast::force_cpu_level, py::arg("name"),
        "Run CPU kernels at level `name`. Raises ValueError where it is unknown, not compiled or not supported here.");
}
