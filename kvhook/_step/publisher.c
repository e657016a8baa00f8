/* The publisher as an object of Python's: made from a plan (kvhook/adapters/program.py), with the functions of
   `StepFunctions` as its methods. They do what the generated source does, see kvhook/adapters/source.py. */

#include "publisher.h"

/* ---- arguments ------------------------------------------------------------------------------------------------ */

/* Sort arguments by name into `into` (borrowed; NULL where one is not given). Names that are not known are passed
   over or refused, as `**_` does or its absence. */
HOT static int sort_arguments(const Arguments *wanted, PyObject *const *args, Py_ssize_t nargs, PyObject *names,
                          PyObject **into, bool pass_over)
{
    if (nargs > wanted->count) {
        PyErr_Format(PyExc_TypeError, "%zd arguments were given, at most %zd are taken", nargs, wanted->count);
        return -1;
    }
    for (Py_ssize_t i = 0; i < wanted->count; i++)
        into[i] = i < nargs ? args[i] : NULL;
    for (Py_ssize_t k = 0; names != NULL && k < PyTuple_GET_SIZE(names); k++) {
        PyObject *name = PyTuple_GET_ITEM(names, k);
        Py_ssize_t i = 0;
        while (i < wanted->count && PyTuple_GET_ITEM(wanted->names, i) != name) /* both are interned */
            i++;
        if (UNLIKELY(i == wanted->count)) {
            i = 0;
            while (i < wanted->count && PyUnicode_Compare(PyTuple_GET_ITEM(wanted->names, i), name) != 0)
                i++;
        }
        if (i == wanted->count && pass_over)
            continue;
        if (i == wanted->count || into[i] != NULL) {
            PyErr_Format(PyExc_TypeError, "argument %R is not known, or was given twice", name);
            return -1;
        }
        into[i] = args[nargs + k];
    }
    return 0;
}

static void set_object(Publisher *self, int reg, PyObject *object)
{
    cell_set(&self->registers[reg], cell_borrow(object));
}

/* `value or 0` */
HOT static int set_index(Publisher *self, PyObject *value)
{
    int truth = value == NULL ? 0 : PyObject_IsTrue(value);
    if (truth < 0)
        return -1;
    cell_set(&self->registers[REG_engine_index], truth ? cell_borrow(value) : cell_int(0));
    return 0;
}

/* ---- the functions of the step path ---------------------------------------------------------------------------- */

HOT static PyObject *record(PyObject *object, PyObject *const *args, Py_ssize_t nargs, PyObject *names)
{
    Publisher *self = (Publisher *)object;
    const Arguments *wanted = &self->record; /* behind vLLM's, engine_idx among them, comes `spent` */
    PyObject *given[MOST_ARGUMENTS], *index = NULL;
    publisher_prefetch(self);
    if (sort_arguments(wanted, args, nargs, names, given, true) < 0)
        return NULL;
    cell_set(&self->registers[REG_pending], cell_int(1));
    for (Py_ssize_t i = 0; i < wanted->count - 1; i++) {
        Py_ssize_t reg = wanted->registers[i];
        PyObject *value = given[i] ? given[i] : Py_None;
        if (reg == REG_engine_index)
            index = given[i];
        else if (reg >= 0 && self->merge != NULL && !cell_is_none(self->registers[reg])) {
            PyObject *before = cell_object(self->registers[reg]);
            Cell both = cell_take(PyObject_CallFunctionObjArgs(self->merge, before, value, NULL));
            Py_DECREF(before);
            if (both.tag == EMPTY)
                return NULL;
            cell_set(&self->registers[reg], both);
        }
        else if (reg >= 0)
            set_object(self, (int)reg, value);
    }
    bool logged = self->logged >= 0 && given[self->logged] != NULL && given[self->logged] != Py_None;
    cell_set(&self->registers[REG_scheduler_stats_logged], cell_int(logged));
    if (!self->from_core) {
        PyObject *spent = given[wanted->count - 1];
        cell_set(&self->registers[REG_spent_ns], spent ? cell_borrow(spent) : cell_int(0));
        if (set_index(self, index) < 0)
            return NULL;
    }
    Py_RETURN_NONE;
}

HOT int publisher_publish(PyObject *publisher, Cell t_start_ns, Cell t_end_ns)
{
    return publish_step((Publisher *)publisher, t_start_ns, t_end_ns);
}

static PyObject *publish(PyObject *object, PyObject *const *args, Py_ssize_t nargs)
{
    if (nargs != 2) {
        PyErr_SetString(PyExc_TypeError, "publish(t_start_ns, t_end_ns) takes two arguments");
        return NULL;
    }
    Cell start = cell_borrow(args[0]), end = cell_borrow(args[1]);
    int result = publish_step((Publisher *)object, start, end);
    cell_clear(&start);
    cell_clear(&end);
    if (result < 0)
        return NULL;
    Py_RETURN_NONE;
}

/* 1 if something was published, 0 if nothing waited, -1 with an exception set. */
static int flush_what_waits(Publisher *self)
{
    if (!cell_true(self->registers[REG_pending]) && PyList_GET_SIZE(self->aborted) == 0)
        return 0;
    cell_set(&self->registers[REG_num_outputs], cell_int(0));
    Cell now = publisher_clock(self);
    int result = now.tag == EMPTY ? -1 : publish_step(self, now, now);
    cell_clear(&now);
    return result < 0 ? -1 : 1;
}

static PyObject *flush(PyObject *object, PyObject *Py_UNUSED(nothing))
{
    int result = flush_what_waits((Publisher *)object);
    return result < 0 ? NULL : PyBool_FromLong(result);
}

HOT static PyObject *take(PyObject *object, PyObject *const *args, Py_ssize_t nargs, PyObject *names)
{
    Publisher *self = (Publisher *)object;
    const Arguments *wanted = &self->take; /* the last four: engine_idx, spent, num_free, outputs */
    PyObject *given[MOST_ARGUMENTS];
    publisher_prefetch(self);
    if (sort_arguments(wanted, args, nargs, names, given, false) < 0)
        return NULL;
    if (cell_true(self->registers[REG_pending])) {
        Cell outputs = publisher_uncounted(self);
        int waits = cell_true(outputs);
        cell_clear(&outputs);
        if (waits < 0)
            return NULL;
        if (waits)
            Py_RETURN_TRUE;
        if (flush_what_waits(self) < 0)
            return NULL;
        PyObject *answer = PyObject_CallOneArg(self->orphan, Py_False);
        if (answer == NULL)
            return NULL;
        Py_DECREF(answer);
    }
    PyObject **rest = given + wanted->count - 4;
    cell_set(&self->registers[REG_pending], cell_int(1));
    cell_set(&self->registers[REG_num_outputs], rest[3] ? cell_borrow(rest[3]) : cell_int(0));
    for (Py_ssize_t i = 0; i < wanted->count - 4; i++)
        set_object(self, (int)wanted->registers[i], given[i] ? given[i] : Py_None);
    cell_set(&self->registers[REG_num_free_kv_blocks], rest[2] ? cell_borrow(rest[2]) : cell_int(-1));
    cell_set(&self->registers[REG_spent_ns], rest[1] ? cell_borrow(rest[1]) : cell_int(0));
    if (set_index(self, rest[0]) < 0)
        return NULL;
    Py_RETURN_FALSE;
}

static PyObject *add(PyObject *object, PyObject *Py_UNUSED(nothing))
{
    Cell *added = &((Publisher *)object)->registers[REG_num_added_reqs];
    cell_set(added, cell_arithmetic('+', *added, cell_int(1)));
    Py_RETURN_NONE;
}

static PyObject *abort_request(PyObject *object, PyObject *request)
{
    if (PyList_Append(((Publisher *)object)->aborted, request) < 0)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *left(PyObject *object, PyObject *Py_UNUSED(nothing))
{
    Publisher *self = (Publisher *)object;
    static const int registers[] = {REG_n, REG_step, REG_request_number, REG_num_added_reqs};
    Cell outputs = cell_true(self->registers[REG_pending]) ? publisher_uncounted(self) : cell_int(0);
    PyObject *arguments = PyTuple_New(6), *result = NULL;
    for (int i = 0; arguments != NULL && i < 6; i++) {
        PyObject *value = i < 4    ? cell_object(self->registers[registers[i]])
                          : i == 4 ? PyList_AsTuple(self->aborted)
                                   : cell_object(outputs);
        if (value == NULL)
            Py_CLEAR(arguments);
        else
            PyTuple_SET_ITEM(arguments, i, value);
    }
    cell_clear(&outputs);
    if (arguments != NULL)
        result = PyObject_Call(self->left, arguments, NULL);
    Py_XDECREF(arguments);
    return result;
}

#define KEYWORDS(function) ((PyCFunction)(void (*)(void))(function))

static PyMethodDef methods[] = {
    {"record", KEYWORDS(record), METH_FASTCALL | METH_KEYWORDS, "what vLLM's loggers are given"},
    {"publish", KEYWORDS(publish), METH_FASTCALL, "publish(t_start_ns, t_end_ns): the step is over"},
    {"take", KEYWORDS(take), METH_FASTCALL | METH_KEYWORDS, "what the engine core sent"},
    {"add", add, METH_NOARGS, "a request was added"},
    {"abort", abort_request, METH_O, "a request was aborted"},
    {"flush", flush, METH_NOARGS, "publish what waits; whether anything did"},
    {"left", left, METH_NOARGS, "the numbers of the next record, and what waits for it"},
    {NULL, NULL, 0, NULL},
};

PyObject *publisher_of(PyObject *callable)
{
    bool is_publish = PyCFunction_CheckExact(callable) &&
                      PyCFunction_GET_FUNCTION(callable) == (PyCFunction)(void (*)(void))publish;
    return is_publish ? PyCFunction_GET_SELF(callable) : NULL;
}

/* ---- the type -------------------------------------------------------------------------------------------------- */

static PyObject *publisher_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"plan", "publish", "clock", "on_sample", "orphan", "left", "engine", "start", NULL};
    Given given = {NULL};
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O!OOOOOi(OOO)", names, &PyDict_Type, &given.plan, &given.publish,
                                     &given.clock, &given.on_sample, &given.orphan, &given.left, &given.engine,
                                     &given.start[0], &given.start[1], &given.start[2]))
        return NULL;
    Publisher *self = (Publisher *)type->tp_alloc(type, 0);
    if (self != NULL && publisher_fill(self, &given) < 0)
        Py_CLEAR(self);
    return (PyObject *)self;
}

static int traverse(PyObject *object, visitproc visit, void *arg)
{
    Publisher *self = (Publisher *)object;
    for (Py_ssize_t i = 0; i < self->num_registers; i++)
        if (self->registers[i].tag == OBJECT)
            Py_VISIT(self->registers[i].o);
    Py_VISIT(self->output.publish);
    Py_VISIT(self->aborted);
    Py_VISIT(self->clock);
    Py_VISIT(self->on_sample);
    Py_VISIT(self->orphan);
    Py_VISIT(self->left);
    Py_VISIT(self->merge);
    return program_visit(&self->program, visit, arg);
}

/* Breaks circles. A method that is called after that (by another's finalizer) finds nothing to do, or raises. */
static int clear(PyObject *object)
{
    Publisher *self = (Publisher *)object;
    for (Py_ssize_t i = 0; i < self->num_registers; i++)
        if (self->registers[i].tag == OBJECT)
            cell_set(&self->registers[i], cell_borrow(Py_None));
    PyObject **held[] = {&self->orphan, &self->left};
    for (int i = 0; i < 2; i++) {
        PyObject *old = *held[i];
        *held[i] = Py_NewRef(Py_None);
        Py_XDECREF(old);
    }
    Py_CLEAR(self->clock);
    Py_CLEAR(self->on_sample);
    return 0;
}

static void dealloc(PyObject *object)
{
    Publisher *self = (Publisher *)object;
    PyTypeObject *type = Py_TYPE(object);
    PyObject_GC_UnTrack(object);
    for (Py_ssize_t i = 0; i < self->num_registers; i++)
        cell_clear(&self->registers[i]);
    publisher_free(self);
    type->tp_free(object);
}

PyTypeObject Publisher_Type = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "kvhook._step.native.Publisher",
    .tp_doc = "The functions of the step path, from a plan: see kvhook/adapters/program.py",
    .tp_basicsize = sizeof(Publisher),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .tp_new = publisher_new,
    .tp_methods = methods,
    .tp_traverse = traverse,
    .tp_clear = clear,
    .tp_dealloc = dealloc,
};
