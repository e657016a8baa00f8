/* CoreState: the numbers of an engine core that is recorded, and the steps under way in it. The same numbers as in
   kvhook/core/state.py; what is done with them in Python is the same for both. */

#include "core.h"

#include <structmember.h>

/* ---- the steps under way ----------------------------------------------------------------------------------------- */

CORE_HOT Pending *core_push(CoreState *self)
{
    if (UNLIKELY(self->count == self->room)) {
        Py_ssize_t room = self->room ? 2 * self->room : 4;
        Pending *pending = PyMem_Calloc((size_t)room, sizeof *pending);
        if (pending == NULL) {
            PyErr_NoMemory();
            return NULL;
        }
        for (Py_ssize_t i = 0; i < self->count; i++)
            pending[i] = self->pending[(self->first + i) & (self->room - 1)];
        PyMem_Free(self->pending);
        self->pending = pending;
        self->room = room;
        self->first = 0;
    }
    Pending *last = &self->pending[(self->first + self->count++) & (self->room - 1)];
    last->output = last->scheduled = NULL;
    return last;
}

#define AS_ADDED(name, column) columns[COL_##column] += self->name;
#define AS_TAKEN(name, column) self->name = 0;
CORE_HOT void core_take(CoreState *self, int64_t *columns)
{
    CORE_COUNTS(AS_ADDED)
    CORE_COUNTS(AS_TAKEN)
}

/* take(): the same for Python, as a tuple. */
static PyObject *take(PyObject *object, PyObject *Py_UNUSED(nothing))
{
    int64_t columns[NUM_CORE_COLUMNS] = {0};
    core_take((CoreState *)object, columns);
    return core_counts(columns);
}

/* push(scheduled): a step that Python has looked at, and will write. */
static PyObject *push(PyObject *object, PyObject *scheduled)
{
    if (!PyTuple_Check(scheduled) || PyTuple_GET_SIZE(scheduled) < 4) {
        PyErr_SetString(PyExc_TypeError, "kvhook: a step that is under way is a tuple: output, step, two times ...");
        return NULL;
    }
    int64_t step = PyLong_AsLongLong(PyTuple_GET_ITEM(scheduled, 1));
    int64_t when = PyLong_AsLongLong(PyTuple_GET_ITEM(scheduled, 3));
    if (PyErr_Occurred())
        return NULL;
    Pending *last = core_push((CoreState *)object);
    if (last == NULL)
        return NULL;
    last->output = Py_NewRef(PyTuple_GET_ITEM(scheduled, 0));
    last->scheduled = Py_NewRef(scheduled);
    last->columns[COL_step] = step;
    last->columns[COL_t_scheduled_ns] = when;
    Py_RETURN_NONE;
}

/* ---- reading ------------------------------------------------------------------------------------------------------ */

/* An error says that this is no case for C: Python looks at it, and meets it again. */
static void leave_it_to_python(void)
{
    if (PyErr_Occurred() && !is_users_error())
        PyErr_Clear();
}

CORE_HOT bool core_read(CoreState *self, int which, int64_t *value)
{
    Cell cell = program_run(&self->program, self->reads[which], self->registers);
    if (LIKELY(cell.tag == INTEGER)) {
        *value = cell.i;
        return true;
    }
    cell_clear(&cell);
    leave_it_to_python();
    return false;
}

CORE_HOT PyObject *core_read_object(CoreState *self, int which)
{
    Cell cell = program_run(&self->program, self->reads[which], self->registers);
    if (LIKELY(cell.tag == OBJECT))
        return cell.o;
    leave_it_to_python();
    return NULL;
}

/* ---- binding ------------------------------------------------------------------------------------------------------ */

static int bind_calls(CoreState *self, PyObject *calls)
{
#define AS_TEXT(name) #name,
    static const char *const names[] = {CORE_CALLS(AS_TEXT)};
    for (int i = 0; i < NUM_CORE_CALLS; i++) {
        PyObject *function = PyDict_GetItemString(calls, names[i]);
        if (function == NULL) {
            PyErr_Format(PyExc_KeyError, "kvhook: %s is missing", names[i]);
            return -1;
        }
        self->calls[i] = Py_NewRef(function);
    }
    return 0;
}

static int bind_program(CoreState *self, PyObject *operations, PyObject *constants, PyObject *registers, PyObject *reads)
{
    static const char *const names[] = {CORE_READS(AS_TEXT)};
    self->num_registers = PyTuple_GET_SIZE(registers);
    self->registers = PyMem_Calloc((size_t)self->num_registers + 1, sizeof(Cell));
    if (self->registers == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    for (Py_ssize_t i = 0; i < self->num_registers; i++)
        self->registers[i] = cell_borrow(PyTuple_GET_ITEM(registers, i));
    /* these two are filled while there is something to be read, and own nothing */
    cell_set(&self->registers[self->out_register], cell_int(0));
    cell_set(&self->registers[self->request_register], cell_int(0));
    if (program_parse(&self->program, operations, constants, self->num_registers) < 0)
        return -1;
    for (int i = 0; i < NUM_CORE_READS; i++) {
        PyObject *start = PyDict_GetItemString(reads, names[i]);
        self->reads[i] = start ? PyLong_AsSsize_t(start) : -1;
        if (self->reads[i] < 0 || self->reads[i] >= self->program.num_operations) {
            if (!PyErr_Occurred())
                PyErr_Format(PyExc_ValueError, "kvhook: nothing says how %s is read", names[i]);
            return -1;
        }
    }
    return 0;
}

/* bind(...): what is needed to do the short way here. Once. */
static PyObject *bind(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"publish",      "body_bytes", "engine",       "total",  "block_size",   "tokens_known",
                            "none_waiting", "max_num_seqs", "output_argument", "operations", "constants", "reads", "registers", "output",
                            "request",      "prefilling", "preempted",    "just_evicted", "finished", "events",
                            "calls",        NULL};
    CoreState *self = (CoreState *)object;
    PyObject *publish, *operations, *constants, *reads, *registers, *prefilling, *preempted, *evicted, *finished;
    PyObject *events, *calls, *argument;
    Py_ssize_t size, out, request;
    long long total, block_size, none_waiting, max_num_seqs;
    int engine, tokens_known;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "$OniLLpLLUO!O!O!O!nnO!O!O!O!O!O!", names, &publish, &size, &engine,
                                     &total, &block_size, &tokens_known, &none_waiting, &max_num_seqs, &argument, &PyTuple_Type, &operations,
                                     &PyTuple_Type, &constants, &PyDict_Type, &reads, &PyTuple_Type, &registers, &out,
                                     &request, &PyDict_Type, &prefilling, &PyDict_Type, &preempted, &PyList_Type,
                                     &evicted, &PyList_Type, &finished, &PyList_Type, &events, &PyDict_Type, &calls))
        return NULL;
    Py_ssize_t count = PyTuple_GET_SIZE(registers);
    bool native = Py_IS_TYPE(publish, &RingStore_Type);
    if (self->bound || self->registers != NULL || size < FIELDS_AT - BODY_AT + 8 * NUM_CORE_COLUMNS || out < 0 ||
        out >= count || request < 0 || request >= count || (native && ring_body_bytes(publish) != size)) {
        PyErr_SetString(PyExc_ValueError, "kvhook: an engine core's counting cannot be bound so");
        return NULL;
    }
    self->output.publish = Py_NewRef(publish);
    self->output.native = native;
    self->output.size = size;
    self->output.engine = engine;
    self->output.body = PyMem_Calloc((size_t)size, 1);
    self->total = total;
    self->block_size = block_size;
    self->none_waiting = none_waiting;
    self->max_num_seqs = max_num_seqs;
    self->output_argument = Py_NewRef(argument);
    self->tokens_known = tokens_known;
    self->out_register = out;
    self->request_register = request;
    self->prefilling = Py_NewRef(prefilling);
    self->preempted = Py_NewRef(preempted);
    self->just_evicted = Py_NewRef(evicted);
    self->finished = Py_NewRef(finished);
    self->events = Py_NewRef(events);
    if (self->output.body == NULL) {
        PyErr_NoMemory();
        return NULL;
    }
    if (bind_calls(self, calls) < 0 || bind_program(self, operations, constants, registers, reads) < 0)
        return NULL;
    self->bound = true;
    Py_RETURN_NONE;
}

/* ---- the type ----------------------------------------------------------------------------------------------------- */

static PyObject *state_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {NULL};
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "", names))
        return NULL;
    CoreState *self = (CoreState *)type->tp_alloc(type, 0);
    if (self != NULL)
        self->own_ns = self->updated = -1;
    return (PyObject *)self;
}

static int state_traverse(PyObject *object, visitproc visit, void *arg)
{
    CoreState *self = (CoreState *)object;
    for (Py_ssize_t i = 0; i < self->count; i++) {
        Pending *step = &self->pending[(self->first + i) & (self->room - 1)];
        Py_VISIT(step->output);
        Py_VISIT(step->scheduled);
    }
    for (Py_ssize_t i = 0; self->registers != NULL && i < self->num_registers; i++)
        if (self->registers[i].tag == OBJECT && i != self->out_register && i != self->request_register)
            Py_VISIT(self->registers[i].o);
    for (int i = 0; i < NUM_CORE_CALLS; i++)
        Py_VISIT(self->calls[i]);
    Py_VISIT(self->behalf);
    Py_VISIT(self->output.publish);
    Py_VISIT(self->prefilling);
    Py_VISIT(self->preempted);
    Py_VISIT(self->just_evicted);
    Py_VISIT(self->finished);
    Py_VISIT(self->events);
    return program_visit(&self->program, visit, arg);
}

/* Everything is let go of; what calls it after that finds that it is off. */
static int state_clear(PyObject *object)
{
    CoreState *self = (CoreState *)object;
    self->on = 0;
    self->bound = false;
    while (self->count > 0) {
        Pending step = self->pending[self->first];
        self->first = (self->first + 1) & (self->room - 1);
        self->count--;
        Py_XDECREF(step.output);
        Py_XDECREF(step.scheduled);
    }
    if (self->registers != NULL) {
        Cell *registers = self->registers;
        self->registers = NULL;
        for (Py_ssize_t i = 0; i < self->num_registers; i++)
            cell_clear(&registers[i]); /* those of the output and the request are None here */
        PyMem_Free(registers);
    }
    for (int i = 0; i < NUM_CORE_CALLS; i++)
        Py_CLEAR(self->calls[i]);
    Py_CLEAR(self->behalf);
    Py_CLEAR(self->prefilling);
    Py_CLEAR(self->preempted);
    Py_CLEAR(self->just_evicted);
    Py_CLEAR(self->finished);
    Py_CLEAR(self->events);
    return 0;
}

static void state_dealloc(PyObject *object)
{
    CoreState *self = (CoreState *)object;
    PyTypeObject *type = Py_TYPE(object);
    PyObject_GC_UnTrack(object);
    state_clear(object);
    program_clear(&self->program);
    Py_CLEAR(self->output.publish);
    Py_CLEAR(self->output_argument);
    PyMem_Free(self->output.body);
    PyMem_Free(self->pending);
    type->tp_free(object);
}

static PyObject *get_behalf(PyObject *object, void *Py_UNUSED(nothing))
{
    PyObject *behalf = ((CoreState *)object)->behalf;
    return Py_NewRef(behalf ? behalf : Py_None);
}

static PyMethodDef state_methods[] = {
    {"take", take, METH_NOARGS, "take(): what was counted since the last call"},
    {"push", push, METH_O, "push(scheduled): a step that Python has looked at, and will write"},
    {"bind", (PyCFunction)(void (*)(void))bind, METH_VARARGS | METH_KEYWORDS, "what the short way needs to be done here"},
    {NULL, NULL, 0, NULL},
};

#define AS_MEMBER(name) {#name, T_LONGLONG, offsetof(CoreState, name), 0, NULL},
static PyMemberDef state_members[] = {
    CORE_NUMBERS(AS_MEMBER){"on", T_BOOL, offsetof(CoreState, on), 0, "whether anything is counted"},
    {"inside", T_BOOL, offsetof(CoreState, inside), 0, "whether an update_from_output is under way"},
    {"looked", T_BOOL, offsetof(CoreState, looked), 0, "whether a request was looked up since the last schedule began"},
    {NULL, 0, 0, 0, NULL},
};

static PyGetSetDef state_getset[] = {
    {"behalf", get_behalf, NULL, "the request that the block manager works for, or None", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

PyTypeObject CoreState_Type = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "kvhook._step.native.CoreState",
    .tp_doc = "CoreState(): the numbers of an engine core that is recorded, see kvhook/core/state.py",
    .tp_basicsize = sizeof(CoreState),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .tp_new = state_new,
    .tp_methods = state_methods,
    .tp_members = state_members,
    .tp_getset = state_getset,
    .tp_traverse = state_traverse,
    .tp_clear = state_clear,
    .tp_dealloc = state_dealloc,
};
