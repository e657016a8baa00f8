/* kvhook._step.native: the step path in C. What it is for, and who decides whether it is used: kvhook/_step/__init__.py.

   It is built for one version of CPython. The stable ABI of 3.10, which one wheel could serve all versions with, has
   neither the buffer protocol (3.11), which a mapped ring is held by, nor vectorcall (3.12), without which each call
   of the engine's step would make a tuple and a bound method. */

#include "core.h"

static PyObject *nothing(PyObject *Py_UNUSED(module), PyObject *const *Py_UNUSED(args), Py_ssize_t Py_UNUSED(nargs),
                         PyObject *Py_UNUSED(names))
{
    Py_RETURN_NONE;
}

static PyMethodDef functions[] = {
    {"nothing", (PyCFunction)(void (*)(void))nothing, METH_FASTCALL | METH_KEYWORDS,
     "Does nothing, whatever it is given: what a call costs is measured with it."},
    {"forked", ring_forked, METH_NOARGS, "This process was forked off: its parent's rings are not written any more."},
    {NULL, NULL, 0, NULL},
};

static int add_names(PyObject *module, const char *title, const char *const *names, Py_ssize_t count)
{
    PyObject *tuple = PyTuple_New(count);
    for (Py_ssize_t i = 0; tuple != NULL && i < count; i++) {
        PyObject *name = PyUnicode_FromString(names[i]);
        if (name == NULL)
            Py_CLEAR(tuple);
        else
            PyTuple_SET_ITEM(tuple, i, name);
    }
    if (tuple == NULL || PyModule_AddObject(module, title, tuple) < 0) {
        Py_XDECREF(tuple);
        return -1;
    }
    return 0;
}

static int fill(PyObject *module)
{
#define AS_TEXT(name) #name,
    static const char *const operations[] = {OPERATIONS(AS_TEXT)};
    static const char *const registers[] = {STATE_REGISTERS(AS_TEXT)};
    static const char *const columns[] = {CORE_COLUMNS(AS_TEXT)};
    PyTypeObject *const types[] = {&RingStore_Type, &Publisher_Type, &StepMethod_Type, &Counter_Type,
                                   &OutputTap_Type, &CoreState_Type, &CoreTap_Type};
    for (size_t i = 0; i < sizeof types / sizeof *types; i++)
        if (PyModule_AddType(module, types[i]) < 0)
            return -1;
    if (PyModule_AddIntConstant(module, "STACK_DEPTH", STACK_DEPTH) < 0)
        return -1;
    if (add_names(module, "OPERATIONS", operations, NUM_OPERATIONS) < 0)
        return -1;
    if (add_names(module, "CORE_COLUMNS", columns, NUM_CORE_COLUMNS) < 0)
        return -1;
    return add_names(module, "REGISTERS", registers, NUM_STATE_REGISTERS);
}

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "native",
    .m_doc = "The step path in C.",
    .m_size = -1,
    .m_methods = functions,
};

PyMODINIT_FUNC PyInit_native(void)
{
    PyObject *module = PyModule_Create(&definition);
    if (module != NULL && fill(module) < 0)
        Py_CLEAR(module);
    return module;
}
