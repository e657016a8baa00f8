/* Count, sum, smallest and largest of a list of values, and the list itself where it does not follow from these: what
   `_SourceWriter.list` in kvhook/adapters/source.py generates.

   Python's path sorts the list and sums it in that order; so does this. A list with anything but plain floats in it,
   with a NaN or a negative zero (whose place after sorting depends on how it is sorted), is left to Python's own
   `sorted` and `sum`. */

#include "step.h"

static PyObject *sorted_, *sum_;

static int find_builtins(void)
{
    if (sum_ != NULL)
        return 0;
    PyObject *builtins = PyImport_ImportModule("builtins");
    if (builtins == NULL)
        return -1;
    sorted_ = PyObject_GetAttrString(builtins, "sorted");
    sum_ = PyObject_GetAttrString(builtins, "sum");
    Py_DECREF(builtins);
    return sorted_ && sum_ ? 0 : -1;
}

static void set(Cell *registers, const Series *series, Cell low, Cell high, Cell total)
{
    cell_set(&registers[series->min], low);
    cell_set(&registers[series->max], high);
    cell_set(&registers[series->sum], total);
}

/* The general way, for any kind of sequence. */
static int stats_of_objects(const Series *series, PyObject *values, Cell *registers, const ValuesOut *out)
{
    Py_ssize_t count = PyObject_Size(values);
    if (count < 0)
        return -1;
    cell_set(&registers[series->count], cell_int(count));
    if (count == 0) {
        set(registers, series, cell_float(0.0), cell_float(0.0), cell_float(0.0));
        return 0;
    }
    if (count == 1) {
        PyObject *zero = PyLong_FromLong(0), *first = zero ? PyObject_GetItem(values, zero) : NULL;
        Py_XDECREF(zero);
        if (first == NULL)
            return -1;
        set(registers, series, cell_borrow(first), cell_borrow(first), cell_borrow(first));
        Py_DECREF(first);
        return 0;
    }
    if (find_builtins() < 0)
        return -1;
    PyObject *sorted = PyObject_CallFunctionObjArgs(sorted_, values, NULL);
    if (sorted == NULL)
        return -1;
    int result = -1;
    if (PyList_GET_SIZE(sorted) == 0) {
        PyErr_SetString(PyExc_IndexError, "list index out of range");
        goto done;
    }
    Cell low = cell_borrow(PyList_GET_ITEM(sorted, 0));
    Cell high = cell_borrow(PyList_GET_ITEM(sorted, PyList_GET_SIZE(sorted) - 1));
    cell_set(&registers[series->min], low);
    cell_set(&registers[series->max], high);
    int equal = cell_compare(Py_EQ, low, high);
    if (equal < 0)
        goto done;
    if (equal) {
        Cell total = cell_arithmetic('*', high, cell_int(count));
        cell_set(&registers[series->sum], total);
        result = total.tag == EMPTY ? -1 : 0;
        goto done;
    }
    Cell total = cell_take(PyObject_CallFunctionObjArgs(sum_, sorted, NULL));
    cell_set(&registers[series->sum], total);
    if (total.tag == EMPTY)
        goto done;
    result = 0;
    if (count > 2)
        result = put_value_objects(out->output, out->pack, &registers[REG_n], registers[REG_step], series->series,
                                   sorted, out->room);
done:
    Py_DECREF(sorted);
    return result;
}

/* Bottom up, and stable as Python's. `other` is as large as `values`; the sorted values are in what is returned. */
static double *merge_sort(double *values, double *other, Py_ssize_t count)
{
    enum { RUN = 16 };
    for (Py_ssize_t first = 0; first < count; first += RUN) {
        Py_ssize_t end = first + RUN < count ? first + RUN : count;
        for (Py_ssize_t i = first + 1; i < end; i++) {
            double value = values[i];
            Py_ssize_t at = i;
            for (; at > first && values[at - 1] > value; at--)
                values[at] = values[at - 1];
            values[at] = value;
        }
    }
    for (Py_ssize_t width = RUN; width < count; width *= 2) {
        for (Py_ssize_t first = 0; first < count; first += 2 * width) {
            Py_ssize_t middle = first + width < count ? first + width : count;
            Py_ssize_t end = first + 2 * width < count ? first + 2 * width : count;
            Py_ssize_t a = first, b = middle;
            for (Py_ssize_t at = first; at < end; at++)
                other[at] = a < middle && (b >= end || values[a] <= values[b]) ? values[a++] : values[b++];
        }
        double *sorted = other;
        other = values;
        values = sorted;
    }
    return values;
}

/* Python's sum() of floats. Since 3.12 it carries the rounding errors along, so it is called itself. */
static Cell sum_of(const double *values, Py_ssize_t count)
{
#if PY_VERSION_HEX < 0x030C0000
    double total = 0.0;
    for (Py_ssize_t i = 0; i < count; i++)
        total += values[i];
    return cell_float(total);
#else
    PyObject *list = find_builtins() < 0 ? NULL : PyList_New(count), *total = NULL;
    if (list == NULL)
        return (Cell){EMPTY, {.o = NULL}};
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *value = PyFloat_FromDouble(values[i]);
        if (value == NULL)
            goto done;
        PyList_SET_ITEM(list, i, value);
    }
    total = PyObject_CallFunctionObjArgs(sum_, list, NULL);
done:
    Py_DECREF(list);
    return cell_take(total);
#endif
}

HOT int list_stats(const Series *series, PyObject *values, Cell *registers, const ValuesOut *out)
{
    enum { ON_THE_STACK = 512 };
    double here[2 * ON_THE_STACK], *numbers = here;
    if (!PyList_CheckExact(values) || registers[REG_step].tag != INTEGER || registers[REG_n].tag != INTEGER)
        return stats_of_objects(series, values, registers, out);
    Py_ssize_t count = PyList_GET_SIZE(values);
    PyObject *first = count ? PyList_GET_ITEM(values, 0) : NULL;
    if (count < 2) {
        Cell only = count ? cell_borrow(first) : cell_float(0.0);
        cell_set(&registers[series->count], cell_int(count));
        set(registers, series, cell_copy(only), cell_copy(only), only);
        return 0;
    }
    if (!PyFloat_CheckExact(first))
        return stats_of_objects(series, values, registers, out);
    double low = PyFloat_AS_DOUBLE(first);
    Py_ssize_t alike = 1;
    while (alike < count) { /* a batch moves together: nearly always all values are one */
        PyObject *value = PyList_GET_ITEM(values, alike);
        if (value != first && !(PyFloat_CheckExact(value) && PyFloat_AS_DOUBLE(value) == low))
            break;
        alike++;
    }
    if (alike == count && low == low) {
        double high = PyFloat_AS_DOUBLE(PyList_GET_ITEM(values, count - 1)); /* of 0.0 and -0.0 each stays in place */
        cell_set(&registers[series->count], cell_int(count));
        set(registers, series, cell_float(low), cell_float(high), cell_float(high * (double)count));
        return 0;
    }
    if (count > ON_THE_STACK && (numbers = PyMem_Malloc(2 * (size_t)count * sizeof(double))) == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    int result = -1;
    Py_ssize_t i = 0;
    for (; i < count; i++) {
        PyObject *value = PyList_GET_ITEM(values, i);
        if (!PyFloat_CheckExact(value))
            break;
        double number = PyFloat_AS_DOUBLE(value);
        if (number != number || (number == 0.0 && 1.0 / number < 0.0))
            break;
        numbers[i] = number;
    }
    if (i < count) {
        result = stats_of_objects(series, values, registers, out);
        goto done;
    }
    const double *sorted = merge_sort(numbers, numbers + count, count);
    Cell total = sum_of(sorted, count);
    cell_set(&registers[series->count], cell_int(count));
    set(registers, series, cell_float(sorted[0]), cell_float(sorted[count - 1]), total);
    if (total.tag == EMPTY)
        goto done;
    result = 0;
    if (count > 2)
        result = put_values(out->output, &registers[REG_n], registers[REG_step], series->series, sorted, count,
                            out->room);
done:
    if (numbers != here)
        PyMem_Free(numbers);
    return result;
}
