"""What one operation costs: its kind, floating-point operations and bytes, from the shapes the dispatcher sees."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

aten = torch.ops.aten

_NAMES = {
    "matmul": "mm addmm bmm baddbmm mv addmv dot vdot linear matmul _grouped_mm _scaled_mm _scaled_grouped_mm",
    "attention": "_scaled_dot_product_flash_attention _scaled_dot_product_flash_attention_backward "
    "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention_for_cpu_backward "
    "_scaled_dot_product_efficient_attention _scaled_dot_product_efficient_attention_backward "
    "_scaled_dot_product_cudnn_attention _scaled_dot_product_cudnn_attention_backward "
    "_scaled_dot_product_fused_attention_overrideable _scaled_dot_product_fused_attention_overrideable_backward "
    "_flash_attention_forward _flash_attention_backward _efficient_attention_forward _efficient_attention_backward",
    "convolution": "convolution _convolution convolution_overrideable convolution_backward cudnn_convolution "
    "mkldnn_convolution convolution_backward_overrideable",
    "normalization": "native_layer_norm native_layer_norm_backward native_group_norm native_group_norm_backward "
    "_fused_rms_norm _fused_rms_norm_backward",
    "batch_norm": "native_batch_norm native_batch_norm_backward _native_batch_norm_legit batch_norm_backward "
    "_native_batch_norm_legit_no_training cudnn_batch_norm cudnn_batch_norm_backward _batch_norm_with_update",
    "softmax": "_softmax _softmax_backward_data _log_softmax _log_softmax_backward_data logsumexp _safe_softmax",
    "gather": "embedding embedding_dense_backward _embedding_bag index index_select index_put index_put_ index_add "
    "index_add_ index_copy index_copy_ _index_put_impl_ gather scatter scatter_ scatter_add scatter_add_ "
    "scatter_reduce scatter_reduce_ take nll_loss_forward nll_loss_backward nll_loss2d_forward nll_loss2d_backward",
    "transcendental": "exp exp_ exp2 expm1 log log_ log2 log1p tanh tanh_ sigmoid sigmoid_ erf erf_ erfinv gelu gelu_ "
    "gelu_backward silu silu_ silu_backward sin cos tan pow pow_ rsqrt softplus softplus_backward mish mish_backward "
    "elu elu_ logit log_sigmoid_forward log_sigmoid_backward atan2 polar",
    "reduction": "sum mean amax amin aminmax max min prod var var_mean std std_mean norm linalg_vector_norm cumsum "
    "cumprod argmax argmin any all topk sort median mse_loss l1_loss smooth_l1_loss binary_cross_entropy avg_pool2d "
    "max_pool2d_with_indices _adaptive_avg_pool2d count_nonzero histc",
    "copy": "clone copy_ _to_copy cat stack fill fill_ zero_ zeros zeros_like ones ones_like full full_like new_zeros "
    "new_ones new_full arange linspace scalar_tensor constant_pad_nd repeat slice_backward select_backward flip roll "
    "split_with_sizes_copy lift_fresh_copy slice_scatter select_scatter _unsafe_view triu tril triu_ tril_",
}
KINDS = {name: kind for kind, names in _NAMES.items() for name in names.split()}

GATHERS_FROM = ("embedding", "index", "index_select", "gather", "take")
"""Operators that read only part of their first tensor: as much as they write."""
FILLS = ("fill_", "zero_", "copy_")
"""Operators that write their first tensor without reading it."""


def grouped_mm(a: Tensor, b: Tensor, offs: Tensor | None = None, bias: Any = None, out_dtype: Any = None) -> Tensor:
    """Form of ``aten._grouped_mm``: the operator's own rule for fake tensors takes bfloat16 and aligned sizes only.

    Shapes: (T, K) x (E, K, N) -> (T, N); (M, T) x (T, N) -> (E, M, N); (E, M, K) x (E, K, N) -> (E, M, N);
    (E, M, K) x (K, T) -> (M, T).
    """
    groups: list[int] = []
    if a.dim() == b.dim():
        groups = [a.shape[0] if offs is None else offs.shape[0]]
    return a.new_empty([*groups, a.shape[-2], b.shape[-1]], dtype=out_dtype or a.dtype)


STAND_INS = {aten._grouped_mm.default: grouped_mm}
"""Operators whose rule for fake tensors is stricter than the operator itself."""


class StandIns(TorchDispatchMode):  # type: ignore[no-untyped-call] # torch's class has an untyped __init_subclass__
    """Runs STAND_INS in place of their operators, above a FakeTensorMode."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operator or its stand-in."""
        return STAND_INS.get(func, func)(*args, **(kwargs or {}))


def kind_of(func: Any) -> str:
    """The kind of an operator, one of those profile.Operation lists."""
    if torch.Tag.nondeterministic_seeded in func.tags:
        kind = KINDS.get(func._schema.name.removeprefix("aten::"), "random")
        return kind if kind in ("attention", "convolution") else "random"
    return KINDS.get(func._schema.name.removeprefix("aten::"), "pointwise")


def flops_of(func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> int:
    """Floating-point operations of a matrix product, convolution or attention (masked scores counted); 0 for others."""
    packet = func._overloadpacket
    if packet is aten._scaled_dot_product_flash_attention_for_cpu:
        return int(sdpa_flop_count(*(tuple(t.shape) for t in args[:3])))  # type: ignore[no-untyped-call] # in torch
    if packet is aten._scaled_dot_product_flash_attention_for_cpu_backward:
        return int(sdpa_backward_flop_count(*(tuple(t.shape) for t in args[:4])))  # type: ignore[no-untyped-call] # in torch
    if packet is aten._grouped_mm:
        rows, weight = args[0], args[1]
        # Every row meets one group's matrix; (M, T) x (T, N) sums over the rows T.
        return 2 * int(rows.numel()) * int(weight.shape[-1])
    formula = flop_registry.get(packet)
    return int(formula(*args, **kwargs, out_val=out)) if formula is not None else 0


def bytes_of(func: Any, inputs: Sequence[Tensor], outputs: Iterable[Tensor]) -> int:
    """Bytes an operator reads and writes, were nothing in a cache.

    Args:
        func: the operator.
        inputs: its tensor arguments.
        outputs: tensors it writes: its results, and arguments it changes in place.
    """
    name = func._schema.name.removeprefix("aten::")
    written = sum(map(_size, outputs))
    read = inputs[1:] if name in FILLS or name in GATHERS_FROM else inputs
    return written + sum(map(_size, read)) + (written if name in GATHERS_FROM else 0)


def _size(tensor: Tensor) -> int:
    """Bytes of a tensor's elements in memory; an expanded dimension has one."""
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= size if stride else min(size, 1)
    return elements * tensor.itemsize
