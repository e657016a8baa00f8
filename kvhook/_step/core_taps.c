/* CoreTap: what stands in place of methods inside an engine core. It does what the taps of kvhook/core/steps.py, pool.py
   and ledger.py do.

   A step that did nothing but decode is looked at, kept and written here. Everything else is handed to Python: a step
   with requests that are new, in their prefill or preempted, one that something else limits than the number of
   requests, and whatever is not as it usually is (a value that is no plain integer, an attribute that raises). Nothing
   has been changed by then, so that Python finds what it would have found without this file. */

#include "core.h"

#include <structmember.h>

typedef enum { SCHEDULE, UPDATE, MAKE_STATS, COUNT_NEW, ON_BEHALF, NUM_ROLES } Role;

static const char *const roles[] = {"schedule", "update_from_output", "make_stats", "get_new_blocks", "behalf"};

typedef struct {
    PyObject_HEAD
    vectorcallfunc vectorcall;
    PyObject *original;
    CoreState *state;
    Role role;
} CoreTap;

/* Counting has failed. 0 if the error ends here, -1 with an exception set if it does not. */
static int give_up(CoreState *state) { return contain(state->calls[CALL_failed], NULL); }

/* A function of Python's without arguments; -1 with an exception set. */
static int call(CoreState *state, int which)
{
    PyObject *answer = PyObject_CallNoArgs(state->calls[which]);
    Py_XDECREF(answer);
    return answer ? 0 : -1;
}

/* ---- schedule ----------------------------------------------------------------------------------------------------- */

/* Draft tokens of all requests; false if this is not a dictionary of lists. */
static bool count_drafts(PyObject *drafts, int64_t *count)
{
    if (drafts == Py_None)
        return true;
    if (drafts == NULL || !PyDict_CheckExact(drafts))
        return false;
    Py_ssize_t at = 0;
    PyObject *list;
    while (PyDict_Next(drafts, &at, NULL, &list)) {
        if (!PyList_CheckExact(list))
            return false;
        *count += PyList_GET_SIZE(list);
    }
    return true;
}

/* Tokens that the running requests hold; false if Python has to count them. */
CORE_HOT static bool count_held(CoreState *state, int64_t *held)
{
    int64_t twice;
    if (__builtin_mul_overflow(state->shared, state->block_size, &twice) || twice < 0)
        return false;
    *held = -twice; /* a block that several requests hold counts once: it is always a full one */
    PyObject *running = core_read_object(state, READ_requests);
    bool counted = running != NULL && PyList_CheckExact(running);
    Cell *request = &state->registers[state->request_register];
    for (Py_ssize_t i = 0; counted && i < PyList_GET_SIZE(running); i++) {
        int64_t tokens;
        PyObject *item = Py_NewRef(PyList_GET_ITEM(running, i));
        *request = (Cell){OBJECT, {.o = item}};
        counted = core_read(state, READ_computed, &tokens) && !__builtin_add_overflow(*held, tokens, held);
        *request = cell_int(0);
        Py_DECREF(item);
    }
    Py_XDECREF(running);
    return counted;
}

/* What the scheduler holds now, into columns; false if Python has to look at it. */
CORE_HOT static bool look_at_states(CoreState *state, int64_t *columns)
{
    int64_t free, places;
    if (!core_read(state, READ_budget, &columns[COL_token_budget]) ||
        !core_read(state, READ_waiting, &columns[COL_num_waiting_reqs]) ||
        !core_read(state, READ_skipped, &columns[COL_num_skipped_waiting_reqs]) ||
        !core_read(state, READ_running, &columns[COL_num_running_reqs]) || !core_read(state, READ_free, &free))
        return false;
    if (columns[COL_num_scheduled_tokens] >= columns[COL_token_budget])
        return false;
    columns[COL_limited_by] = state->none_waiting;
    if (columns[COL_num_waiting_reqs] != 0) {
        if (!core_read(state, READ_places, &places) || columns[COL_num_running_reqs] < places)
            return false;
        columns[COL_limited_by] = state->max_num_seqs;
    }
    columns[COL_num_kv_blocks] = state->total;
    columns[COL_num_kv_blocks_peak] = state->total - free;
    columns[COL_num_kv_blocks_cached] = state->cached;
    columns[COL_num_kv_blocks_empty] = free - state->cached;
    columns[COL_num_kv_tokens] = -1;
    return !state->tokens_known || count_held(state, &columns[COL_num_kv_tokens]);
}

/* The same for what was scheduled. */
CORE_HOT static bool look_at_output(CoreState *state, int64_t *columns)
{
    PyObject *tokens = NULL, *drafts = NULL, *new_reqs = NULL;
    int64_t *total = &columns[COL_num_scheduled_tokens], *spec = &columns[COL_num_spec_tokens];
    bool decodes = (tokens = core_read_object(state, READ_tokens)) != NULL && PyDict_CheckExact(tokens) &&
                   core_read(state, READ_total, total) && (drafts = core_read_object(state, READ_drafts)) != NULL &&
                   count_drafts(drafts, spec) && (new_reqs = core_read_object(state, READ_new_reqs)) != NULL &&
                   PyList_CheckExact(new_reqs) && PyList_GET_SIZE(new_reqs) == 0 && *total >= 0;
    if (decodes) {
        columns[COL_num_decode_tokens] = *total - *spec;
        columns[COL_num_scheduled_reqs] = PyDict_GET_SIZE(tokens);
        /* more than one token and its drafts: a request has lost what it had */
        decodes = columns[COL_num_decode_tokens] <= columns[COL_num_scheduled_reqs];
    }
    Py_XDECREF(tokens);
    Py_XDECREF(drafts);
    Py_XDECREF(new_reqs);
    return decodes;
}

/* Keep a step that only decodes; false if it is none, or not as it usually is. */
CORE_HOT static bool keep_here(CoreState *state, PyObject *output, int64_t start, int64_t end)
{
    int64_t columns[NUM_CORE_COLUMNS] = {0};
    columns[COL_step] = state->step;
    columns[COL_t_schedule_ns] = start;
    columns[COL_t_scheduled_ns] = end;
    state->registers[state->out_register] = (Cell){OBJECT, {.o = output}};
    bool decodes = look_at_output(state, columns) && look_at_states(state, columns);
    state->registers[state->out_register] = cell_int(0);
    Pending *pending = decodes ? core_push(state) : NULL;
    if (pending == NULL)
        return false;
    core_take(state, columns);
    pending->output = Py_NewRef(output);
    memcpy(pending->columns, columns, sizeof columns);
    state->step++;
    pending->own_ns = clock_ns() - end;
    return true;
}

CORE_HOT static int scheduled(CoreState *state, PyObject *output, int64_t start, int64_t end, int64_t preempted)
{
    if (UNLIKELY(state->looked) && call(state, CALL_end_lookups) < 0)
        return -1;
    bool usual = PyDict_GET_SIZE(state->prefilling) == 0 && PyDict_GET_SIZE(state->preempted) == 0 &&
                 PyList_GET_SIZE(state->just_evicted) == 0 && state->num_preempted == preempted;
    if (LIKELY(usual) && keep_here(state, output, start, end))
        return 0;
    if (PyErr_Occurred())
        return -1;
    PyObject *answer = PyObject_CallFunction(state->calls[CALL_scheduled], "OLLL", output, (long long)start,
                                             (long long)end, (long long)preempted);
    Py_XDECREF(answer);
    return answer ? 0 : -1;
}

CORE_HOT static PyObject *schedule(CoreTap *self, PyObject *const *args, size_t nargsf, PyObject *names)
{
    CoreState *state = self->state;
    int64_t start = clock_ns(), preempted = state->num_preempted;
    if (UNLIKELY(state->looked) && call(state, CALL_begin_lookups) < 0 && give_up(state) < 0)
        return NULL;
    PyObject *output = PyObject_Vectorcall(self->original, args, nargsf, names);
    if (output == NULL)
        return NULL;
    int64_t end = clock_ns();
    core_prefetch(state);
    if (UNLIKELY(state->bound && scheduled(state, output, start, end, preempted) < 0) && give_up(state) < 0)
        Py_CLEAR(output);
    return output;
}

/* ---- update_from_output ------------------------------------------------------------------------------------------- */

/* The argument that is the scheduler's output, borrowed; NULL with an exception set. */
static PyObject *output_of(const CoreState *state, PyObject *const *args, Py_ssize_t nargs, PyObject *names)
{
    if (LIKELY(nargs > 0))
        return args[0];
    for (Py_ssize_t i = 0; names != NULL && i < PyTuple_GET_SIZE(names); i++)
        if (PyUnicode_Compare(PyTuple_GET_ITEM(names, i), state->output_argument) == 0)
            return args[i];
    if (!PyErr_Occurred())
        PyErr_SetObject(PyExc_KeyError, state->output_argument);
    return NULL;
}

enum { LOOK_UP = 255 }; /* as in kvhook/core/steps.py */

CORE_HOT static int updated(CoreState *state, PyObject *output, int64_t start, int64_t end, int64_t stats)
{
    if (output == NULL)
        return -1;
    Py_ssize_t before = 0;
    while (before < state->count && UNLIKELY(core_pending(state, before)->output != output))
        before++;
    if (LIKELY(before < state->count)) { /* one that is not there was scheduled before kvhook came */
        for (; UNLIKELY(before > 0); before--)
            /* vLLM drops the result of a schedule that came out empty */
            if (core_write_first(state, -1, core_pending(state, 0)->columns[COL_t_scheduled_ns], -1) < 0)
                return -1;
        if (core_write_first(state, start, end, stats) < 0)
            return -1;
    }
    if (PyList_GET_SIZE(state->finished) && call(state, CALL_write_finished) < 0)
        return -1;
    if (PyList_GET_SIZE(state->events) && call(state, CALL_flush) < 0)
        return -1;
    if (UNLIKELY((state->step & LOOK_UP) == 0) && call(state, CALL_look_up) < 0)
        return -1;
    state->own_ns += clock_ns() - end;
    return 0;
}

CORE_HOT static PyObject *update(CoreTap *self, PyObject *const *args, size_t nargsf, PyObject *names)
{
    CoreState *state = self->state;
    int64_t start = clock_ns(), made = state->stats_made;
    state->inside = 1;
    PyObject *result = PyObject_Vectorcall(self->original, args, nargsf, names);
    state->inside = 0;
    if (result == NULL)
        return NULL;
    int64_t end = clock_ns();
    core_prefetch(state);
    if (state->bound) {
        PyObject *output = output_of(state, args, PyVectorcall_NARGS(nargsf), names);
        int64_t stats = state->stats_made > made ? made : -1;
        if (UNLIKELY(updated(state, output, start, end, stats) < 0) && give_up(state) < 0)
            Py_CLEAR(result);
    }
    return result;
}

/* ---- the others --------------------------------------------------------------------------------------------------- */

CORE_HOT static PyObject *make_stats(CoreTap *self, PyObject *const *args, size_t nargsf, PyObject *names)
{
    PyObject *stats = PyObject_Vectorcall(self->original, args, nargsf, names);
    if (stats != NULL && stats != Py_None)
        self->state->stats_made++;
    return stats;
}

CORE_HOT static PyObject *count_new(CoreTap *self, PyObject *const *args, size_t nargsf, PyObject *names)
{
    CoreState *state = self->state;
    int64_t before, after;
    bool known = core_read(state, READ_free, &before);
    if (!known && PyErr_Occurred())
        return NULL;
    PyObject *blocks = PyObject_Vectorcall(self->original, args, nargsf, names);
    if (blocks == NULL || !state->bound)
        return blocks;
    if (LIKELY(known && core_read(state, READ_free, &after)))
        state->allocated += before - after;
    else {
        if (!PyErr_Occurred())
            PyErr_SetString(PyExc_TypeError, "the number of free blocks is not an integer");
        if (give_up(state) < 0)
            Py_CLEAR(blocks);
    }
    return blocks;
}

/* Remember for which request the manager works. */
CORE_HOT static PyObject *on_behalf(CoreTap *self, PyObject *const *args, size_t nargsf, PyObject *names)
{
    CoreState *state = self->state;
    PyObject *before = state->behalf;
    state->behalf = PyVectorcall_NARGS(nargsf) > 0 ? Py_NewRef(args[0]) : NULL;
    Py_XDECREF(before);
    PyObject *result = PyObject_Vectorcall(self->original, args, nargsf, names);
    Py_CLEAR(state->behalf);
    return result;
}

CORE_HOT static PyObject *tap_call(PyObject *object, PyObject *const *args, size_t nargsf, PyObject *names)
{
    CoreTap *self = (CoreTap *)object;
    if (UNLIKELY(!self->state->on || !self->state->bound)) {
        /* somebody else's wrapper is over ours, and calls it */
        return PyObject_Vectorcall(self->original, args, nargsf, names);
    }
    PyObject *result;
    Py_INCREF(self); /* a failure takes it out of the engine */
    switch (self->role) {
    case SCHEDULE:
        result = schedule(self, args, nargsf, names);
        break;
    case UPDATE:
        result = update(self, args, nargsf, names);
        break;
    case MAKE_STATS:
        result = make_stats(self, args, nargsf, names);
        break;
    case COUNT_NEW:
        result = count_new(self, args, nargsf, names);
        break;
    default:
        result = on_behalf(self, args, nargsf, names);
    }
    Py_DECREF(self);
    return result;
}

/* ---- the type ----------------------------------------------------------------------------------------------------- */

static PyObject *tap_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"role", "original", "state", NULL};
    const char *role;
    PyObject *original, *state;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "sOO!", names, &role, &original, &CoreState_Type, &state))
        return NULL;
    int which = 0;
    while (which < NUM_ROLES && strcmp(role, roles[which]) != 0)
        which++;
    if (which == NUM_ROLES) {
        PyErr_Format(PyExc_ValueError, "kvhook: no such role, %s", role);
        return NULL;
    }
    CoreTap *self = (CoreTap *)type->tp_alloc(type, 0);
    if (self == NULL)
        return NULL;
    self->vectorcall = tap_call;
    self->original = Py_NewRef(original);
    self->state = (CoreState *)Py_NewRef(state);
    self->role = (Role)which;
    return (PyObject *)self;
}

/* To everybody else it looks like the original method. */
static PyObject *tap_getattr(PyObject *object, PyObject *name)
{
    PyObject *own = PyObject_GenericGetAttr(object, name);
    if (own != NULL || !PyErr_ExceptionMatches(PyExc_AttributeError))
        return own;
    PyErr_Clear();
    return PyObject_GetAttr(((CoreTap *)object)->original, name);
}

static int tap_traverse(PyObject *object, visitproc visit, void *arg)
{
    CoreTap *self = (CoreTap *)object;
    Py_VISIT(self->original);
    Py_VISIT(self->state);
    return 0;
}

/* A circle (the scheduler has the tap, the tap the scheduler's method) is broken by what else is in it: the scheduler's
   dictionary, and the state. A tap that is called after that still has its original. */
static void tap_dealloc(PyObject *object)
{
    CoreTap *self = (CoreTap *)object;
    PyTypeObject *type = Py_TYPE(object);
    PyObject_GC_UnTrack(object);
    Py_XDECREF(self->original);
    Py_XDECREF(self->state);
    type->tp_free(object);
}

static PyMemberDef tap_members[] = {
    {"__wrapped__", T_OBJECT_EX, offsetof(CoreTap, original), READONLY, "the original method"},
    {NULL, 0, 0, 0, NULL},
};

PyTypeObject CoreTap_Type = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "kvhook._step.native.CoreTap",
    .tp_doc = "CoreTap(role, original, state): in place of a method inside the engine core",
    .tp_basicsize = sizeof(CoreTap),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_HAVE_VECTORCALL,
    .tp_new = tap_new,
    .tp_dealloc = tap_dealloc,
    .tp_traverse = tap_traverse,
    .tp_call = PyVectorcall_Call,
    .tp_vectorcall_offset = offsetof(CoreTap, vectorcall),
    .tp_getattro = tap_getattr,
    .tp_members = tap_members,
};
