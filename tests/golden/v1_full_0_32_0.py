# What kvhook runs in every step of V1's LLMEngine at level full, vLLM 0.32.0. Generated: python -m tests.golden --write

def bind(publish_record, pack_step, pack_request, pack_values, clock, on_sample, orphan, n, step, request_number):
    pending = engine_index = spent_ns = num_added_reqs = scheduler_stats_logged = num_outputs = 0
    kvhook_ns = vllm_stats_ns = num_free_kv_blocks = -1
    aborted = []
    sched = iteration = mm = None

    def take(engine_idx=0, spent=0, num_free=-1, outputs=0):
        nonlocal pending, engine_index, spent_ns, num_free_kv_blocks, num_outputs
        if pending:
            if num_outputs and iteration is None:
                return True
            flush()
            orphan(False)
        pending = 1
        num_outputs = outputs
        num_free_kv_blocks = num_free
        spent_ns = spent
        engine_index = engine_idx or 0
        return False

    def record(scheduler_stats=None, iteration_stats=None, mm_cache_stats=None, engine_idx=None, spent=0, **_):
        nonlocal pending, engine_index, spent_ns, scheduler_stats_logged, sched, iteration, mm
        pending = 1
        sched = scheduler_stats
        iteration = iteration_stats
        mm = mm_cache_stats
        scheduler_stats_logged = 0 if scheduler_stats is None else 1
        spent_ns = spent
        engine_index = engine_idx or 0

    def publish_values(series, values):
        nonlocal n
        for i in range(0, len(values), 49):
            chunk = values[i : i + 49]
            count = len(chunk)
            chunk += [0.0] * (49 - count)
            n = publish_record(n, pack_values(n, 3, ENGINE, step, series, count, *chunk))

    def publish(t_start_ns, t_end_ns):
        nonlocal n, step, request_number, kvhook_ns, vllm_stats_ns, num_free_kv_blocks
        nonlocal pending, num_added_reqs, scheduler_stats_logged, sched, iteration, mm
        num_aborted_reqs = len(aborted)
        if sched is None:
            num_running_reqs = num_waiting_reqs = num_skipped_waiting_reqs = -1
            kv_cache_usage = nan
            prefix_cache_requests = prefix_cache_queries = prefix_cache_hits = prefix_cache_preempted_requests = prefix_cache_preempted_queries = prefix_cache_preempted_hits = prefix_cache_reset = connector_prefix_cache_queries = connector_prefix_cache_hits = num_drafts = num_draft_tokens = num_accepted_tokens = num_evicted_blocks_sampled = 0
            has_scheduler_stats = 0
        else:
            has_scheduler_stats = 1
            num_running_reqs = sched.num_running_reqs
            num_waiting_reqs = sched.num_waiting_reqs + sched.num_skipped_waiting_reqs
            num_skipped_waiting_reqs = sched.num_skipped_waiting_reqs
            kv_cache_usage = sched.kv_cache_usage
            num_evicted_blocks_sampled = len(sched.kv_cache_eviction_events)
            prefix = sched.prefix_cache_stats
            prefix_cache_requests = prefix.requests
            prefix_cache_queries = prefix.queries
            prefix_cache_hits = prefix.hits
            prefix_cache_preempted_requests = prefix.preempted_requests
            prefix_cache_preempted_queries = prefix.preempted_queries
            prefix_cache_preempted_hits = prefix.preempted_hits
            prefix_cache_reset = prefix.reset
            connector = sched.connector_prefix_cache_stats
            if connector is None:
                connector_prefix_cache_queries = connector_prefix_cache_hits = 0
            else:
                connector_prefix_cache_queries = connector.queries
                connector_prefix_cache_hits = connector.hits
            spec = sched.spec_decoding_stats
            if spec is None:
                num_drafts = num_draft_tokens = num_accepted_tokens = 0
            else:
                num_drafts = spec.num_drafts
                num_draft_tokens = spec.num_draft_tokens
                num_accepted_tokens = spec.num_accepted_tokens
        if iteration is None:
            num_prompt_tokens = num_prompt_tokens_computed = num_prompt_tokens_cached = num_prompt_tokens_external = num_generation_tokens = num_preempted_reqs = num_corrupted_reqs = 0
            has_iteration_stats = 0
        else:
            has_iteration_stats = 1
            num_generation_tokens = iteration.num_generation_tokens
            num_preempted_reqs = iteration.num_preempted_reqs
            num_corrupted_reqs = iteration.num_corrupted_reqs
            prompt = iteration.prompt_token_stats
            num_prompt_tokens = prompt.total
            num_prompt_tokens_computed = prompt.computed
            num_prompt_tokens_cached = prompt.cached_tokens
            num_prompt_tokens_external = prompt.external_kv_transfer
        if mm is None:
            mm_cache_queries = mm_cache_hits = 0
        else:
            mm_cache_queries = mm.queries
            mm_cache_hits = mm.hits
        values = iteration.time_to_first_tokens_iter if iteration is not None else ()
        ttft_count = len(values)
        if ttft_count == 1:
            ttft_min = ttft_max = ttft_sum = values[0]
        elif ttft_count:
            values = sorted(values)
            ttft_min = values[0]
            ttft_max = values[-1]
            if ttft_min == ttft_max:
                ttft_sum = ttft_max * ttft_count
            else:
                ttft_sum = sum(values)
                if ttft_count > 2:
                    publish_values(0, values)
        else:
            ttft_min = ttft_max = ttft_sum = 0.0
        values = iteration.inter_token_latencies_iter if iteration is not None else ()
        itl_count = len(values)
        if itl_count == 1:
            itl_min = itl_max = itl_sum = values[0]
        elif itl_count:
            values = sorted(values)
            itl_min = values[0]
            itl_max = values[-1]
            if itl_min == itl_max:
                itl_sum = itl_max * itl_count
            else:
                itl_sum = sum(values)
                if itl_count > 2:
                    publish_values(1, values)
        else:
            itl_min = itl_max = itl_sum = 0.0
        finished = iteration.finished_requests if iteration is not None else ()
        for request in finished:
            n = publish_record(n, pack_request(n, 2, ENGINE, request_number, id_number(request.request_id), 0, 0, -1, -1, step, t_end_ns, request.finish_reason, request.num_prompt_tokens, request.num_generation_tokens, request.num_cached_tokens, request.num_preemptions, number(request.max_tokens_param), request.queued_time, request.prefill_time, request.decode_time, request.inference_time, request.e2e_latency, getattr(request, 'kvhook_ttft', nan), request.mean_time_per_output_token))
            request_number += 1
        if aborted:
            for gone in aborted:
                n = publish_record(n, pack_request(n, 2, ENGINE, request_number, gone.request_id, gone.sample_index, gone.prompt_number, gone.label, gone.lora_name, step, t_end_ns, gone.finish_reason, gone.num_prompt_tokens, gone.num_generation_tokens, gone.num_cached_tokens, gone.num_preemptions, gone.max_tokens, gone.queued_time, gone.prefill_time, gone.decode_time, gone.inference_time, gone.e2e_latency, gone.time_to_first_token, gone.mean_time_per_output_token))
                request_number += 1
            aborted.clear()
        n = publish_record(n, pack_step(n, 1, ENGINE, step, engine_index, t_start_ns, t_end_ns, has_scheduler_stats, scheduler_stats_logged, has_iteration_stats, LEVEL, num_running_reqs, num_waiting_reqs, num_skipped_waiting_reqs, 999, int(kv_cache_usage * 999 + 0.5) if sched is not None else -1, -1, num_added_reqs, prefix_cache_requests, prefix_cache_queries, prefix_cache_hits, prefix_cache_preempted_requests, prefix_cache_preempted_queries, prefix_cache_preempted_hits, prefix_cache_reset, connector_prefix_cache_queries, connector_prefix_cache_hits, num_prompt_tokens, num_prompt_tokens_computed, num_prompt_tokens_cached, num_prompt_tokens_external, num_generation_tokens, num_preempted_reqs, len(finished) + num_aborted_reqs, num_aborted_reqs, num_corrupted_reqs, ttft_count, itl_count, num_drafts, num_draft_tokens, num_accepted_tokens, mm_cache_queries, mm_cache_hits, num_evicted_blocks_sampled, kvhook_ns, vllm_stats_ns, kv_cache_usage, nan, ttft_sum, ttft_min, ttft_max, itl_sum, itl_min, itl_max))
        kvhook_ns = vllm_stats_ns = num_free_kv_blocks = -1
        pending = num_added_reqs = scheduler_stats_logged = 0
        sched = iteration = mm = None
        step += 1
        if step % 8 == 1:
            kvhook_ns = clock() - t_end_ns + spent_ns
            vllm_stats_ns = on_sample(n, step, request_number, t_start_ns, t_end_ns, kvhook_ns)

    def add():
        nonlocal num_added_reqs
        num_added_reqs += 1

    abort = aborted.append

    def flush():
        nonlocal num_outputs
        if not (pending or aborted):
            return False
        num_outputs = 0
        now = clock()
        publish(now, now)
        return True

    def left():
        return Left(n, step, request_number, num_added_reqs, tuple(aborted), num_outputs if pending and num_outputs and iteration is None else 0)

    return record, publish, take, add, abort, flush, left
