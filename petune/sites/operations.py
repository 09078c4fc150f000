"""Name the operations of torch by which attentions compute, as function modes see them."""

SDPA = "scaled_dot_product_attention"
SDPA_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
MULTI_HEAD = "multi_head_attention_forward"
