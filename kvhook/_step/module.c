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

/* What the files of this folder keep between calls (names, free memory, the rings of this process) there is once in a
   process, and is protected by the one lock of the main interpreter. Where that does not hold, Python does the work. */
static int execute(PyObject *module)
{
    const char *why = NULL;
#ifdef Py_GIL_DISABLED
    why = "it relies on the interpreter's lock, which this build of Python has not";
#endif
    if (PyInterpreterState_Get() != PyInterpreterState_Main())
        why = "it works in the main interpreter only, and this is a subinterpreter";
    if (why == NULL)
        return fill(module);
    PyObject *message = PyUnicode_FromString(why), *name = PyModule_GetNameObject(module);
    PyObject *path = PyModule_GetFilenameObject(module);
    if (path == NULL)
        PyErr_Clear();
    if (message != NULL && name != NULL)
        PyErr_SetImportError(message, name, path);
    Py_XDECREF(message);
    Py_XDECREF(name);
    Py_XDECREF(path);
    return -1;
}

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, execute},
#ifdef Py_mod_multiple_interpreters
    {Py_mod_multiple_interpreters, Py_MOD_MULTIPLE_INTERPRETERS_NOT_SUPPORTED},
#endif
#if defined(Py_GIL_DISABLED) && defined(Py_mod_gil)
    {Py_mod_gil, Py_MOD_GIL_NOT_USED}, /* it is refused above: without this the attempt would turn the lock on */
#endif
    {0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "native",
    .m_doc = "The step path in C.",
    .m_size = 0,
    .m_methods = functions,
    .m_slots = slots,
};

PyMODINIT_FUNC PyInit_native(void)
{
    return PyModuleDef_Init(&definition);
}
