"""Primitives of JAX that the table leaves out on purpose, each with the reason.

Nothing is lost but speed: like any unknown primitive they are given whole operands, priced as such, and named by
the printed plan. With this table, a test can tell a primitive that nobody has thought about from one that somebody has.
"""

from __future__ import annotations

from collections.abc import Mapping

_REASONS: dict[str, str] = {
    "works on mesh axes by name, so it stands only inside a `shard_map`": """
        all_gather all_gather_done all_gather_invariant all_gather_reduced all_gather_reduced_start all_gather_start
        all_to_all all_to_all_done all_to_all_start axis_index pgather pbroadcast pbroadcast_done pbroadcast_dynamic
        pbroadcast_start pmax pmin ppermute ppermute_done ppermute_start precv preduced psend psum psum_done
        psum_invariant psum_invariant_start psum_start pvary ragged_all_to_all reduce_scatter reduce_scatter_done
        reduce_scatter_start reduced_vary_cast reduced_vary_cast_p unreduced_pmax unreduced_pmin unreduced_psum
        unreduced_psum_start unreduced_reduce_scatter unreduced_reduce_scatter_start vary_unreduced_cast
        vary_unreduced_cast_p
    """,
    "reads, writes or makes a mutable reference, whose order in time a rule cannot tell": """
        accum_grad_in_ref addupdate box_get box_set create_linear empty_ref free_ref freeze get log_extend log_read
        new_box new_log new_ref pin run_state swap unpin
    """,
    "calls a kernel that JAX cannot look into; its author can teach its rule": """
        buffer_callback core_map cudnn_fusion ffi_call mpmd_map pallas_call rnn_bwd rnn_fwd
    """,
    "has a partitioner of its own, which XLA calls with layouts that jaxplan cannot foresee": """
        dot_product_attention_bwd dot_product_attention_bwd_wrapper
        dot_product_attention_fp8_bwd dot_product_attention_fp8_bwd_wrapper dot_product_attention_fp8_fwd
        dot_product_attention_fp8_fwd_wrapper dot_product_attention_fwd dot_product_attention_fwd_wrapper
        scaled_matmul scaled_matmul_wrapper
    """,
    "may become one kernel, whose blocks of scales would have to be cut with its operands; not yet checked": "scaled_dot",
    "calls functions that may do anything, and no equation says which dimensions they keep apart": """
        call call_exported call_hi_primitive call_hi_primitive_linearized composite custom_transpose_call
        eval_jaxpr fused_call linear_call remat_opt
    """,
    "exists only while derivatives are taken; no program that is run holds one": """
        custom_jvp_call_jaxpr custom_lin unreachable
    """,
    "is an error check, which `checkify` takes out of a program before it is run": "check",
    "is what `random_bits` of this generator becomes when it is compiled; programs hold `random_bits`, which is free": """
        philox2x32 philox4x32 threefry4x32
    """,
    "is scalar arithmetic on dimensions of unknown size, in exported programs alone": """
        dim_as_value dimension_size shape_assertion
    """,
    "stands only in the bodies of Pallas kernels": "broadcast_to with_memory_space_constraint",
    "tells the compiler about operands that other equations share; a layout would be overruled": """
        compute_on shard_alike xla_metadata_call xla_metadata_value
    """,
    "is part of `pmap`, which spreads its work over devices by itself": "full_to_shard shard_to_full xla_pmap",
    "moves between the arrays of one process and of all": """
        global_array_to_host_local_array host_local_array_to_global_array
    """,
    "is of a sparse format (`jax.experimental.sparse`), whose rows lie where data says": """
        bcoo_dot_general bcoo_dot_general_sampled bcoo_extract bcoo_fromdense bcoo_sort_indices bcoo_spdot_general
        bcoo_sum_duplicates bcoo_todense bcoo_transpose bcsr_dot_general bcsr_extract bcsr_fromdense bcsr_todense
        coo_fromdense coo_matmat coo_matvec coo_spmm coo_spmv coo_todense csr_fromdense csr_matmat csr_matvec csr_spmm
        csr_spmv csr_todense spsolve todense
    """,
}

DELIBERATELY_WHOLE: Mapping[str, str] = {name: reason for reason, names in _REASONS.items() for name in names.split()}
"""{name of a primitive, in any JAX that jaxplan runs with: why it has no rule}."""
