/* From a plan, a dictionary that `kvhook.adapters.program.Plan.as_dict` makes, to a publisher. Runs once per engine.

   The plan is kvhook's own, so a wrong one is a programming error; still every register and expression in it is
   checked, because a wrong index would reach beyond an array in every step. */

#include "publisher.h"

static PyObject *item(PyObject *plan, const char *name, PyTypeObject *type)
{
    PyObject *found = PyDict_GetItemString(plan, name);
    if (found == NULL || !PyObject_TypeCheck(found, type)) {
        PyErr_Format(PyExc_ValueError, "kvhook: the plan's %s is no %s", name, type->tp_name);
        return NULL;
    }
    return found;
}

/* A tuple of integers, each from `least` on and below `limit`. NULL with an exception set. */
static Py_ssize_t *numbers(PyObject *tuple, Py_ssize_t least, Py_ssize_t limit, Py_ssize_t *count)
{
    if (tuple == NULL || !PyTuple_Check(tuple)) {
        PyErr_SetString(PyExc_ValueError, "kvhook: the plan lacks a tuple of numbers");
        return NULL;
    }
    *count = PyTuple_GET_SIZE(tuple);
    Py_ssize_t *found = PyMem_Calloc((size_t)*count + 1, sizeof *found);
    if (found == NULL)
        PyErr_NoMemory();
    for (Py_ssize_t i = 0; found != NULL && i < *count; i++) {
        found[i] = PyLong_AsSsize_t(PyTuple_GET_ITEM(tuple, i));
        if (found[i] < least || found[i] >= limit) {
            if (!PyErr_Occurred())
                PyErr_Format(PyExc_ValueError, "kvhook: %zd is beyond what the plan has", found[i]);
            PyMem_Free(found);
            return NULL;
        }
    }
    return found;
}

static int number(PyObject *plan, const char *name, Py_ssize_t least, Py_ssize_t limit, Py_ssize_t *into)
{
    PyObject *found = item(plan, name, &PyLong_Type);
    if (found == NULL)
        return -1;
    *into = PyLong_AsSsize_t(found);
    if (*into < least || *into >= limit) {
        PyErr_Format(PyExc_ValueError, "kvhook: the plan's %s cannot be %zd", name, *into);
        return -1;
    }
    return 0;
}

/* Most expressions are one attribute, and most blanks one constant. */
static Statement set_statement(const Program *program, uint16_t reg, Py_ssize_t expression)
{
    const Operation *first = &program->operations[expression];
    bool one = first->code != OP_END && first[1].code == OP_END;
    if (one && first->code == OP_REGISTER_ATTRIBUTE)
        return (Statement){READ, reg, first->argument, first->place};
    if (one && first->code == OP_CONSTANT)
        return (Statement){BLANK, reg, 0, first->argument};
    return (Statement){SET, reg, 0, (uint32_t)expression};
}

/* The same for a column. */
static Column column_of(const Program *program, Py_ssize_t expression)
{
    const Operation *first = &program->operations[expression];
    bool one = first->code != OP_END && first[1].code == OP_END;
    if (one && first->code == OP_REGISTER)
        return (Column){OF_REGISTER, first->argument};
    if (one && first->code == OP_CONSTANT)
        return (Column){OF_CONSTANT, first->argument};
    return (Column){COMPUTED, (uint32_t)expression};
}

static int fill_statements(Publisher *self, PyObject *plan)
{
    PyObject *given = item(plan, "statements", &PyTuple_Type);
    if (given == NULL)
        return -1;
    Py_ssize_t size = PyTuple_GET_SIZE(given);
    self->statements = PyMem_Calloc((size_t)size + 1, sizeof *self->statements);
    for (Py_ssize_t i = 0; i < size; i++) {
        Py_ssize_t count, *three = numbers(PyTuple_GET_ITEM(given, i), 0, PY_SSIZE_T_MAX, &count);
        if (three == NULL)
            return -1;
        bool fits = count == 3 && three[0] < NUM_STATEMENTS && three[1] < self->num_registers;
        if (fits) {
            fits = three[0] == SET ? three[2] < self->program.num_operations : three[2] > i && three[2] <= size;
            if (fits && three[0] == SET)
                self->statements[i] = set_statement(&self->program, (uint16_t)three[1], three[2]);
            else
                self->statements[i] = (Statement){(uint16_t)three[0], (uint16_t)three[1], 0, (uint32_t)three[2]};
        }
        PyMem_Free(three);
        if (!fits) {
            PyErr_SetString(PyExc_ValueError, "kvhook: no such statement");
            return -1;
        }
    }
    self->num_statements = size;
    return 0;
}

static int fill_series(Publisher *self, PyObject *plan)
{
    PyObject *given = item(plan, "series", &PyTuple_Type);
    if (given == NULL)
        return -1;
    Py_ssize_t size = PyTuple_GET_SIZE(given);
    self->series = PyMem_Calloc((size_t)size + 1, sizeof *self->series);
    for (Py_ssize_t i = 0; i < size; i++) {
        Py_ssize_t count, *parts = numbers(PyTuple_GET_ITEM(given, i), 0, PY_SSIZE_T_MAX, &count);
        if (parts == NULL)
            return -1;
        bool fits = count == 7 && parts[2] < self->program.num_operations && parts[1] < self->num_registers;
        for (int k = 3; fits && k < 7; k++)
            fits = parts[k] < self->num_registers;
        if (fits)
            self->series[i] = (Series){parts[0], parts[1], parts[2], parts[3], parts[4], parts[5], parts[6]};
        PyMem_Free(parts);
        if (!fits) {
            PyErr_SetString(PyExc_ValueError, "kvhook: no such series");
            return -1;
        }
    }
    self->num_series = size;
    return 0;
}

/* A kind of record: (types, expressions, pack), or None. */
static int fill_kind(Publisher *self, PyObject *plan, const char *name, int32_t code, RecordKind *kind)
{
    PyObject *given = PyDict_GetItemString(plan, name), *programs;
    const char *types;
    Py_ssize_t size;
    if (given == Py_None)
        return 0;
    if (given == NULL || !PyTuple_Check(given)) {
        PyErr_Format(PyExc_ValueError, "kvhook: the plan has no %s", name);
        return -1;
    }
    if (!PyArg_ParseTuple(given, "s#OO", &types, &size, &programs, &kind->pack))
        return -1;
    Py_INCREF(kind->pack);
    kind->kind = code;
    Py_ssize_t *expressions = numbers(programs, 0, self->program.num_operations, &kind->count);
    kind->columns = expressions ? PyMem_Calloc((size_t)kind->count + 1, sizeof *kind->columns) : NULL;
    for (Py_ssize_t i = 0; kind->columns != NULL && i < kind->count; i++)
        kind->columns[i] = column_of(&self->program, expressions[i]);
    PyMem_Free(expressions);
    if (kind->columns == NULL)
        return -1;
    bool fits = kind->count == size && size <= MOST_COLUMNS && 8 * size <= self->output.size - (FIELDS_AT - BODY_AT);
    if (!fits || (kind->types = PyMem_Malloc((size_t)size + 1)) == NULL) {
        PyErr_Format(PyExc_ValueError, "kvhook: a slot does not hold the columns of a %s", name);
        return -1;
    }
    memcpy(kind->types, types, (size_t)size + 1);
    return 0;
}

/* The arguments of a function: (names, registers). */
static int fill_arguments(Publisher *self, PyObject *plan, const char *name, Arguments *arguments)
{
    PyObject *given = item(plan, name, &PyTuple_Type), *names, *registers;
    if (given == NULL || !PyArg_ParseTuple(given, "O!O", &PyTuple_Type, &names, &registers))
        return -1;
    Py_ssize_t *found = numbers(registers, -1, self->num_registers, &arguments->count);
    if (found == NULL)
        return -1;
    bool fits = arguments->count <= MOST_ARGUMENTS && PyTuple_GET_SIZE(names) == arguments->count &&
                arguments->count >= 1;
    if (fits)
        memcpy(arguments->registers, found, (size_t)arguments->count * sizeof *found);
    PyMem_Free(found);
    if (!fits) {
        PyErr_Format(PyExc_ValueError, "kvhook: no such arguments of %s", name);
        return -1;
    }
    arguments->names = PyTuple_New(arguments->count);
    for (Py_ssize_t i = 0; arguments->names != NULL && i < arguments->count; i++) {
        PyObject *text = Py_NewRef(PyTuple_GET_ITEM(names, i));
        PyUnicode_InternInPlace(&text);
        PyTuple_SET_ITEM(arguments->names, i, text);
    }
    return arguments->names ? 0 : -1;
}

static int fill_output(Publisher *self, const Given *given)
{
    PyObject *body = item(given->plan, "body_bytes", &PyLong_Type);
    self->output.publish = Py_NewRef(given->publish);
    self->output.native = Py_IS_TYPE(given->publish, &RingStore_Type);
    self->output.engine = given->engine;
    self->output.size = body ? PyLong_AsSsize_t(body) : 0;
    bool fits = self->output.size > FIELDS_AT - BODY_AT && self->output.size <= 1 << 16;
    if (fits && self->output.native)
        fits = ring_body_bytes(given->publish) == self->output.size;
    if (!fits) {
        PyErr_SetString(PyExc_ValueError, "kvhook: the plan is for slots of another size");
        return -1;
    }
    self->output.body = PyMem_Calloc((size_t)self->output.size, 1);
    return self->output.body ? 0 : -1;
}

static int fill_registers(Publisher *self, const Given *given)
{
    if (number(given->plan, "registers", NUM_STATE_REGISTERS, 4096, &self->num_registers) < 0)
        return -1;
    self->registers = PyMem_Calloc((size_t)self->num_registers, sizeof(Cell));
    if (self->registers == NULL) {
        self->num_registers = 0;
        PyErr_NoMemory();
        return -1;
    }
    for (Py_ssize_t i = 0; i < self->num_registers; i++)
        self->registers[i] = i < NUM_STATE_REGISTERS ? cell_int(0) : cell_borrow(Py_None);
    static const int from[] = {REG_n, REG_step, REG_request_number};
    for (int i = 0; i < 3; i++)
        self->registers[from[i]] = cell_borrow(given->start[i]);
    self->registers[REG_kvhook_ns] = self->registers[REG_vllm_stats_ns] = cell_int(-1);
    self->registers[REG_num_free_kv_blocks] = cell_int(-1);
    return 0;
}

static PyObject *unless_none(PyObject *object) { return object == Py_None ? NULL : Py_NewRef(object); }

int publisher_fill(Publisher *self, const Given *given)
{
    PyObject *plan = given->plan, *pack_values, *merge, *operations, *constants;
    Py_ssize_t from_core, every;
    self->aborted = PyList_New(0);
    self->clock = unless_none(given->clock);
    self->on_sample = unless_none(given->on_sample);
    self->orphan = Py_NewRef(given->orphan);
    self->left = Py_NewRef(given->left);
    if (self->aborted == NULL || fill_registers(self, given) < 0 || fill_output(self, given) < 0)
        return -1;
    if (!(operations = item(plan, "operations", &PyTuple_Type)) ||
        !(constants = item(plan, "constants", &PyTuple_Type)) ||
        program_parse(&self->program, operations, constants, self->num_registers) < 0)
        return -1;
    Py_ssize_t registers = self->num_registers, expressions = self->program.num_operations;
    if (fill_statements(self, plan) < 0 || fill_series(self, plan) < 0 ||
        fill_kind(self, plan, "step", KIND_STEP, &self->step) < 0 ||
        fill_kind(self, plan, "request", KIND_REQUEST, &self->request) < 0 ||
        fill_kind(self, plan, "gone", KIND_REQUEST, &self->gone) < 0 ||
        fill_arguments(self, plan, "record", &self->record) < 0 ||
        fill_arguments(self, plan, "take", &self->take) < 0 ||
        number(plan, "finished_root", -1, registers, &self->finished_root) < 0 ||
        number(plan, "finished", -1, expressions, &self->finished) < 0 ||
        number(plan, "rows", -1, expressions, &self->rows) < 0 ||
        number(plan, "logged", -1, self->record.count, &self->logged) < 0 ||
        number(plan, "uncounted", -1, registers, &self->uncounted) < 0 ||
        number(plan, "from_core", 0, 2, &from_core) < 0 || number(plan, "measure_every", 2, 1 << 20, &every) < 0 ||
        number(plan, "values_per_slot", 1, (self->output.size - (FIELDS_AT - BODY_AT)) / 8 - 2,
               &self->values.room) < 0)
        return -1;
    self->roots = numbers(PyDict_GetItemString(plan, "roots"), 0, registers, &self->num_roots);
    self->parts = self->roots ? numbers(PyDict_GetItemString(plan, "parts"), 0, registers, &self->num_parts) : NULL;
    if (self->parts == NULL)
        return -1;
    bool sound = self->step.columns != NULL && self->take.count >= 4;
    if (self->finished_root >= 0)
        sound = sound && self->finished >= 0 && self->num_parts >= 1 && self->request.columns != NULL;
    if (!sound || (pack_values = PyDict_GetItemString(plan, "pack_values")) == NULL ||
        (merge = PyDict_GetItemString(plan, "merge")) == NULL) {
        PyErr_SetString(PyExc_ValueError, "kvhook: the plan is not complete");
        return -1;
    }
    self->from_core = from_core;
    self->measure_every = every;
    self->values.output = &self->output;
    self->values.pack = Py_NewRef(pack_values);
    self->merge = unless_none(merge);
    return 0;
}

static void free_kind(RecordKind *kind)
{
    PyMem_Free(kind->columns);
    PyMem_Free(kind->types);
    Py_XDECREF(kind->pack);
}

void publisher_free(Publisher *self)
{
    PyMem_Free(self->registers);
    PyMem_Free(self->statements);
    PyMem_Free(self->series);
    PyMem_Free(self->roots);
    PyMem_Free(self->parts);
    PyMem_Free(self->output.body);
    free_kind(&self->step);
    free_kind(&self->request);
    free_kind(&self->gone);
    program_clear(&self->program);
    Py_XDECREF(self->output.publish);
    Py_XDECREF(self->values.pack);
    Py_XDECREF(self->aborted);
    Py_XDECREF(self->clock);
    Py_XDECREF(self->on_sample);
    Py_XDECREF(self->orphan);
    Py_XDECREF(self->left);
    Py_XDECREF(self->merge);
    Py_XDECREF(self->record.names);
    Py_XDECREF(self->take.names);
}
