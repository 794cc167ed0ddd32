"""Names that lowered kernels give to their own variables: nothing of a user's, captured or local, may take one."""

from __future__ import annotations

KERNEL_WORDS = frozenset(
    """
    Q K V O dO dQ dK dV Delta dQ_parts query key value out d_out score logit masked_score masked_logit probs d_probs
    d_logit d_score d_query d_key d_value visible delta product scale q_idx kv_idx d_idx dv_idx q_start kv_start q_last
    kv_last q_len kv_len heads kv_heads batches batch head kv_head first_head group split splits q_begin q_end
    q_full_begin q_full_end kv_begin kv_end kv_full_begin kv_full_end kv_tiles tiles_per_split split_begin split_end
    batch_begin batch_end kv_head_begin kv_head_end
    row_is_empty tile_is_whole entry q_block kv_block partial_begin partial_end full_begin full_end partial_listed
    full_listed listed_blocks blocks_per_split partial_count partial_first partial_stop full_first full_stop
    partial_words seen part dQ_sums dK_parts dV_parts q_tiles q_next kv_next
    partial_out part_out scale_log2 turn tile_count tile_start tile_list tile_ranges tiles_of_head place sequence_order
    block_table K_scale V_scale kv_page kv_pages page_start
    token token_end first_token last_token first_tile tile_tokens tokens candidates indices topk importance
    partial_importance seen_by_a_head forced shares q_token to_row
    step q_steps kv_steps q_tile kv_tile q_rows kv_rows listed_tiles qi ki di vi T THREADS FULL_ROW DIM_QK DIM_V
    q_spans kv_spans q_first kv_first longest_q longest_kv tl triton kernel args lanes rows row block tile
    """.split()
)
