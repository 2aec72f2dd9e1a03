// The Python module fastformer._C. Importing it registers the operators (register_*.cpp); by itself it only
// tells how it was built. setup.py passes the FASTFORMER_* facts.
#include <pybind11/pybind11.h>

#include <chrono>
#include <string>

#include "cpu/launch.h"

namespace py = pybind11;

namespace {

#if defined(__clang__)
constexpr const char* kCompiler = "clang++ " __clang_version__;
#else
constexpr const char* kCompiler = "g++ " __VERSION__;
#endif

py::list words(const std::string& text) { return py::str(text).attr("split")(); }

// Facts of the CUDA half, or None where it was left out.
py::object cuda_build() {
#if defined(FASTFORMER_NVCC)
  py::dict facts;
  facts["nvcc"] = FASTFORMER_NVCC;
  facts["archs"] = words(FASTFORMER_CUDA_ARCHS);
  return facts;
#else
  return py::none();
#endif
}

py::dict build_info() {
  py::dict facts;
  facts["compiler"] = kCompiler;
  facts["torch"] = FASTFORMER_TORCH;
  facts["isa_levels"] = words(FASTFORMER_ISA_LEVELS);
  facts["cuda"] = cuda_build();
#if defined(FASTFORMER_NO_CUDA)
  facts["no_cuda"] = FASTFORMER_NO_CUDA;
#else
  facts["no_cuda"] = py::none();
#endif
  return facts;
}

// float32 operations a second of multiply-adds on registers alone, on this thread and at the level in use.
double fma_rate(double seconds) {
  using Clock = std::chrono::steady_clock;
  const auto start = Clock::now();
  double operations = 0, elapsed = 0;
  volatile float kept = 0;
  do {
    float sum;
    operations += fastformer::cpu::kernels().run_fma(int64_t{1} << 14, sum);
    kept = sum;
    elapsed = std::chrono::duration<double>(Clock::now() - start).count();
  } while (elapsed < seconds);
  static_cast<void>(kept);
  return operations / elapsed;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "fastformer's compiled half: operators for the CPU and, if built in, for CUDA.";
  m.def("build_info", &build_info, "How this extension was built: compilers, torch, levels, CUDA.");
  m.def("cuda_build", &cuda_build, "The nvcc release and GPU architectures built in, or None.");
  m.def("isa", &fastformer::cpu::isa_level, "The instruction set level in use.");
  m.def("set_isa", &fastformer::cpu::set_isa_level, py::arg("level"),
        "Take another level, for tests; False where it was not built or the machine lacks it.");
  m.def("fma_rate", &fma_rate, py::arg("seconds"), py::call_guard<py::gil_scoped_release>(),
        "Operations a second of float32 multiply-adds on registers alone: one thread's peak.");
}
