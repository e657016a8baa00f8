/* Cells: Python values, the common numbers among them without an object. The results are those of Python's own
   operators, because whatever is not common is left to them. */

#include "step.h"

BOTH_HOT void cell_drop(PyObject *object) { Py_DECREF(object); }

BOTH_HOT Cell cell_take(PyObject *object)
{
    Cell cell = {EMPTY, {.o = NULL}};
    if (object == NULL)
        return cell;
    if (PyFloat_CheckExact(object)) {
        cell.tag = FLOAT;
        cell.d = PyFloat_AS_DOUBLE(object);
        Py_DECREF(object);
        return cell;
    }
    if (PyLong_CheckExact(object)) {
        int overflow;
        int64_t value = PyLong_AsLongLongAndOverflow(object, &overflow);
        if (LIKELY(!overflow)) {
            cell.tag = INTEGER;
            cell.i = value;
            Py_DECREF(object);
            return cell;
        }
    }
    cell.tag = OBJECT;
    cell.o = object;
    return cell;
}

BOTH_HOT Cell cell_borrow(PyObject *object)
{
    if (object != NULL && PyFloat_CheckExact(object))
        return cell_float(PyFloat_AS_DOUBLE(object));
    if (object != NULL && PyLong_CheckExact(object)) {
        int overflow;
        int64_t value = PyLong_AsLongLongAndOverflow(object, &overflow);
        if (LIKELY(!overflow))
            return cell_int(value);
    }
    Py_XINCREF(object);
    return (Cell){object ? OBJECT : EMPTY, {.o = object}};
}

PyObject *cell_object(Cell cell)
{
    switch (cell.tag) {
    case INTEGER:
        return PyLong_FromLongLong(cell.i);
    case FLOAT:
        return PyFloat_FromDouble(cell.d);
    case OBJECT:
        Py_INCREF(cell.o);
        return cell.o;
    default:
        PyErr_SetString(PyExc_SystemError, "kvhook: a register was read before it was set");
        return NULL;
    }
}

int cell_true(Cell cell)
{
    switch (cell.tag) {
    case INTEGER:
        return cell.i != 0;
    case FLOAT:
        return cell.d != 0.0;
    case OBJECT:
        return PyObject_IsTrue(cell.o);
    default:
        return 0;
    }
}

static Cell arithmetic_of_objects(char operator, Cell a, Cell b)
{
    PyObject *left = cell_object(a), *right = left ? cell_object(b) : NULL, *result = NULL;
    if (right != NULL) {
        switch (operator) {
        case '+':
            result = PyNumber_Add(left, right);
            break;
        case '-':
            result = PyNumber_Subtract(left, right);
            break;
        case '*':
            result = PyNumber_Multiply(left, right);
            break;
        default:
            result = PyNumber_TrueDivide(left, right);
        }
    }
    Py_XDECREF(left);
    Py_XDECREF(right);
    return cell_take(result);
}

/* Integers up to here are floats exactly; beyond, Python compares and divides by rules of its own. */
static const int64_t EXACT = (int64_t)1 << 53;

static inline bool is_small(Cell cell) { return cell.tag != INTEGER || (cell.i <= EXACT && cell.i >= -EXACT); }

static inline double as_double(Cell cell) { return cell.tag == FLOAT ? cell.d : (double)cell.i; }

BOTH_HOT Cell cell_arithmetic(char operator, Cell a, Cell b)
{
    if (a.tag == INTEGER && b.tag == INTEGER && operator != '/') {
        long long result;
        bool overflow = operator == '+'   ? __builtin_saddll_overflow(a.i, b.i, &result)
                        : operator == '-' ? __builtin_ssubll_overflow(a.i, b.i, &result)
                                          : __builtin_smulll_overflow(a.i, b.i, &result);
        if (LIKELY(!overflow))
            return cell_int(result);
    }
    else if ((a.tag == FLOAT || a.tag == INTEGER) && (b.tag == FLOAT || b.tag == INTEGER) && is_small(a) &&
             is_small(b)) {
        double x = as_double(a), y = as_double(b);
        if (operator == '+')
            return cell_float(x + y);
        if (operator == '-')
            return cell_float(x - y);
        if (operator == '*')
            return cell_float(x * y);
        if (y != 0.0)
            return cell_float(x / y);
    }
    return arithmetic_of_objects(operator, a, b);
}

int cell_compare(int operator, Cell a, Cell b)
{
    if (a.tag == INTEGER && b.tag == INTEGER) {
        int order = (a.i > b.i) - (a.i < b.i);
        switch (operator) {
        case Py_LT:
            return order < 0;
        case Py_LE:
            return order <= 0;
        case Py_EQ:
            return order == 0;
        case Py_NE:
            return order != 0;
        case Py_GT:
            return order > 0;
        default:
            return order >= 0;
        }
    }
    PyObject *left = cell_object(a), *right = left ? cell_object(b) : NULL;
    PyObject *answer = right ? PyObject_RichCompare(left, right, operator) : NULL;
    int result = answer ? PyObject_IsTrue(answer) : -1;
    Py_XDECREF(left);
    Py_XDECREF(right);
    Py_XDECREF(answer);
    return result;
}

HOT Cell cell_to_int(Cell cell, PyObject *int_type)
{
    if (cell.tag == INTEGER)
        return cell;
    if (cell.tag == FLOAT && cell.d < 9e18 && cell.d > -9e18) /* a NaN is neither */
        return cell_int((int64_t)cell.d);
    PyObject *object = cell_object(cell);
    PyObject *result = object ? PyObject_CallFunctionObjArgs(int_type, object, NULL) : NULL;
    Py_XDECREF(object);
    return cell_take(result);
}
