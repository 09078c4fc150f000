"""Name the operations of torch that layers and attentions compute by, as function modes see them."""

SDPA = "scaled_dot_product_attention"
SDPA_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
MULTI_HEAD = "multi_head_attention_forward"

PRODUCTS = {"matmul", "__matmul__", "__rmatmul__", "bmm", "baddbmm", "einsum"}
MATRIX_LAYERS = {"linear", "addmm"}
CONVOLUTIONS = {f"conv{kind}{n}d" for kind in ("", "_transpose") for n in (1, 2, 3)}
AFFINE_NORMS = {"layer_norm", "rms_norm", "group_norm", "batch_norm", "instance_norm"}
"""Norms that take a scale and a bias."""
ACTIVATIONS = {
    "relu", "gelu", "silu", "mish", "elu", "celu", "selu", "leaky_relu", "prelu", "relu6", "softplus", "tanh",
    "sigmoid", "hardtanh", "hardswish", "hardsigmoid", "softsign",
}  # fmt: skip
"""Functions of single values; one that changes its tensor in place has `_` after its name."""
JOINS = {"cat", "concat", "concatenate"}
