// The Python module: returns and forces the instruction set and variant of the ops' library, and keeps the errors that
// Python raised under a native kernel. It does not depend on torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <utility>

#include "delfast/cpu_dispatch.h"
#ifdef DELFAST_WITH_CUDA
#include "delfast/cuda_launch.h"
#endif

namespace {

namespace py = pybind11;
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

// ---- Python errors under a native kernel: torch's stable interface returns only that a call failed
//
// In C++, because a signal's handler runs between any two instructions of Python's, and the error that it raises must
// be kept too.

thread_local PyObject* raised = nullptr;  // by this thread's last noted call
PyObject* interruption = nullptr;         // raised in the main thread when it runs Python again
unsigned long main_thread = 0;

int raise_interruption(void*) {
  PyObject* const error = std::exchange(interruption, nullptr);
  if (!error) return 0;
  PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(error)), error);
  Py_DECREF(error);
  return -1;
}

// Returns a function that calls `reference` and keeps the error that it raises.
py::cpp_function noted(const py::function& reference) {
  return [reference](const py::args& args, const py::kwargs& kwargs) -> py::object {
    Py_CLEAR(raised);
    try {
      return reference(*args, **kwargs);
    } catch (const py::error_already_set& error) {
      raised = Py_NewRef(error.value().ptr());
      throw;
    }
  };
}

// Returns type and text of the error of this thread's last noted call. An error that is no Exception comes from a
// signal's handler, which runs only in the main thread. It is raised there again, so that no code catches it for good.
std::string last_error() {
  if (!raised) return "RuntimeError: torch could not call Python";
  const py::object error = py::reinterpret_steal<py::object>(std::exchange(raised, nullptr));
  const std::string text =
      std::string(py::str(py::type::of(error).attr("__name__"))) + ": " + std::string(py::str(error));
  if (!PyErr_GivenExceptionMatches(error.ptr(), PyExc_Exception) && PyThread_get_thread_ident() == main_thread) {
    Py_XSETREF(interruption, Py_NewRef(error.ptr()));
    if (Py_AddPendingCall(&raise_interruption, nullptr)) return text + " (Python's list of pending calls is full)";
  }
  return text;
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
  if (const char* problem = delfast::cpu::isa_request_problem()) throw py::import_error(problem);
  main_thread = py::module_::import("threading").attr("main_thread")().attr("ident").cast<unsigned long>();
  m.doc() = "delfast's native kernels; the ops are in torch.ops.delfast";
  m.def("noted", &noted, "Return a function that calls this one, and keeps what it raises for last_error.");
  m.def("last_error", &last_error, "Return the kind and text of the error that was kept, and keep it no longer.");
  m.def("isa", &isa_in_use, "The instruction set in use on the CPU.");
  m.def("isas", &supported_isas, "The instruction sets of this build that this CPU has.");
  m.def("force_isa", &force_isa, "Use this instruction set from now on (tests and benchmarks).");
#ifdef DELFAST_WITH_CUDA
  m.def("force_per_example_variant", &force_per_example_variant,
        "Use this variant of the per-example kernels on CUDA devices from now on; 'measured' ends that (tests and "
        "benchmarks).");
#endif
}
