// The Python module: registers the ops' native kernels and says how it was built. The only file that includes
// torch/extension.h, which takes most of a minute to compile.
#include <torch/extension.h>
#include <torch/library.h>

#include "bindings/errors.h"
#include "bindings/ops.h"
#include "bindings/serving.h"
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
  DELFAST_CHECK_VALUE(delfast::cpu::force_isa(name.c_str()), "expected an instruction set of this CPU, got '", name,
                      "'; see delfast.status()['isas']");
}

#ifdef DELFAST_WITH_CUDA
void force_per_example_variant(const std::string& name) {
  DELFAST_CHECK_VALUE(delfast::cuda::force_per_example_variant(name.c_str()),
                      "expected a variant of the per-example kernels or 'measured', got '", name,
                      "'; see csrc/cuda/per_example_variants.h");
}
#endif

}  // namespace

TORCH_LIBRARY_IMPL(delfast, CPU, m) {
  namespace bindings = delfast::bindings;
  using bindings::serve;
  serve<"criticality", &bindings::criticality>(m);
  serve<"select_elements", &bindings::select_elements>(m);
  serve<"select_units", &bindings::select_units>(m);
  serve<"masked_plan", &bindings::masked_plan>(m);
  serve<"masked_reset_", &bindings::masked_reset_>(m);
  serve<"masked_sgd_", &bindings::masked_sgd_>(m);
  serve<"masked_adamw_", &bindings::masked_adamw_>(m);
  serve<"per_example_accumulate_", &bindings::per_example_accumulate_>(m);
  serve<"channel_dot", &bindings::channel_dot>(m);
  serve<"channel_accumulate_", &bindings::channel_accumulate_>(m);
  m.impl("gather_columns", TORCH_FN(bindings::gather_columns));  // of any dtype
  m.impl("write_rows_", TORCH_FN(bindings::write_rows_));        // of any dtype
}

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
