// The Python module: says what the library of the ops runs on, and forces it to run on another. It knows no torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>

#include "delfast/cpu_dispatch.h"
#ifdef DELFAST_WITH_CUDA
#include "delfast/cuda_launch.h"
#endif

namespace {

using delfast::cpu::Isa;

std::string isa_in_use() { return delfast::cpu::kIsaNames[int(delfast::cpu::isa())]; }

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (Isa isa : delfast::cpu::kIsas)
    if (delfast::cpu::isa_supported(isa)) names.push_back(delfast::cpu::kIsaNames[int(isa)]);
  return names;
}

void force_isa(const std::string& name) {
  if (!delfast::cpu::force_isa(name.c_str()))
    throw std::invalid_argument("expected an instruction set of this CPU, got '" + name +
                                "'; see delfast.status()['isas']");
}

#ifdef DELFAST_WITH_CUDA
void force_per_example_variant(const std::string& name) {
  if (!delfast::cuda::force_per_example_variant(name.c_str()))
    throw std::invalid_argument("expected a variant of the per-example kernels or 'measured', got '" + name +
                                "'; see csrc/cuda/per_example_variants.h");
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
  if (const char* problem = delfast::cpu::isa_request_problem()) throw pybind11::import_error(problem);
  m.doc() = "delfast's native kernels; the ops are in torch.ops.delfast";
  m.def("isa", &isa_in_use, "The instruction set in use on the CPU.");
  m.def("isas", &supported_isas, "The instruction sets of this build that this CPU has.");
  m.def("force_isa", &force_isa, "Use this instruction set from now on (tests and benchmarks).");
#ifdef DELFAST_WITH_CUDA
  m.def("force_per_example_variant", &force_per_example_variant,
        "Use this variant of the per-example kernels on CUDA devices from now on; 'measured' ends that (tests and "
        "benchmarks).");
#endif
}
