"""The ops' schemas in torch.library's language, and their digest, which is compiled into the library of the ops.

Native kernels take their arguments unchecked, so a library is loaded only for the schemas that it was built for.
setup.py runs this file, so it imports no torch.
"""

from __future__ import annotations

import hashlib


def _by_name(*schemas: str) -> dict[str, str]:
    return {schema.split("(", 1)[0]: schema for schema in schemas}


# ``(a!)`` marks an argument that the op changes
SCHEMAS = _by_name(
    "criticality(Tensor[] theta, Tensor[] grad, str criterion, str aggregate, int[] top_h) -> Tensor",
    "select_elements(Tensor[] theta, Tensor[] grad, str criterion, SymInt k) -> (Tensor, Tensor)",
    "select_units(Tensor scores, int[] counts, int[] lengths, SymInt k, bool cut_last) -> (Tensor, Tensor)",
    "masked_plan(Tensor[] params, Tensor bits, bool[] by_row) -> Tensor",
    "masked_reset_(Tensor(a!)[] params, Tensor[] fresh, Tensor bits, bool[] by_row) -> ()",
    "masked_sgd_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!) state, Tensor(c!) steps, "
    "Tensor bits, bool[] by_row, *, float lr, float momentum, float dampening, float weight_decay, bool nesterov, "
    "bool maximize, Tensor? grad_scale, Tensor? found_inf, Tensor? lr_tensor=None) -> ()",
    "masked_adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!) state, Tensor(c!) steps, "
    "Tensor bits, bool[] by_row, *, float lr, float beta1, float beta2, float eps, float weight_decay, "
    "bool maximize, Tensor? grad_scale, Tensor? found_inf, Tensor? lr_tensor=None) -> ()",
    "per_example_accumulate_(Tensor(a!) sums, Tensor inputs, Tensor output_grad, int[] stride, int[] padding, "
    "int[] dilation, int groups, str transform, bool allow_tf32=False) -> ()",
    "channel_dot(Tensor output_grad, Tensor? values) -> Tensor",
    "channel_sums_(Tensor(a!)[] sums, Tensor output_grad, Tensor? values, Tensor? mean, Tensor? variance, "
    "float eps, str transform) -> ()",
    "gather_columns(Tensor source, Tensor columns) -> Tensor",
    "write_rows_(Tensor(a!)[] weights, Tensor[] rows, Tensor[] indices, int[] dims) -> ()",
)

# of the namespace delfast_python, which native kernels call, as they call the references
CALLED_BY_KERNELS = _by_name("increment_versions(Tensor[] tensors) -> ()", "last_error() -> str")

DIGEST = hashlib.sha256("\n".join([*SCHEMAS.values(), *CALLED_BY_KERNELS.values()]).encode()).hexdigest()
