/* Records: from cells to bytes, and out.

   Numbers are packed here. A record with anything else in it (an integer of numpy's, a None where a number should be,
   a float in a column of integers) goes through the `struct` packer that the Python path uses, and so gives the same
   bytes or the same exception. */

#include "step.h"

/* n + 1 in n's place, from what `publish` has returned. */
static int published(Cell *n, PyObject *next)
{
    Cell number = cell_take(next);
    if (number.tag == OBJECT) {
        cell_clear(&number);
        PyErr_SetString(PyExc_TypeError, "kvhook: publish(n, record) gives the number of the next record");
    }
    if (number.tag == EMPTY)
        return -1;
    *n = number;
    return 0;
}

static int put_bytes(Output *output, Cell *n, PyObject *record)
{
    PyObject *number = cell_object(*n);
    if (number == NULL)
        return -1;
    PyObject *next = PyObject_CallFunctionObjArgs(output->publish, number, record, NULL);
    Py_DECREF(number);
    return published(n, next);
}

/* What stands in `output->body`. */
BOTH_HOT int put_body(Output *output, Cell *n)
{
    if (LIKELY(output->native)) {
        ring_store(output->publish, n->i, output->body);
        n->i++;
        return 0;
    }
    PyObject *record = PyBytes_FromStringAndSize((const char *)output->body, output->size);
    if (record == NULL)
        return -1;
    int result = put_bytes(output, n, record);
    Py_DECREF(record);
    return result;
}

static void put_head(Output *output, int64_t n, int32_t kind)
{
    memcpy(output->body, &n, 8);
    memcpy(output->body + 8, &kind, 4);
    memcpy(output->body + 12, &output->engine, 4);
}

/* Pack by Python's struct: n, kind, engine, and these cells. */
static int put_by_struct(Output *output, PyObject *pack, Cell *n, int32_t kind, const Cell *const *cells,
                         Py_ssize_t count)
{
    PyObject *arguments = PyTuple_New(3 + count), *record = NULL;
    int result = -1;
    if (arguments == NULL)
        return -1;
    Cell head[3] = {*n, cell_int(kind), cell_int(output->engine)};
    for (Py_ssize_t i = 0; i < 3 + count; i++) {
        PyObject *object = cell_object(i < 3 ? head[i] : *cells[i - 3]);
        if (object == NULL)
            goto done;
        PyTuple_SET_ITEM(arguments, i, object);
    }
    record = PyObject_Call(pack, arguments, NULL);
    if (record != NULL)
        result = put_bytes(output, n, record);
done:
    Py_XDECREF(record);
    Py_DECREF(arguments);
    return result;
}

/* One cell as the eight bytes of its column; false if only Python can say. Calls nothing. */
static inline bool pack_cell(const Cell *cell, char type, void *into)
{
    if (type == 'q') {
        int64_t value;
        if (LIKELY(cell->tag == INTEGER))
            value = cell->i;
        else if (cell->tag == OBJECT && PyLong_Check(cell->o)) { /* a bool, a member of an IntEnum */
            int overflow;
            value = PyLong_AsLongLongAndOverflow(cell->o, &overflow);
            if (overflow)
                return false;
        }
        else
            return false;
        memcpy(into, &value, 8);
        return true;
    }
    double value;
    if (LIKELY(cell->tag == FLOAT))
        value = cell->d;
    else if (cell->tag == INTEGER)
        value = (double)cell->i;
    else if (cell->tag == OBJECT && PyFloat_Check(cell->o)) /* also numpy's float64 */
        value = PyFloat_AS_DOUBLE(cell->o);
    else
        return false;
    memcpy(into, &value, 8);
    return true;
}

HOT int put_record(Output *output, const RecordKind *kind, Cell *n, const Cell *const *cells)
{
    if (LIKELY(n->tag == INTEGER)) {
        uint8_t *at = output->body + (FIELDS_AT - BODY_AT);
        Py_ssize_t i = 0;
        while (i < kind->count && pack_cell(cells[i], kind->types[i], at))
            i++, at += 8;
        if (LIKELY(i == kind->count)) {
            put_head(output, n->i, kind->kind);
            memset(at, 0, (size_t)(output->body + output->size - at));
            return put_body(output, n);
        }
    }
    return put_by_struct(output, kind->pack, n, kind->kind, cells, kind->count);
}

CORE_HOT void put_columns(Output *output, int32_t kind, int64_t n, const int64_t *columns, Py_ssize_t count)
{
    uint8_t *at = output->body + (FIELDS_AT - BODY_AT);
    put_head(output, n, kind);
    memcpy(at, columns, (size_t)count * 8);
    at += count * 8;
    memset(at, 0, (size_t)(output->body + output->size - at));
}

int put_values(Output *output, Cell *n, Cell step, int64_t series, const double *values, Py_ssize_t count,
               Py_ssize_t room)
{
    for (Py_ssize_t first = 0; first < count; first += room) {
        int64_t head[3] = {step.i, series, count - first < room ? count - first : room};
        uint8_t *at = output->body + (FIELDS_AT - BODY_AT);
        put_head(output, n->i, KIND_VALUES);
        memcpy(at, head, sizeof head);
        memcpy(at + sizeof head, values + first, (size_t)head[2] * 8);
        at += sizeof head + (size_t)head[2] * 8;
        memset(at, 0, (size_t)(output->body + output->size - at));
        if (put_body(output, n) < 0)
            return -1;
    }
    return 0;
}

int put_value_objects(Output *output, PyObject *pack, Cell *n, Cell step, int64_t series, PyObject *values,
                      Py_ssize_t room)
{
    Py_ssize_t count = PyList_GET_SIZE(values);
    Cell *cells = PyMem_Calloc((size_t)room + 3, sizeof(Cell));
    const Cell **places = PyMem_Calloc((size_t)room + 3, sizeof *places);
    int result = cells && places ? 0 : -1;
    if (result < 0)
        PyErr_NoMemory();
    for (Py_ssize_t i = 0; result == 0 && i < room + 3; i++)
        places[i] = &cells[i];
    for (Py_ssize_t first = 0; result == 0 && first < count; first += room) {
        Py_ssize_t size = count - first < room ? count - first : room;
        cells[0] = cell_copy(step);
        cells[1] = cell_int(series);
        cells[2] = cell_int(size);
        for (Py_ssize_t i = 0; i < room; i++)
            cells[3 + i] = i < size ? cell_borrow(PyList_GET_ITEM(values, first + i)) : cell_float(0.0);
        result = put_by_struct(output, pack, n, KIND_VALUES, places, room + 3);
        for (Py_ssize_t i = 0; i < room + 3; i++)
            cell_clear(&cells[i]);
    }
    PyMem_Free(cells);
    PyMem_Free(places);
    return result;
}
