/* The writing of an engine core's step when it is over: here if it did nothing but decode, by Python if Python has looked
   at it. */

#include "core.h"

static PyObject *numbers(const int64_t *from, const int *which, int count)
{
    PyObject *tuple = PyTuple_New(count);
    for (int i = 0; tuple != NULL && i < count; i++) {
        PyObject *number = PyLong_FromLongLong(from[which[i]]);
        if (number == NULL)
            Py_CLEAR(tuple);
        else
            PyTuple_SET_ITEM(tuple, i, number);
    }
    return tuple;
}

#define AS_COUNT(name, column) COL_##column,
PyObject *core_counts(const int64_t *columns)
{
    static const int counts[] = {CORE_COUNTS(AS_COUNT)};
    return numbers(columns, counts, sizeof counts / sizeof *counts);
}

/* Python's `Scheduled`, of a step whose columns are here. */
static PyObject *as_scheduled(const CoreState *self, const Pending *step)
{
    static const int batch[] = {COL_num_scheduled_tokens, COL_num_prefill_tokens, COL_num_recomputed_tokens,
                                COL_num_decode_tokens,    COL_num_spec_tokens,    COL_token_budget,
                                COL_num_scheduled_reqs,   COL_num_prefill_reqs,   COL_num_new_reqs,
                                COL_num_resumed_reqs};
    static const int states[] = {COL_num_running_reqs,   COL_num_waiting_reqs,     COL_num_skipped_waiting_reqs,
                                 COL_limited_by,         COL_num_kv_blocks,        COL_num_kv_blocks_peak,
                                 COL_num_kv_blocks_cached, COL_num_kv_blocks_empty, COL_num_kv_tokens};
    PyObject *one = numbers(step->columns, batch, sizeof batch / sizeof *batch), *result = NULL;
    PyObject *two = one ? numbers(step->columns, states, sizeof states / sizeof *states) : NULL;
    PyObject *three = two ? PyList_New(0) : NULL, *four = three ? core_counts(step->columns) : NULL;
    if (four != NULL)
        result = PyObject_CallFunction(self->calls[CALL_make_scheduled], "OLLLOOOLO", step->output,
                                       (long long)step->columns[COL_step], (long long)step->columns[COL_t_schedule_ns],
                                       (long long)step->columns[COL_t_scheduled_ns], one, two, three,
                                       (long long)step->own_ns, four);
    Py_XDECREF(one);
    Py_XDECREF(two);
    Py_XDECREF(three);
    Py_XDECREF(four);
    return result;
}

static int write_by_python(const CoreState *self, const Pending *step, int64_t start, int64_t end, int64_t stats)
{
    PyObject *scheduled = step->scheduled ? Py_NewRef(step->scheduled) : as_scheduled(self, step), *answer = NULL;
    if (scheduled != NULL)
        answer = PyObject_CallFunction(self->calls[CALL_write], "OLLL", scheduled, (long long)start, (long long)end,
                                       (long long)stats);
    Py_XDECREF(scheduled);
    Py_XDECREF(answer);
    return answer ? 0 : -1;
}

CORE_HOT static int write_here(CoreState *self, Pending *step, int64_t start, int64_t end, int64_t stats, int64_t free)
{
    int64_t *columns = step->columns;
    columns[COL_stats_number] = stats;
    columns[COL_t_update_ns] = start;
    columns[COL_t_end_ns] = end;
    columns[COL_num_kv_blocks_used] = self->total - free;
    columns[COL_kvhook_ns] = self->own_ns;
    /* with its update; one that had none is written when the update of another has been made */
    if (LIKELY(start >= 0))
        core_take(self, columns);
    columns[COL_prefix_cache_reset] = columns[COL_prefix_cache_reset] != 0;
    put_columns(&self->output, KIND_CORE_STEP, self->n, columns, NUM_CORE_COLUMNS);
    Cell n = cell_int(self->n);
    if (put_body(&self->output, &n) < 0)
        return -1;
    if (UNLIKELY(n.tag != INTEGER)) {
        cell_clear(&n);
        PyErr_SetString(PyExc_TypeError, "kvhook: publish(n, record) gives the number of the next record");
        return -1;
    }
    self->n = n.i;
    self->own_ns = step->own_ns;
    return 0;
}

CORE_HOT int core_write_first(CoreState *self, int64_t start, int64_t end, int64_t stats)
{
    Pending step = self->pending[self->first]; /* what is called may add another */
    self->first = (self->first + 1) & (self->room - 1);
    self->count--;
    self->updated = step.columns[COL_step];
    int64_t free;
    int result;
    if (LIKELY(step.scheduled == NULL) && core_read(self, READ_free, &free))
        result = write_here(self, &step, start, end, stats, free);
    else
        result = PyErr_Occurred() ? -1 : write_by_python(self, &step, start, end, stats);
    Py_XDECREF(step.scheduled);
    Py_XDECREF(step.output);
    return result;
}

void core_prefetch(const CoreState *self)
{
    prefetch_core_code();
    prefetch(self, sizeof *self);
    prefetch(self->registers, (size_t)self->num_registers * sizeof(Cell));
    prefetch(self->program.places, (size_t)self->program.num_places * sizeof(Place));
    prefetch(self->program.operations, (size_t)self->program.num_operations * sizeof(Operation));
    prefetch(self->output.body, (size_t)self->output.size);
    if (self->output.native)
        ring_prefetch(self->output.publish, self->n);
}
