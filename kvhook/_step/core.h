/* The numbers of one engine core while it is recorded, and the steps that are under way in it. core_state.c keeps them,
   core_taps.c counts, core_writing.c writes. What is done in Python reads and sets the same numbers:
   kvhook/core/state.py. */

#ifndef KVHOOK_CORE_H
#define KVHOOK_CORE_H

#include "step.h"

/* The columns of a core step, in the order of CORE_STEP_FIELDS in kvhook/core_schema.py; kvhook/core/native.py compares
   them. */
#define CORE_COLUMNS(X)                                                                                                \
    X(step) X(stats_number) X(t_schedule_ns) X(t_scheduled_ns) X(t_update_ns) X(t_end_ns) X(num_scheduled_tokens)      \
    X(num_prefill_tokens) X(num_recomputed_tokens) X(num_decode_tokens) X(num_spec_tokens) X(token_budget)             \
    X(num_scheduled_reqs) X(num_prefill_reqs) X(num_new_reqs) X(num_resumed_reqs) X(num_preempted_reqs)                \
    X(num_finished_reqs) X(num_running_reqs) X(num_waiting_reqs) X(num_skipped_waiting_reqs) X(limited_by)             \
    X(num_kv_blocks) X(num_kv_blocks_allocated) X(num_kv_blocks_freed) X(num_kv_blocks_reused)                         \
    X(num_kv_blocks_revived) X(num_kv_blocks_evicted) X(num_kv_blocks_peak) X(num_kv_blocks_cached)                    \
    X(num_kv_blocks_empty) X(num_kv_blocks_used) X(num_kv_tokens) X(num_lookups) X(num_lookup_tokens)                  \
    X(num_found_tokens) X(prefix_cache_reset) X(kvhook_ns)

#define AS_CORE_COLUMN(name) COL_##name,
enum { CORE_COLUMNS(AS_CORE_COLUMN) NUM_CORE_COLUMNS };

/* The numbers that Python shares. */
#define CORE_NUMBERS(X)                                                                                                \
    X(n) X(step) X(updated) X(num_preempted) X(num_finished) X(stats_made) X(own_ns) X(allocated) X(freed) X(reused)   \
    X(revived) X(evicted) X(resets) X(cached) X(shared) X(lookups) X(looked_up) X(found)

/* Those that are counts of a step, in the order of `take` in kvhook/core/state.py, and the columns that they go to. */
#define CORE_COUNTS(X)                                                                                                 \
    X(num_preempted, num_preempted_reqs)                                                                               \
    X(num_finished, num_finished_reqs)                                                                                 \
    X(allocated, num_kv_blocks_allocated)                                                                              \
    X(freed, num_kv_blocks_freed)                                                                                      \
    X(reused, num_kv_blocks_reused)                                                                                    \
    X(revived, num_kv_blocks_revived)                                                                                  \
    X(evicted, num_kv_blocks_evicted)                                                                                  \
    X(lookups, num_lookups)                                                                                            \
    X(looked_up, num_lookup_tokens)                                                                                    \
    X(found, num_found_tokens)                                                                                         \
    X(resets, prefix_cache_reset)

/* What is read of vLLM, as expressions of the adapter's table, compiled. */
#define CORE_READS(X)                                                                                                  \
    X(tokens) X(total) X(drafts) X(new_reqs) X(budget) X(waiting) X(skipped) X(running) X(free) X(places) X(requests)  \
    X(computed)

/* Python's functions that do what is not done here. */
#define CORE_CALLS(X)                                                                                                  \
    X(failed) X(begin_lookups) X(end_lookups) X(scheduled) X(write) X(make_scheduled) X(write_finished) X(flush)       \
    X(look_up)

#define AS_NUMBER(name) int64_t name;
#define AS_READ(name) READ_##name,
#define AS_CALL(name) CALL_##name,
enum { CORE_READS(AS_READ) NUM_CORE_READS };
enum { CORE_CALLS(AS_CALL) NUM_CORE_CALLS };

/* A step between its schedule and its update. */
typedef struct {
    PyObject *output;
    PyObject *scheduled; /* Python's `Scheduled`, which Python writes; NULL: the columns are here */
    int64_t own_ns;
    int64_t columns[NUM_CORE_COLUMNS]; /* those that are known when it has been scheduled */
} Pending;

typedef struct {
    PyObject_HEAD
    CORE_NUMBERS(AS_NUMBER)
    char on, inside, looked;
    PyObject *behalf; /* the request that the block manager works for */
    /* a queue, of a power of two */
    Pending *pending;
    Py_ssize_t room, first, count;
    /* what follows is there once it is bound */
    bool bound, tokens_known;
    Output output;
    int64_t total, block_size;          /* blocks; tokens of a block */
    int64_t none_waiting, max_num_seqs; /* codes of what limits a batch */
    PyObject *output_argument;          /* the name of an argument of update_from_output */
    Program program;
    Cell *registers;
    Py_ssize_t num_registers, out_register, request_register, reads[NUM_CORE_READS];
    PyObject *prefilling, *preempted, *just_evicted, *finished, *events; /* the account's own dicts and lists */
    PyObject *calls[NUM_CORE_CALLS];
} CoreState;

/* One of the steps under way, from 0, the first. */
static inline Pending *core_pending(const CoreState *self, Py_ssize_t place)
{
    return &self->pending[(self->first + place) & (self->room - 1)];
}
/* Add what was counted since the last call to a step's columns. */
void core_take(CoreState *self, int64_t *columns);
/* Those columns as a tuple; NULL with an exception set. */
PyObject *core_counts(const int64_t *columns);
/* The next step under way: room for one more at the end of the queue; NULL with an exception set. */
Pending *core_push(CoreState *self);
/* Write the first of the steps under way, and drop it; -1 with an exception set. */
int core_write_first(CoreState *self, int64_t start, int64_t end, int64_t stats);
/* One number of vLLM's: false, and no exception, if it is no plain integer, or cannot be had. An exception that no
   Exception is stays set. */
bool core_read(CoreState *self, int which, int64_t *value);
/* A new reference, in the same way. */
PyObject *core_read_object(CoreState *self, int which);
void core_prefetch(const CoreState *self);

#endif
