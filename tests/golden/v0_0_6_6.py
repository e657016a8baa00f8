# What kvhook runs in every step of V0's LLMEngine, vLLM 0.6.6. Generated: python -m tests.golden --write

def bind(publish_record, pack_step, pack_request, pack_values, clock, on_sample, orphan, n, step, request_number):
    pending = engine_index = spent_ns = num_added_reqs = scheduler_stats_logged = num_outputs = 0
    kvhook_ns = vllm_stats_ns = num_free_kv_blocks = -1
    aborted = []
    v0 = None

    def take(engine_idx=0, spent=0, num_free=-1, outputs=0):
        nonlocal pending, engine_index, spent_ns, num_free_kv_blocks, num_outputs
        if pending:
            if num_outputs and v0 is None:
                return True
            flush()
            orphan(False)
        pending = 1
        num_outputs = outputs
        num_free_kv_blocks = num_free
        spent_ns = spent
        engine_index = engine_idx or 0
        return False

    def record(stats=None, engine_idx=None, spent=0, **_):
        nonlocal pending, engine_index, spent_ns, scheduler_stats_logged, v0
        pending = 1
        v0 = stats if v0 is None else merge(v0, stats)
        scheduler_stats_logged = 0 if stats is None else 1
        spent_ns = spent
        engine_index = engine_idx or 0

    def publish_values(series, values):
        nonlocal n
        for i in range(0, len(values), 33):
            chunk = values[i : i + 33]
            count = len(chunk)
            chunk += [0.0] * (33 - count)
            n = publish_record(n, pack_values(n, 3, ENGINE, step, series, count, *chunk))

    def publish(t_start_ns, t_end_ns):
        nonlocal n, step, request_number, kvhook_ns, vllm_stats_ns, num_free_kv_blocks
        nonlocal pending, num_added_reqs, scheduler_stats_logged, v0
        num_aborted_reqs = len(aborted)
        if v0 is None:
            num_running_reqs = num_waiting_reqs = num_swapped_reqs = -1
            kv_cache_usage = cpu_kv_cache_usage = v0_prefix_cache_hit_rate = nan
            num_prompt_tokens = num_generation_tokens = num_preempted_reqs = 0
            has_scheduler_stats = 0
            has_iteration_stats = 0
        else:
            has_scheduler_stats = 1
            has_iteration_stats = 1
            num_running_reqs = v0.num_running_sys
            num_waiting_reqs = v0.num_waiting_sys
            num_swapped_reqs = v0.num_swapped_sys
            kv_cache_usage = v0.gpu_cache_usage_sys if on_gpu else max(v0.gpu_cache_usage_sys, v0.cpu_cache_usage_sys)
            cpu_kv_cache_usage = v0.cpu_cache_usage_sys
            v0_prefix_cache_hit_rate = rate(v0.gpu_prefix_cache_hit_rate if on_gpu else max(v0.gpu_prefix_cache_hit_rate, v0.cpu_prefix_cache_hit_rate))
            num_prompt_tokens = v0.num_prompt_tokens_iter
            num_generation_tokens = int(v0.num_generation_tokens_iter)
            num_preempted_reqs = v0.num_preemption_iter
        values = v0.time_to_first_tokens_iter if v0 is not None else ()
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
        values = v0.time_per_output_tokens_iter if v0 is not None else ()
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
        finished = v0.time_e2e_requests if v0 is not None else ()
        for of_finish_reason, of_num_prompt_tokens, of_num_generation_tokens, of_max_tokens, of_queued_time, of_prefill_time, of_decode_time, of_inference_time, of_e2e_latency, of_time_to_first_token in zip(fit(list(map(reason, each(v0.finished_reason_requests, v0.n_requests, first))), len(finished), -1), fit(v0.num_prompt_tokens_requests, len(finished), -1), fit(each(v0.num_generation_tokens_requests, v0.n_requests, sum), len(finished), -1), fit(list(map(number, v0.max_tokens_requests)), len(finished), -1), fit(v0.time_queue_requests, len(finished), nan), fit(v0.time_prefill_requests, len(finished), nan), fit(v0.time_decode_requests, len(finished), nan), fit(v0.time_inference_requests, len(finished), nan), fit(v0.time_e2e_requests, len(finished), nan), fit(plus(v0.time_queue_requests, v0.time_prefill_requests), len(finished), nan)) if finished else ():
            n = publish_record(n, pack_request(n, 2, ENGINE, request_number, step, t_end_ns, of_finish_reason, of_num_prompt_tokens, of_num_generation_tokens, of_max_tokens, of_queued_time, of_prefill_time, of_decode_time, of_inference_time, of_e2e_latency, of_time_to_first_token))
            request_number += 1
        if aborted:
            for gone in aborted:
                n = publish_record(n, pack_request(n, 2, ENGINE, request_number, step, t_end_ns, gone.finish_reason, gone.num_prompt_tokens, gone.num_generation_tokens, gone.max_tokens, gone.queued_time, gone.prefill_time, gone.decode_time, gone.inference_time, gone.e2e_latency, gone.time_to_first_token))
                request_number += 1
            aborted.clear()
        n = publish_record(n, pack_step(n, 1, ENGINE, step, engine_index, t_start_ns, t_end_ns, has_scheduler_stats, scheduler_stats_logged, has_iteration_stats, LEVEL, num_running_reqs, num_waiting_reqs, 1000, int(kv_cache_usage * 1000 + 0.5) if v0 is not None else -1, -1, num_added_reqs, num_prompt_tokens, num_generation_tokens, num_preempted_reqs, len(finished) + num_aborted_reqs, num_aborted_reqs, ttft_count, itl_count, num_swapped_reqs, kvhook_ns, vllm_stats_ns, kv_cache_usage, nan, cpu_kv_cache_usage, v0_prefix_cache_hit_rate, ttft_sum, ttft_min, ttft_max, itl_sum, itl_min, itl_max))
        kvhook_ns = vllm_stats_ns = num_free_kv_blocks = -1
        pending = num_added_reqs = scheduler_stats_logged = 0
        v0 = None
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
        return Left(n, step, request_number, num_added_reqs, tuple(aborted), num_outputs if pending and num_outputs and v0 is None else 0)

    return record, publish, take, add, abort, flush, left
