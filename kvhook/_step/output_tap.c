/* OutputTap: what stands in an engine core's client in place of `get_output`. It gives what the original gives, and
   hands the outputs to the publisher on their way, as `take_from_core` (level full) and `tap_core` (level light) of
   kvhook/hooks/taps.py do.

   What happens seldom at level full (the first steps of an engine, outputs without stats) is left to the Python
   function `rest(outputs, stats, free, uncounted)`. */

#include "step.h"

#include <structmember.h>

typedef struct {
    PyObject_HEAD
    vectorcallfunc vectorcall;
    PyObject *get_output, *take, *failed;
    PyObject *num_free; /* NULL: the scheduler is in another process, so it is -1 */
    PyObject *first, *rest;                   /* level full */
    PyObject *count, *make_counts, *processor; /* level light */
    PyObject *counts;                         /* of the latest outputs that were counted; NULL: none yet */
    PyObject *clock;                          /* NULL: the monotonic clock */
    int64_t every, measure_every, steps, spent, counting;
    Place scheduler_stats, outputs, watching, request_states;
} OutputTap;

#define NAMES(X) X(engine_index) X(states) X(before)
#define AS_NAME(name) static PyObject *name_##name;
NAMES(AS_NAME)
#define AS_INTERNED(name)                                                                                              \
    if (name_##name == NULL && (name_##name = PyUnicode_InternFromString(#name)) == NULL)                              \
        return -1;

static int find_names(void)
{
    NAMES(AS_INTERNED)
    return 0;
}

static int64_t tap_clock(OutputTap *self)
{
    if (LIKELY(self->clock == NULL))
        return clock_ns();
    PyObject *now = PyObject_CallNoArgs(self->clock);
    int64_t value = now ? PyLong_AsLongLong(now) : -1;
    Py_XDECREF(now);
    return value;
}

/* getattr(outputs, "engine_index", 0) */
static PyObject *rank_of(PyObject *outputs)
{
    PyObject *rank;
#if PY_VERSION_HEX < 0x030D0000
    int found = _PyObject_LookupAttr(outputs, name_engine_index, &rank);
#else
    int found = PyObject_GetOptionalAttr(outputs, name_engine_index, &rank);
#endif
    return found == 0 ? PyLong_FromLong(0) : rank;
}

static PyObject *free_blocks(OutputTap *self)
{
    return self->num_free ? PyObject_CallNoArgs(self->num_free) : PyLong_FromLong(-1);
}

/* take(stats, counts, rank, spent, free, size): whether outputs wait that nobody has counted; -1 with an exception. */
HOT static int give(OutputTap *self, PyObject *stats, PyObject *counts, PyObject *rank, int64_t spent, PyObject *free,
                Py_ssize_t size)
{
    PyObject *args[7] = {NULL, stats, counts, rank, PyLong_FromLongLong(spent), free, PyLong_FromSsize_t(size)};
    PyObject *answer = NULL;
    if (args[4] != NULL && args[6] != NULL)
        answer = PyObject_Vectorcall(self->take, args + 1, 6 | PY_VECTORCALL_ARGUMENTS_OFFSET, NULL);
    int truth = answer ? PyObject_IsTrue(answer) : -1;
    Py_XDECREF(answer);
    Py_XDECREF(args[4]);
    Py_XDECREF(args[6]);
    return truth;
}

HOT static int look_full(OutputTap *self, PyObject *outputs)
{
    PyObject *stats = place_read(&self->scheduler_stats, outputs), *free = stats ? free_blocks(self) : NULL;
    PyObject *rank = free ? rank_of(outputs) : NULL, *watching = rank ? place_read(&self->watching, self->first) : NULL;
    PyObject *list = NULL, *answer = NULL;
    int result = -1, looks = watching ? PyObject_IsTrue(watching) : -1;
    if (looks == 0) {
        list = place_read(&self->outputs, outputs);
        Py_ssize_t size = list ? PyObject_Size(list) : -1;
        looks = size < 0 ? -1 : give(self, stats, Py_None, rank, 0, free, size);
    }
    if (looks == 0 && stats != Py_None)
        result = 0;
    else if (looks >= 0) {
        answer = PyObject_CallFunctionObjArgs(self->rest, outputs, stats, free, looks ? Py_True : Py_False, NULL);
        result = answer ? 0 : -1;
    }
    Py_XDECREF(answer);
    Py_XDECREF(list);
    Py_XDECREF(watching);
    Py_XDECREF(rank);
    Py_XDECREF(free);
    Py_XDECREF(stats);
    return result;
}

/* Counts() of these outputs: a new reference; NULL with an exception set. */
HOT static PyObject *counted(OutputTap *self, PyObject *list)
{
    PyObject *counts = PyObject_CallNoArgs(self->make_counts);
    PyObject *states = counts ? place_read(&self->request_states, self->processor) : NULL, *before = NULL;
    if (states != NULL && PyObject_SetAttr(counts, name_states, states) == 0) {
        Py_ssize_t size = PyObject_Size(states);
        before = size < 0 ? NULL : PyLong_FromSsize_t(size);
    }
    PyObject *args[4] = {NULL, list, states, counts}, *answer = NULL;
    if (before != NULL && PyObject_SetAttr(counts, name_before, before) == 0)
        answer = PyObject_Vectorcall(self->count, args + 1, 3 | PY_VECTORCALL_ARGUMENTS_OFFSET, NULL);
    Py_XDECREF(states);
    Py_XDECREF(before);
    if (answer == NULL)
        Py_CLEAR(counts);
    Py_XDECREF(answer);
    return counts;
}

static int64_t divided(int64_t a, int64_t b) { return a / b - (a % b != 0 && (a < 0) != (b < 0)); }

HOT static int look_light(OutputTap *self, PyObject *outputs)
{
    PyObject *list = NULL, *counts = NULL, *stats = NULL, *rank = NULL, *free = NULL;
    int result = -1;
    int64_t start = self->steps % self->measure_every ? 0 : tap_clock(self); /* as often as the publisher */
    if (PyErr_Occurred() || (list = place_read(&self->outputs, outputs)) == NULL)
        goto done;
    int any = PyObject_IsTrue(list);
    if (any < 0)
        goto done;
    if (any && self->steps % self->every == 0) {
        if ((counts = counted(self, list)) == NULL)
            goto done;
        Py_XSETREF(self->counts, Py_NewRef(counts));
        if (start) {
            self->counting = tap_clock(self) - start;
            start = tap_clock(self);
        }
    }
    self->steps++;
    stats = place_read(&self->scheduler_stats, outputs);
    rank = stats ? rank_of(outputs) : NULL;
    free = rank ? free_blocks(self) : NULL;
    if (free == NULL || give(self, stats, counts ? counts : Py_None, rank, self->spent, free, 0) < 0)
        goto done;
    if (start) /* the time for counting is spread over the steps in which nothing is counted */
        self->spent = divided(self->counting, self->every) + tap_clock(self) - start;
    result = PyErr_Occurred() ? -1 : 0;
done:
    Py_XDECREF(list);
    Py_XDECREF(counts);
    Py_XDECREF(stats);
    Py_XDECREF(rank);
    Py_XDECREF(free);
    return result;
}

HOT static PyObject *tap_call(PyObject *object, PyObject *const *args, size_t nargsf, PyObject *names)
{
    OutputTap *self = (OutputTap *)object;
    PyObject *outputs = PyObject_Vectorcall(self->get_output, args, nargsf, names);
    if (outputs == NULL)
        return NULL;
    prefetch_code();
    Py_INCREF(self); /* `failed` takes it out of the engine */
    int result = self->count ? look_light(self, outputs) : look_full(self, outputs);
    if (UNLIKELY(result < 0) && contain(self->failed, NULL) < 0)
        Py_CLEAR(outputs);
    Py_DECREF(self);
    return outputs;
}

static PyObject *unless_none(PyObject *object) { return object == Py_None ? NULL : Py_NewRef(object); }

static PyObject *tap_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *keywords[] = {"get_output", "take",        "failed",    "num_free", "first", "rest",
                               "count",      "make_counts", "processor", "clock",    "every", "measure_every", NULL};
    PyObject *given[10];
    for (int i = 4; i < 10; i++)
        given[i] = Py_None;
    long long every = 1, measure_every = 8;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOOO|$OOOOOOLL", keywords, &given[0], &given[1], &given[2],
                                     &given[3], &given[4], &given[5], &given[6], &given[7], &given[8], &given[9],
                                     &every, &measure_every) ||
        find_names() < 0)
        return NULL;
    if (every < 1 || measure_every < 1 || (given[4] == Py_None) == (given[6] == Py_None)) {
        PyErr_SetString(PyExc_ValueError, "kvhook: no such tap");
        return NULL;
    }
    OutputTap *self = (OutputTap *)type->tp_alloc(type, 0);
    if (self == NULL)
        return NULL;
    self->vectorcall = tap_call;
    PyObject **held[] = {&self->get_output, &self->take,        &self->failed,    &self->num_free, &self->first,
                         &self->rest,       &self->count,       &self->make_counts, &self->processor, &self->clock};
    for (int i = 0; i < 10; i++)
        *held[i] = unless_none(given[i]);
    self->every = every;
    self->measure_every = measure_every;
    if (place_begin(&self->scheduler_stats, "scheduler_stats") < 0 || place_begin(&self->outputs, "outputs") < 0 ||
        place_begin(&self->watching, "watching") < 0 || place_begin(&self->request_states, "request_states") < 0)
        Py_CLEAR(self);
    return (PyObject *)self;
}

static int tap_traverse(PyObject *object, visitproc visit, void *arg)
{
    OutputTap *self = (OutputTap *)object;
    Py_VISIT(self->get_output);
    Py_VISIT(self->take);
    Py_VISIT(self->failed);
    Py_VISIT(self->num_free);
    Py_VISIT(self->first);
    Py_VISIT(self->rest);
    Py_VISIT(self->count);
    Py_VISIT(self->make_counts);
    Py_VISIT(self->processor);
    Py_VISIT(self->clock);
    Py_VISIT(self->counts);
    return 0;
}

/* The client holds the tap, and the tap the client's method: a circle in which the others can be broken, but not these
   two. A tap that is called after that has an original that says so. */
static int tap_clear(PyObject *object)
{
    OutputTap *self = (OutputTap *)object;
    PyObject **held[] = {&self->get_output, &self->take, &self->failed, &self->first, &self->rest, &self->processor};
    for (size_t i = 0; i < sizeof held / sizeof *held; i++) {
        PyObject *old = *held[i];
        *held[i] = Py_NewRef(Py_None);
        Py_XDECREF(old);
    }
    return 0;
}

static void tap_dealloc(PyObject *object)
{
    OutputTap *self = (OutputTap *)object;
    PyTypeObject *type = Py_TYPE(object);
    PyObject_GC_UnTrack(object);
    PyObject *held[] = {self->get_output, self->take,        self->failed,    self->num_free, self->first,
                        self->rest,       self->count,       self->make_counts, self->processor, self->clock,
                        self->counts};
    for (size_t i = 0; i < sizeof held / sizeof *held; i++)
        Py_XDECREF(held[i]);
    Py_XDECREF(self->scheduler_stats.name);
    Py_XDECREF(self->outputs.name);
    Py_XDECREF(self->watching.name);
    Py_XDECREF(self->request_states.name);
    type->tp_free(object);
}

static PyMemberDef tap_members[] = {
    {"counts", T_OBJECT, offsetof(OutputTap, counts), READONLY, "of the latest outputs that were counted"},
    {NULL, 0, 0, 0, NULL},
};

PyTypeObject OutputTap_Type = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "kvhook._step.native.OutputTap",
    .tp_doc = "OutputTap(get_output, take, failed, num_free, *, first, rest) or (..., *, count, make_counts, processor)",
    .tp_basicsize = sizeof(OutputTap),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_HAVE_VECTORCALL,
    .tp_new = tap_new,
    .tp_dealloc = tap_dealloc,
    .tp_traverse = tap_traverse,
    .tp_clear = tap_clear,
    .tp_call = PyVectorcall_Call,
    .tp_vectorcall_offset = offsetof(OutputTap, vectorcall),
    .tp_members = tap_members,
};
