/* Programs: the expressions of an adapter's tables, compiled by kvhook/adapters/program.py, and what runs them.

   An expression is short: most read one attribute. The machine knows what such expressions are made of; whatever it
   does not know by itself (helpers, getattr, max ...) is a CALL of the Python function. Order of evaluation, results
   and exceptions are Python's. */

#include "step.h"

int program_parse(Program *program, PyObject *operations, PyObject *constants, Py_ssize_t num_registers)
{
    Py_ssize_t size = PyTuple_GET_SIZE(operations);
    program->num_constants = PyTuple_GET_SIZE(constants);
    program->constants = PyMem_Calloc(program->num_constants + 1, sizeof(Cell));
    program->operations = PyMem_Calloc(size + 1, sizeof(Operation));
    program->places = PyMem_Calloc(size + 1, sizeof(Place));
    uint32_t places = 0;
    if (program->constants == NULL || program->operations == NULL || program->places == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    for (Py_ssize_t i = 0; i < program->num_constants; i++)
        program->constants[i] = cell_borrow(PyTuple_GET_ITEM(constants, i));
    for (Py_ssize_t i = 0; i < size; i++) {
        int code, argument, attribute;
        if (!PyArg_ParseTuple(PyTuple_GET_ITEM(operations, i), "iii", &code, &argument, &attribute))
            return -1;
        bool reads = code == OP_REGISTER || code == OP_REGISTER_ATTRIBUTE;
        bool named = code == OP_ATTRIBUTE || code == OP_REGISTER_ATTRIBUTE;
        Py_ssize_t name = code == OP_ATTRIBUTE ? argument : attribute;
        bool fits = code >= 0 && code < NUM_OPERATIONS && argument >= 0 && argument < 65536 && attribute >= 0;
        if (fits && reads)
            fits = argument < num_registers;
        if (fits && code == OP_CONSTANT)
            fits = argument < program->num_constants;
        if (fits && named)
            fits = name < program->num_constants && program->constants[name].tag == OBJECT &&
                   PyUnicode_CheckExact(program->constants[name].o);
        if (fits && named)
            PyUnicode_InternInPlace(&program->constants[name].o);
        if (fits && (code == OP_JUMP || code == OP_JUMP_IF_FALSE))
            fits = argument > i && argument < size; /* forward: every expression ends */
        if (!fits || (i == size - 1 && code != OP_END)) {
            PyErr_SetString(PyExc_ValueError, "kvhook: no such operation");
            return -1;
        }
        if (named) {
            program->places[places].name = program->constants[name].o;
            attribute = (int)places++;
        }
        program->operations[i] = (Operation){(uint16_t)code, (uint16_t)argument, (uint32_t)attribute};
    }
    program->num_operations = size;
    program->num_places = places;
    return 0;
}

void program_clear(Program *program)
{
    if (program->constants != NULL)
        for (Py_ssize_t i = 0; i < program->num_constants; i++)
            cell_clear(&program->constants[i]);
    PyMem_Free(program->constants);
    PyMem_Free(program->operations);
    PyMem_Free(program->places);
    program->places = NULL;
    program->constants = NULL;
    program->operations = NULL;
    program->num_constants = program->num_operations = 0;
}

int program_visit(const Program *program, visitproc visit, void *arg)
{
    for (Py_ssize_t i = 0; i < program->num_constants; i++)
        if (program->constants[i].tag == OBJECT)
            Py_VISIT(program->constants[i].o);
    return 0;
}

static Cell call(Cell function, const Cell *arguments, int count)
{
    PyObject *objects[STACK_DEPTH + 1], *result = NULL;
    int made = 0;
    while (made < count && (objects[made + 1] = cell_object(arguments[made])) != NULL)
        made++;
    if (made == count)
        result = PyObject_Vectorcall(function.o, objects + 1, (size_t)count | PY_VECTORCALL_ARGUMENTS_OFFSET, NULL);
    while (made > 0)
        Py_DECREF(objects[made--]);
    return cell_take(result);
}

static Cell length(Cell cell)
{
    PyObject *object = cell_object(cell);
    Py_ssize_t size = object ? PyObject_Size(object) : -1;
    Py_XDECREF(object);
    return size < 0 ? (Cell){EMPTY, {.o = NULL}} : cell_int(size);
}

BOTH_HOT Cell program_run(const Program *program, Py_ssize_t start, const Cell *registers)
{
    static const char signs[] = {'+', '-', '*', '/'};
    const Operation *operations = program->operations;
    const Cell *constants = program->constants;
    Cell storage[STACK_DEPTH + 1], *stack = storage + 1, result; /* one below, for `last` of an empty stack */
    int top = 0, truth;
    for (Py_ssize_t at = start;; at++) {
        Operation operation = operations[at];
        Cell *last = &stack[top - 1];
        switch (operation.code) {
        case OP_REGISTER_ATTRIBUTE:
            result = place_cell(&program->places[operation.place], registers[operation.argument]);
            if (UNLIKELY(result.tag == EMPTY))
                goto failed;
            if (LIKELY(top == 0 && operations[at + 1].code == OP_END))
                return result;
            stack[top++] = result;
            break;
        case OP_REGISTER:
            stack[top++] = cell_copy(registers[operation.argument]);
            if (UNLIKELY(stack[top - 1].tag == EMPTY)) {
                PyErr_SetString(PyExc_SystemError, "kvhook: a register was read before it was set");
                goto failed;
            }
            break;
        case OP_CONSTANT:
            stack[top++] = cell_copy(constants[operation.argument]);
            break;
        case OP_ATTRIBUTE:
            result = place_cell(&program->places[operation.place], *last);
            cell_set(last, result);
            if (UNLIKELY(result.tag == EMPTY))
                goto failed;
            break;
        case OP_ADD:
        case OP_SUBTRACT:
        case OP_MULTIPLY:
        case OP_DIVIDE:
            result = cell_arithmetic(signs[operation.code - OP_ADD], stack[top - 2], *last);
            cell_clear(&stack[--top]);
            cell_set(&stack[top - 1], result);
            if (UNLIKELY(result.tag == EMPTY))
                goto failed;
            break;
        case OP_INT:
            result = cell_to_int(*last, (PyObject *)&PyLong_Type);
            cell_set(last, result);
            if (UNLIKELY(result.tag == EMPTY))
                goto failed;
            break;
        case OP_LEN:
            result = length(*last);
            cell_set(last, result);
            if (UNLIKELY(result.tag == EMPTY))
                goto failed;
            break;
        case OP_CALL:
            result = call(stack[top - operation.argument - 1], &stack[top - operation.argument], operation.argument);
            for (int i = 0; i < operation.argument; i++)
                cell_clear(&stack[--top]);
            cell_set(&stack[top - 1], result);
            if (UNLIKELY(result.tag == EMPTY))
                goto failed;
            break;
        case OP_IS_NONE:
        case OP_IS_NOT_NONE:
            truth = cell_is_none(*last) == (operation.code == OP_IS_NONE);
            cell_set(last, cell_int(truth));
            break;
        case OP_COMPARE:
            truth = cell_compare(operation.argument, stack[top - 2], *last);
            cell_clear(&stack[--top]);
            cell_set(&stack[top - 1], cell_int(truth));
            if (UNLIKELY(truth < 0))
                goto failed;
            break;
        case OP_JUMP_IF_FALSE:
            truth = cell_true(*last);
            cell_clear(&stack[--top]);
            if (UNLIKELY(truth < 0))
                goto failed;
            if (!truth)
                at = operation.argument - 1;
            break;
        case OP_JUMP:
            at = operation.argument - 1;
            break;
        default: /* OP_END */
            return stack[0];
        }
    }
failed:
    while (top > 0)
        cell_clear(&stack[--top]);
    return (Cell){EMPTY, {.o = NULL}};
}
