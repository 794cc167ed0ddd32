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

# Names of a linear attention's kernels beside those above: of its chunk loops, its tensors and the functions they call.
CHUNK_WORDS = frozenset(
    """
    ADD ALL Arguments BFloat16 CHUNK COMPUTE D DV D_COLUMNS Depth ELEMENT EXACT EXCLUSIVE FROM_ROW Floats K_rows
    K_strides LANES LANE_REGISTERS LEVELS NEGATIVE NO_FAULT NoDecay OF_A OF_B O_rows O_strides PAIRED_PRODUCTS
    PARTS PRODUCTS Pair Positions Q_rows Q_strides Real RowFactor RunningSum SEGMENT SIGN STATE_COLUMNS STRICT
    SUBTRACT SUMS Scratch Set TO TOKENS_AHEAD T_COLUMNS Tensor TokenDecay UP_TO_ROW V_COLUMNS V_rows V_strides
    WIDTH about add_diagonal add_outer add_products add_reads add_total aligned_alloc arguments attention
    attention_task axis b bad before before_token begin beta beta_given beta_given_rows beta_given_strides
    between_pairs bonuses c carried carried_gradient carried_reads chunk chunk_count chunk_start chunk_total
    chunks clear_accum clear_rows column corner count counts d dO_rows dO_strides d_beta d_beta_rows
    d_beta_strides d_bonuses d_bonuses_row d_decay d_decay_rows d_decay_strides d_decays d_decays_row d_erased
    d_erased_rounded d_erasers d_erasers_row d_final d_final_base d_final_columns d_final_rows d_final_strides
    d_initial d_initial_base d_initial_columns d_initial_rows d_initial_strides d_k d_k_rows d_k_strides d_keys
    d_keys_row d_out_last d_out_rounded d_output d_q d_q_rows d_q_strides d_queries d_queries_row d_state
    d_state_last d_state_rounded d_states d_states_base d_states_columns d_states_strides d_v d_v_rows d_v_strides
    d_values d_values_rounded d_values_row d_weights d_weights_rounded d_y decay decay_before decay_between
    decay_erases decay_given decay_given_rows decay_given_strides decay_pairs decay_reads decay_sums
    decay_sums_before decay_sums_end decay_whole decay_writes decays define diagonal_gradient do_not_specialize
    each earlier end erased erased_inverse erasers erasers_decayed exponentials far fault fault_in faults
    faults_strides fill final final_base final_columns final_rows final_strides first first_chunk floor_div found
    free from_token_on gradient gradient_task gram gram_gradient high high_j i include init initial initial_base
    initial_columns initial_rows initial_strides input_precision inside inverse inverse_of j k_group k_heads
    keep_states kept kept_rows keys_decayed later left_at_end left_in_all left_of length level linear_gradients
    linear_output linear_state_gradients linear_states load low low_j lower memory near next_task noinline none
    note_faults on_diagonal on_token other out_last out_row pack_pairs pair pairs places position positions power
    prefetch_row q_group q_heads queries queries_decayed read read_factors read_only read_row reader reads
    registers round_up rsqrt scale_rows scan scratch segment sequence sequence_count sequences series sigmoid
    solve solve_lower solve_turned solve_upper spare_rows spare_state square state state_last state_pairs
    state_rounded state_rows state_step states states_base states_columns states_strides stepped stepped_column
    store sum_decays sums sums_before sums_so_far t task tasks threads through through_state tilelang times_column
    decay_matrix matrix to token_step total total_of transpose_A transpose_B transpose_rows values_last values_rounded
    weight_sum weights_between
    weights_rounded where whole write write_row written y
    """.split()
)
