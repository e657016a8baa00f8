/* Errors of kvhook's on the step path: each ends where it is raised, and is told. */

#include "step.h"

bool is_users_error(void)
{
    if (is_users(PyErr_Occurred()))
        return true;
    PyObject *type, *error, *traceback;
    PyErr_Fetch(&type, &error, &traceback);
    PyErr_NormalizeException(&type, &error, &traceback);
    if (traceback != NULL)
        PyException_SetTraceback(error, traceback);
    PyObject *faults = PyImport_ImportModule("kvhook.faults");
    PyObject *answer = faults == NULL ? NULL : PyObject_CallMethod(faults, "is_users", "O", error);
    bool result = answer == Py_True;
    if (faults != NULL && answer == NULL && !PyErr_ExceptionMatches(PyExc_MemoryError) &&
        !PyErr_ExceptionMatches(PyExc_RecursionError)) {
        result = true; /* a signal handler has raised another one meanwhile, which goes on in place of this one */
        Py_XDECREF(type);
        Py_XDECREF(error);
        Py_XDECREF(traceback);
    } else
        PyErr_Restore(type, error, traceback); /* also in place of an error that is set */
    Py_XDECREF(faults);
    Py_XDECREF(answer);
    return result;
}

int contain(PyObject *failed, PyObject *engine_id)
{
    if (is_users_error())
        return -1;
    PyObject *type, *error, *traceback, *answer = NULL;
    PyErr_Fetch(&type, &error, &traceback);
    PyErr_NormalizeException(&type, &error, &traceback);
    if (traceback != NULL)
        PyException_SetTraceback(error, traceback);
    if (failed != NULL) {
        Py_INCREF(failed); /* it takes out of the engine whoever holds it */
        answer = PyObject_CallFunctionObjArgs(failed, error, engine_id, NULL);
        Py_DECREF(failed);
    }
    int result = answer || failed == NULL ? 0 : -1;
    Py_XDECREF(type);
    Py_XDECREF(error);
    Py_XDECREF(traceback);
    Py_XDECREF(answer);
    return result;
}
