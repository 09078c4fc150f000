"""Find the parts of any ViT by structure: one traced forward, never a class name.

In the order in which `find_sites` (find.py) asks them:

1. What the model takes: example.py, input_size.py, input_spec.py, tensor_spec.py.
2. One forward, without adapters and without a trace of it (undisturbed.py, forward.py): recorder.py fills the record of
   trace.py with calls; sums.py, flattened.py and flow.py follow the tensors between them.
3. Blocks: attentions.py pairs each attention with its MLP; blocks.py tries the shapes of a block in turn; stream.py,
   find_mlp.py, attention_span.py, branch_norms.py and last_sum.py find what is inside; branches.py, split_mlps.py,
   listed_layers.py and own_modules.py know blocks with several branches or without a module of their own.
4. Heads: heads.py decides between heads_by_user.py, heads_by_library.py, and heads_by_trace.py with predictors.py;
   towers_in_heads.py takes encoders out of them; layers_before_head.py names what is between.
5. The rest: grid.py and patch_order.py (patches), towers.py, final_norms.py, outside_blocks.py, own_layers.py.

The result is plain data: site.py, sites.py.
"""
