// The Python module: registers the ops' native kernels and says how it was built. The only file that includes
// torch/extension.h, which takes most of a minute to compile.
#include <torch/extension.h>
#include <torch/library.h>

#include "bindings/ops.h"
#include "delfast/cpu_dispatch.h"

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
  TORCH_CHECK_VALUE(delfast::cpu::force_isa(name.c_str()), "expected an instruction set of this CPU, got '", name,
                    "'; see delfast.status()['isas']");
}

}  // namespace

TORCH_LIBRARY_IMPL(delfast, CPU, m) {
  m.impl("criticality", TORCH_FN(delfast::bindings::criticality));
  m.impl("select_elements", TORCH_FN(delfast::bindings::select_elements));
  m.impl("select_units", TORCH_FN(delfast::bindings::select_units));
  m.impl("masked_reset_", TORCH_FN(delfast::bindings::masked_reset_));
  m.impl("masked_sgd_", TORCH_FN(delfast::bindings::masked_sgd_));
  m.impl("masked_adamw_", TORCH_FN(delfast::bindings::masked_adamw_));
  m.impl("per_example_accumulate_", TORCH_FN(delfast::bindings::per_example_accumulate_));
  m.impl("channel_dot", TORCH_FN(delfast::bindings::channel_dot));
  m.impl("gather_columns", TORCH_FN(delfast::bindings::gather_columns));
}

PYBIND11_MODULE(_C, m) {
  if (const char* problem = delfast::cpu::isa_request_problem()) throw pybind11::import_error(problem);
  m.doc() = "delfast's native kernels; the ops are in torch.ops.delfast";
  m.def("isa", &isa_in_use, "The instruction set in use on the CPU.");
  m.def("isas", &supported_isas, "The instruction sets of this build that this CPU has.");
  m.def("force_isa", &force_isa, "Use this instruction set from now on (tests and benchmarks).");
}
