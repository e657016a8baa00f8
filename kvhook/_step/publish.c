/* One step's records: what `publish` does in the source that kvhook/adapters/source.py generates, in the same order,
   so that whatever fails in the one fails in the other at the same place. */

#include "publisher.h"

/* Have the processor fetch what this step's record will touch: code, plan, state, and the slot. After a forward pass
   none of it is in the caches; fetched one after the other, as they are needed, 100 lines of memory take 10 us, fetched
   at once a tenth of that. Called when the stats are handed over, a while before the step ends. */
void publisher_prefetch(const Publisher *self)
{
    const Program *program = &self->program;
    prefetch_code();
    prefetch(self->registers, (size_t)self->num_registers * sizeof(Cell));
    prefetch(self->statements, (size_t)self->num_statements * sizeof(Statement));
    prefetch(program->places, (size_t)program->num_places * sizeof(Place));
    prefetch(program->operations, (size_t)program->num_operations * sizeof(Operation));
    prefetch(program->constants, (size_t)program->num_constants * sizeof(Cell));
    prefetch(self->step.columns, (size_t)self->step.count * sizeof(Column));
    prefetch(self->step.types, (size_t)self->step.count);
    prefetch(self->output.body, (size_t)self->output.size);
    if (self->output.native && self->registers[REG_n].tag == INTEGER)
        ring_prefetch(self->output.publish, self->registers[REG_n].i);
}

HOT static int run_statements(Publisher *self)
{
    Cell *registers = self->registers;
    const Program *program = &self->program;
    for (Py_ssize_t at = 0; at < self->num_statements; at++) {
        const Statement *statement = &self->statements[at];
        Cell value;
        switch (statement->code) {
        case READ: /* SET to one attribute */
            value = place_cell(&program->places[statement->where], registers[statement->source]);
            break;
        case BLANK: /* SET to a constant */
            value = cell_copy(program->constants[statement->where]);
            break;
        case SET:
            value = program_run(program, statement->where, registers);
            break;
        default:
            if (statement->code == SKIP || cell_is_none(registers[statement->reg]))
                at = (Py_ssize_t)statement->where - 1;
            continue;
        }
        if (UNLIKELY(value.tag == EMPTY))
            return -1;
        cell_set(&registers[statement->reg], value);
    }
    return 0;
}

/* Evaluate the columns of a record, and store it. */
HOT static int put(Publisher *self, const RecordKind *kind)
{
    const Program *program = &self->program;
    const Cell *cells[MOST_COLUMNS];
    Cell computed[MOST_COLUMNS];
    int made = 0, result = -1;
    cells[0] = NULL;
    for (Py_ssize_t i = 0; i < kind->count; i++) {
        Column column = kind->columns[i];
        if (column.source == OF_REGISTER) /* most columns have been read by now */
            cells[i] = &self->registers[column.where];
        else if (column.source == OF_CONSTANT)
            cells[i] = &program->constants[column.where];
        else {
            computed[made] = program_run(program, column.where, self->registers);
            if (UNLIKELY(computed[made].tag == EMPTY))
                goto done;
            cells[i] = &computed[made++];
        }
    }
    result = put_record(&self->output, kind, &self->registers[REG_n], cells);
done:
    while (made > 0)
        cell_clear(&computed[--made]);
    return result;
}

static int put_request(Publisher *self, const RecordKind *kind)
{
    if (put(self, kind) < 0)
        return -1;
    Cell *number = &self->registers[REG_request_number];
    Cell next = cell_arithmetic('+', *number, cell_int(1));
    cell_set(number, next);
    return next.tag == EMPTY ? -1 : 0;
}

HOT static int put_lists(Publisher *self)
{
    for (Py_ssize_t i = 0; i < self->num_series; i++) {
        const Series *series = &self->series[i];
        if (cell_is_none(self->registers[series->root])) {
            Cell zero = cell_float(0.0);
            cell_set(&self->registers[series->count], cell_int(0));
            cell_set(&self->registers[series->min], zero);
            cell_set(&self->registers[series->max], zero);
            cell_set(&self->registers[series->sum], zero);
            continue;
        }
        Cell list = program_run(&self->program, series->program, self->registers);
        PyObject *values = list.tag == EMPTY ? NULL : cell_object(list);
        cell_clear(&list);
        if (values == NULL)
            return -1;
        int result = list_stats(series, values, self->registers, &self->values);
        Py_DECREF(values);
        if (result < 0)
            return -1;
    }
    return 0;
}

/* One finished request: an item of the list, or a row made of several lists. Takes the item over. */
static int put_item(Publisher *self, PyObject *item)
{
    if (self->rows < 0)
        cell_set(&self->registers[self->parts[0]], cell_take(item));
    else {
        bool fits = PyTuple_Check(item) && PyTuple_GET_SIZE(item) == self->num_parts;
        for (Py_ssize_t i = 0; fits && i < self->num_parts; i++)
            cell_set(&self->registers[self->parts[i]], cell_borrow(PyTuple_GET_ITEM(item, i)));
        Py_DECREF(item);
        if (!fits) {
            PyErr_SetString(PyExc_SystemError, "kvhook: a row of another length than it was made with");
            return -1;
        }
    }
    return put_request(self, &self->request);
}

HOT static int put_finished(Publisher *self)
{
    if (self->finished_root < 0)
        return 0;
    Cell *registers = self->registers;
    Cell finished = cell_is_none(registers[self->finished_root])
                        ? cell_take(PyTuple_New(0))
                        : program_run(&self->program, self->finished, registers);
    cell_set(&registers[REG_finished], finished);
    if (finished.tag == EMPTY)
        return -1;
    Cell rows = self->rows < 0 ? cell_copy(finished) : program_run(&self->program, self->rows, registers);
    PyObject *items = rows.tag == EMPTY ? NULL : cell_object(rows), *iterator = NULL, *item;
    cell_clear(&rows);
    if (items == NULL)
        return -1;
    int result = 0;
    if (LIKELY(PyList_CheckExact(items) || PyTuple_CheckExact(items))) {
        for (Py_ssize_t i = 0; result == 0 && i < PySequence_Fast_GET_SIZE(items); i++) {
            item = PySequence_Fast_GET_ITEM(items, i);
            Py_INCREF(item);
            result = put_item(self, item);
        }
    }
    else if ((iterator = PyObject_GetIter(items)) == NULL)
        result = -1;
    else {
        while (result == 0 && (item = PyIter_Next(iterator)) != NULL)
            result = put_item(self, item);
        if (result == 0 && PyErr_Occurred())
            result = -1;
    }
    Py_XDECREF(iterator);
    Py_DECREF(items);
    return result;
}

static int put_aborted(Publisher *self)
{
    if (PyList_GET_SIZE(self->aborted) == 0)
        return 0;
    if (self->gone.columns != NULL)
        for (Py_ssize_t i = 0; i < PyList_GET_SIZE(self->aborted); i++) {
            cell_set(&self->registers[REG_gone], cell_borrow(PyList_GET_ITEM(self->aborted, i)));
            if (put_request(self, &self->gone) < 0)
                return -1;
        }
    return PyList_SetSlice(self->aborted, 0, PyList_GET_SIZE(self->aborted), NULL);
}

Cell publisher_clock(const Publisher *self)
{
    return self->clock == NULL ? cell_int(clock_ns()) : cell_take(PyObject_CallNoArgs(self->clock));
}

/* In one of so many steps: what this step has taken, for the next record. */
static int measure(Publisher *self)
{
    Cell *registers = self->registers;
    Cell now = publisher_clock(self);
    if (now.tag == EMPTY)
        return -1;
    Cell since = cell_arithmetic('-', now, registers[REG_t_end_ns]);
    cell_clear(&now);
    if (since.tag == EMPTY)
        return -1;
    Cell took = cell_arithmetic('+', since, registers[REG_spent_ns]);
    cell_clear(&since);
    if (took.tag == EMPTY)
        return -1;
    cell_set(&registers[REG_kvhook_ns], took);
    if (self->on_sample == NULL)
        return 0;
    static const int given[] = {REG_n, REG_step, REG_request_number, REG_t_start_ns, REG_t_end_ns, REG_kvhook_ns};
    PyObject *arguments = PyTuple_New(6);
    for (int i = 0; arguments != NULL && i < 6; i++) {
        PyObject *object = cell_object(registers[given[i]]);
        if (object == NULL)
            Py_CLEAR(arguments);
        else
            PyTuple_SET_ITEM(arguments, i, object);
    }
    Cell answer = cell_take(arguments ? PyObject_Call(self->on_sample, arguments, NULL) : NULL);
    Py_XDECREF(arguments);
    if (answer.tag == EMPTY)
        return -1;
    cell_set(&registers[REG_vllm_stats_ns], answer);
    return 0;
}

/* The number of outputs that came for this step and that nobody counted; 0 if they were. */
Cell publisher_uncounted(const Publisher *self)
{
    if (self->uncounted < 0 || !cell_is_none(self->registers[self->uncounted]))
        return cell_int(0);
    return cell_copy(self->registers[REG_num_outputs]);
}

/* Whether the engine core sent outputs and stats for this step, and nobody counted the outputs; -1 with an exception. */
HOT static int outputs_are_lost(const Publisher *self)
{
    if (LIKELY(self->uncounted < 0 || self->take.count == 4 || !cell_is_none(self->registers[self->uncounted])))
        return 0;
    if (cell_is_none(self->registers[self->take.registers[0]]))
        return 0;
    return cell_true(self->registers[REG_num_outputs]);
}

static int tell_lost(const Publisher *self)
{
    PyObject *answer = PyObject_CallOneArg(self->orphan, Py_True);
    Py_XDECREF(answer);
    return answer ? 0 : -1;
}

HOT int publish_step(Publisher *self, Cell t_start_ns, Cell t_end_ns)
{
    Cell *registers = self->registers;
    cell_set(&registers[REG_t_start_ns], cell_copy(t_start_ns));
    cell_set(&registers[REG_t_end_ns], cell_copy(t_end_ns));
    cell_set(&registers[REG_num_aborted_reqs], cell_int(PyList_GET_SIZE(self->aborted)));
    int lost = outputs_are_lost(self);
    if (UNLIKELY(lost < 0))
        return -1;
    if (run_statements(self) < 0 || put_lists(self) < 0 || put_finished(self) < 0 || put_aborted(self) < 0 ||
        put(self, &self->step) < 0)
        return -1;
    static const int blank[] = {REG_kvhook_ns, REG_vllm_stats_ns, REG_num_free_kv_blocks};
    static const int zero[] = {REG_pending, REG_num_added_reqs, REG_scheduler_stats_logged};
    for (int i = 0; i < 3; i++) {
        cell_set(&registers[blank[i]], cell_int(-1));
        cell_set(&registers[zero[i]], cell_int(0));
    }
    for (Py_ssize_t i = 0; i < self->num_roots; i++)
        cell_set(&registers[self->roots[i]], cell_borrow(Py_None));
    Cell *step = &registers[REG_step];
    cell_set(step, cell_arithmetic('+', *step, cell_int(1)));
    if (step->tag == INTEGER && step->i % self->measure_every == 1 && measure(self) < 0)
        return -1;
    return UNLIKELY(lost) ? tell_lost(self) : 0;
}
